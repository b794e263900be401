"""Tokenizers built in code, one for each habit that encoding has to get right."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks the answer but leaves its stop token outside of the marks.
MARKED = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}{% endgeneration %}"
    "{% else %}{{ message.content }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Ends an answer with two special tokens, as Cohere2's does.
ENDED_TWICE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% if message.role == 'assistant' %}<|im_end|>{% endif %}</s>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Marks its own end of an answer, which is not what follows every answer.
MARKED_BEYOND = MARKED.replace("{% endgeneration %}", "<|im_end|>\n</s>{% endgeneration %}")
# Writes every answer but the last in another way.
UNSTABLE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}{% if message.role == 'assistant' and not loop.last %}...{% endif %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Closes the conversation with a token of its own, as Phi-3's does.
CLOSED = CHATML.replace("{% if add", "{% if not add_generation_prompt %}</s>{% endif %}{% if add")
WITHOUT_STOP = (
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML
SPECIAL = ["<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
SENTENCES = ["the answer is yes and the rating is high", "ratings of the pub near the river", "no"] * 3


def byte_tokenizer(
    *,
    chat_template: str | None = CHATML,
    eos_token: str | None = "<|im_end|>",
    pad_token: str = "<pad>",
    bos: bool = False,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2, Llama 3, Qwen and SmolLM have it; ``bos`` makes it write <s> before every text."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(SENTENCES, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(backend, chat_template, eos_token, pad_token)


def sentencepiece_tokenizer(*, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A tokenizer that marks the start of a text with a space, as Llama 2 and Mistral do, and writes a BOS."""
    backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL, "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
    backend.train_from_iterator(SENTENCES, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrapped(backend, chat_template, "</s>", "<pad>")


def _wrapped(
    backend: Tokenizer, chat_template: str | None, eos_token: str | None, pad_token: str
) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token=eos_token, pad_token=pad_token
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = chat_template
    return tokenizer


class CharTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python: one id per character, no offsets."""

    def __init__(self, **options: object) -> None:
        self.vocab = {chr(code): code for code in range(256)}
        super().__init__(**options)

    @property
    def vocab_size(self) -> int:
        return len(self.vocab)

    def get_vocab(self) -> dict[str, int]:
        return {**self.vocab, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **_: object) -> list[str]:
        return list(text)

    def _convert_token_to_id(self, token: str) -> int:
        return self.vocab[token]

    def _convert_id_to_token(self, index: int) -> str:
        return chr(index)

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        return "".join(tokens)


def char_tokenizer() -> CharTokenizer:
    tokenizer = CharTokenizer(eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.chat_template = CHATML
    return tokenizer

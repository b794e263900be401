"""A model that answers prompts, as ``rankwise generate`` and a finished run show it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from rankwise.data.rows import Message
from rankwise.errors import DataError, RunError, warn
from rankwise.evaluation.settings import LoadingOptions
from rankwise.foreign import Fields, JsonObject
from rankwise.records import RunRecord
from rankwise.verbs.settings import GenerateSettings

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

# The longest phrase that is looked for, how often it must be at the end, and the characters that this must fill.
PHRASE, TIMES, FILLED = 120, 4, 40


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation for the model to answer. A prompt is a conversation of one message."""

    messages: tuple[Message, ...]
    tools: tuple[Fields, ...] | None = None
    # Its name in messages.
    place: str = "the prompt"
    # The last turn of a row of data, which the model is not shown.
    answer: Message | None = None

    @property
    def prompt(self) -> str:
        return str(self.messages[-1]["content"])

    @property
    def expected(self) -> str | None:
        """The answer of the row of data: its text, or else its calls as JSON."""
        if self.answer is None:
            return None
        return str(self.answer.get("content") or json.dumps(self.answer.get("tool_calls"), ensure_ascii=False))


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's answer. ``cut_at``: the limit of new tokens, if it ended the answer; None if a stop token did."""

    text: str
    cut_at: int | None

    @property
    def repeats(self) -> str | None:
        """The phrase that the answer repeats up to the limit."""
        return repeated(self.text) if self.cut_at else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speaker:
    """A loaded model that answers prompts, through a chat template or as plain text."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    settings: GenerateSettings
    # The base's tokenizer, without the adapter's new tokens.
    base_tokenizer: PreTrainedTokenizerBase
    is_chat: bool
    # Jinja source that replaces the tokenizer's template.
    template: str | None
    # What follows a prompt without a template.
    ending: str
    # The tokens that end an answer.
    stop_ids: frozenset[int]

    def answers(self, asked: Conversation) -> dict[str, Said]:
        """{"tuned": the adapter's answer, "base": that of the model without one}; with an adapter, the base's only with
        --compare.
        """
        from rankwise.adapters import adapter_disabled

        if self.settings.adapter is None:
            return {"base": self.say(asked)}
        said = {"tuned": self.say(asked)}
        if self.settings.compare:
            with adapter_disabled(self.model):
                said["base"] = dataclasses.replace(self, tokenizer=self.base_tokenizer).say(asked)
        return said

    def say(self, asked: Conversation, streamer: BaseStreamer | None = None) -> Said:
        """The answer of the model in its current state; ``streamer`` (transformers') gets the tokens as they are
        generated.
        """
        import torch

        from rankwise.acceleration.generation import GREEDY, only_numbers

        inputs = self._encode(asked)
        length = inputs["input_ids"].shape[1]
        limit, pad = self._limit(length), self.tokenizer.pad_token_id
        chosen: JsonObject = dict(GREEDY)
        if self.settings.temperature > 0:
            torch.manual_seed(self.settings.seed)
            chosen |= {"do_sample": True, "temperature": self.settings.temperature, "top_p": self.settings.top_p}
            # Without these, top_k would be 50, or the model's own.
            chosen |= {"top_k": 0, "min_p": 0.0}
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=limit,
                eos_token_id=sorted(self.stop_ids) or None,
                pad_token_id=self.tokenizer.eos_token_id if pad is None else pad,
                logits_processor=[only_numbers(self.model)],
                streamer=streamer,
                **chosen,
            )[0, length:].tolist()
        is_cut = len(tokens) == limit and tokens[-1] not in self.stop_ids
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return Said(text, limit if is_cut else None)

    def _limit(self, prompt_tokens: int) -> int:
        """The number of tokens for the answer. Raises RunError (RW533) for a prompt beyond the learned positions;
        warns (RW256) if they shorten the answer.
        """
        from rankwise.models.load import answer_room, table_rows

        wanted = self.settings.max_new_tokens
        limit, name = answer_room(self.model, prompt_tokens, wanted), type(self.model).__name__
        if not limit:
            raise RunError(
                "RW533",
                f"the prompt has {prompt_tokens:,} tokens, and this {name} has learned positions for "
                f"{table_rows(self.model):,}; give a shorter prompt, or a model with a longer context.",
            )
        if limit < wanted:
            warn(
                "RW256",
                f"this {name} has learned positions for {table_rows(self.model):,} tokens, and the prompt has "
                f"{prompt_tokens:,}, so the answer ends at {limit:,} tokens instead of {wanted:,}; give a shorter "
                "prompt for more.",
            )
        return limit

    def _encode(self, asked: Conversation) -> BatchEncoding:
        """(1, length) token ids and their mask, on the model's device."""
        from rankwise.data import chat_text

        text = asked.prompt.removesuffix(self.ending) + self.ending
        if self.is_chat:
            text = chat_text(
                self.tokenizer, asked.messages, asked.tools, chat_template=self.template, place=asked.place
            )
        # A template writes the BOS token itself.
        encoded = self.tokenizer(text, add_special_tokens=not self.is_chat, return_tensors="pt")
        return encoded.to(self.model.device)


def load_speaker(
    settings: GenerateSettings, name: str, record: RunRecord | None, given: tuple[Any, Any] | None = None
) -> tuple[Speaker, str]:
    """The model with its adapter, on its device, and the name of the device. It is asked by the template that the user
    gives, else as in training, else by the tokenizer's own template. ``given``: the model in memory, and its tokenizer.
    """
    from rankwise.acceleration.generation import stop_ids_of
    from rankwise.data import read_template
    from rankwise.evaluation.engine import Loaded, LoadOptions, load_as_trained, template_of

    options = LoadOptions(**settings.model_dump(include={*LoadingOptions.model_fields}))
    adapters = () if settings.adapter is None else (settings.adapter,)
    if given is None:
        loaded = load_as_trained(name, adapters, options, named=settings.model is not None)
    else:
        model, tokenizer = given
        loaded = Loaded(model.eval(), tokenizer, tokenizer, str(model.device), ())
    trained = record.data.get("train", {}) if record is not None else {}
    is_plain = settings.chat_template is None and str(trained.get("template", "")).startswith(("no template", "text"))
    template = template_of(adapters) if settings.chat_template is None else read_template(settings.chat_template)
    is_chat = not is_plain and bool(template or loaded.tokenizer.chat_template)
    ends = _ends(template, loaded.tokenizer) if is_chat else set()
    stops = stop_ids_of(loaded.model, loaded.tokenizer, ends)
    ending = str(trained.get("prompt_ending") or "") if is_plain else ""
    speaker = Speaker(
        model=loaded.model,
        tokenizer=loaded.tokenizer,
        settings=settings,
        base_tokenizer=loaded.base_tokenizer,
        is_chat=is_chat,
        template=template,
        ending=ending,
        stop_ids=stops,
    )
    return speaker, loaded.device


def _ends(template: str | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token by which the chat template ends a turn, which may not be the tokenizer's end of a text."""
    from rankwise.data import Rows
    from rankwise.data.encoding import RowEncoder

    try:
        return RowEncoder(Rows(items=(), kind="chat", source="", sha256="", format=""), tokenizer, template).stop_ids()
    except DataError as error:
        # A template that writes no assistant's turn ends none. Other faults show when it writes the prompts.
        if error.code not in ("RW211", "RW212", "RW213"):
            raise
        return set()


def repeated(text: str) -> str | None:
    """The word or short phrase that ``text`` repeats up to its end, which may cut the last one; None without one."""
    for size in range(1, PHRASE + 1):
        end = text[-max(TIMES * size, FILLED) :]
        if len(end) >= max(TIMES * size, FILLED) and end[size:] == end[:-size]:
            # From the beginning of a word.
            return (2 * end[:size])[end[:size].find(" ") + 1 :][:size].strip()
    return None

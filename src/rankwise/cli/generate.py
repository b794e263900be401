"""``rankwise generate``: answer prompts with a base model, a tuned one, or both side by side."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from rankwise.cli.folders import refuse_comparisons
from rankwise.cli.glance import check_paths
from rankwise.cli.options import Verb
from rankwise.cli.output import Document, Output
from rankwise.cli.repetition import cause, note_cut, repeated
from rankwise.cli.settings import GenerateSettings
from rankwise.cli.tables import light_table, titled
from rankwise.cli.words import printable
from rankwise.errors import ConfigError, DataError, RunError, warn
from rankwise.foreign import Fields, JsonObject
from rankwise.records import RunRecord, record_of

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from rankwise.cli.conversations import Conversation


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the argmax with temperature 0, else sampled with a seed."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt and the models' answers; None for a model that was not asked."""

    prompt: str
    base: str | None
    tuned: str | None
    # The whole conversation, where it is longer than the prompt.
    messages: tuple[Fields, ...] | None = None
    # {"base" or "tuned": number of tokens} of answers that reached the limit of new tokens without a stop token.
    cut_at: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # {"base" or "tuned": phrase} of those that repeat a phrase up to the limit.
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's answer. ``cut_at``: the limit of new tokens, where it ended the answer; None where a stop token did."""

    text: str
    cut_at: int | None


@dataclasses.dataclass(frozen=True)
class Wording:
    """How a prompt becomes the model's input: through a chat template, or unchanged and followed by ``suffix``."""

    chat: bool
    # Jinja source that replaces the tokenizer's template.
    template: str | None = None
    suffix: str = ""


@dataclasses.dataclass(frozen=True)
class Speaker:
    """A loaded model that answers prompts."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    wording: Wording
    adapted: bool
    sampling: Sampling
    # The base's tokenizer, without the adapter's new tokens.
    base_tokenizer: PreTrainedTokenizerBase
    # The tokens that end an answer.
    stop_ids: frozenset[int]

    def answer(self, asked: Conversation, *, both: bool) -> Answer:
        """The tuned model's answer, or the base's where there is no adapter; with ``both``, both."""
        from rankwise.adapters import adapter_disabled

        said = {"tuned" if self.adapted else "base": self.say(asked)}
        if self.adapted and both:
            with adapter_disabled(self.model):
                said["base"] = dataclasses.replace(self, tokenizer=self.base_tokenizer).say(asked)
        texts = {name: one.text for name, one in said.items()}
        return Answer(
            asked.prompt,
            texts.get("base"),
            texts.get("tuned"),
            asked.messages if len(asked.messages) > 1 else None,
            {name: one.cut_at for name, one in said.items() if one.cut_at is not None},
            {name: phrase for name, one in said.items() if one.cut_at and (phrase := repeated(one.text))},
        )

    def say(self, asked: Conversation, streamer: BaseStreamer | None = None) -> Said:
        """The answer of the model in its current state; ``streamer`` (transformers') gets the tokens as they are
        generated.
        """
        import torch

        from rankwise.acceleration.generation import GREEDY, only_numbers

        inputs = self._encode(asked)
        length = inputs["input_ids"].shape[1]
        room = self._room(length)
        chosen: JsonObject = dict(GREEDY)
        if self.sampling.temperature > 0:
            torch.manual_seed(self.sampling.seed)
            chosen |= {"do_sample": True, "temperature": self.sampling.temperature, "top_p": self.sampling.top_p}
            # Without these, top_k would be 50, or the model's own.
            chosen |= {"top_k": 0, "min_p": 0.0}
        with torch.inference_mode():
            tokens = self.model.generate(
                **inputs,
                max_new_tokens=room,
                eos_token_id=sorted(self.stop_ids) or None,
                pad_token_id=self._pad_token(),
                logits_processor=[only_numbers(self.model)],
                streamer=streamer,
                **chosen,
            )[0, length:].tolist()
        is_cut = len(tokens) == room and tokens[-1] not in self.stop_ids
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True)).strip()
        return Said(text, room if is_cut else None)

    def _room(self, prompt_tokens: int) -> int:
        """The number of tokens for the answer. Raises RunError (RW533) for a prompt beyond the learned positions;
        warns (RW256) where they shorten the answer.
        """
        from rankwise.models.load import answer_room, table_rows

        wanted = self.sampling.max_new_tokens
        room, name = answer_room(self.model, prompt_tokens, wanted), type(self.model).__name__
        if not room:
            raise RunError(
                "RW533",
                f"the prompt has {prompt_tokens:,} tokens, and this {name} has learned positions for "
                f"{table_rows(self.model):,}; give a shorter prompt, or a model with a longer context.",
            )
        if room < wanted:
            warn(
                "RW256",
                f"this {name} has learned positions for {table_rows(self.model):,} tokens, and the prompt has "
                f"{prompt_tokens:,}, so the answer ends at {room:,} tokens instead of {wanted:,}; give a shorter "
                "prompt for more.",
            )
        return room

    def _encode(self, asked: Conversation) -> BatchEncoding:
        """(1, length) token ids and their mask, on the model's device."""
        from rankwise.data import chat_text

        if self.wording.chat:
            template = self.wording.template
            text = chat_text(self.tokenizer, asked.messages, asked.tools, chat_template=template, place=asked.place)
        else:
            text = asked.prompt.removesuffix(self.wording.suffix) + self.wording.suffix
        # A template writes the BOS token itself.
        encoded = self.tokenizer(text, add_special_tokens=not self.wording.chat, return_tensors="pt")
        return encoded.to(self.model.device)

    def _pad_token(self) -> int | None:
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id


def run(settings: GenerateSettings, output: Output) -> Document:
    if settings.compare and settings.adapter is None:
        raise ConfigError("RW121", "--compare shows base and tuned model side by side; give --adapter FOLDER too.")
    refuse_comparisons([settings.adapter] if settings.adapter is not None else [])
    check_paths(model=settings.model)
    record = record_of(settings.adapter)
    name = settings.model or base_model_name(settings.adapter)
    from rankwise.cli.conversations import read_conversations

    conversations = [] if settings.chat else read_conversations(settings)
    with output.waiting(f"loading {name}"):
        speaker, device = load_speaker(settings, name, record)
    if settings.chat:
        from rankwise.cli.chat import talk

        messages = talk(settings, speaker, f"{settings.adapter or name} on {device}", output)
        return {"model": name, "adapter": str(settings.adapter) if settings.adapter else None, "messages": messages}
    answers = []
    _check_chat(settings, speaker.wording)
    for asked in conversations:
        answers.append(speaker.answer(asked, both=settings.compare))
        print_answer(output, answers[-1])
        # With --json the document says it.
        cuts = {} if output.as_json else answers[-1].cut_at
        for which, tokens in cuts.items():
            phrase = answers[-1].repeats.get(which)
            note_cut(output, tokens, phrase, f"the {which} answer" if settings.compare else "the answer")
    symptom = None
    if settings.adapter and (repeating := [answer.repeats for answer in answers if "tuned" in answer.repeats]):
        symptom = cause(settings.adapter, base_too=all("base" in repeats for repeats in repeating))
        if not output.as_json:
            output.note(symptom)
    return {
        "model": name,
        "adapter": str(settings.adapter) if settings.adapter else None,
        "device": device,
        "chat_template": speaker.wording.chat,
        "answers": [dataclasses.asdict(answer) for answer in answers],
        "symptom": symptom,
    }


def _check_chat(settings: GenerateSettings, wording: Wording) -> None:
    """Raise ConfigError (RW127) for options that need a chat template where there is none."""
    idle = [f"--{name}" for name in ("system", "messages") if getattr(settings, name) is not None]
    if not idle or wording.chat:
        return
    trained = settings.adapter is not None
    why = f"{settings.adapter} was trained without one" if trained else "the model has none"
    why, away = ("--raw asks for none", "--raw") if settings.raw else (why, "them")
    raise ConfigError(
        "RW127",
        f"only a chat template can write {' and '.join(idle)}, and {why}; leave out {away}, or give the model's "
        "template with --chat-template FILE.",
    )


def load_speaker(settings: GenerateSettings, name: str, record: RunRecord | None) -> tuple[Speaker, str]:
    """The model with its adapter, on its device, and the name of the device."""
    from rankwise.acceleration.generation import stop_ids_of
    from rankwise.evaluation.loading import LoadOptions, load_as_trained

    options = LoadOptions(
        settings.dtype, settings.quantization, settings.device, settings.trust_remote_code, settings.revision
    )
    adapters = () if settings.adapter is None else (settings.adapter,)
    loaded = load_as_trained(name, adapters, options, named=settings.model is not None)
    sampling = Sampling(settings.max_new_tokens, settings.temperature, settings.top_p, settings.seed)
    wording = _wording(settings, record, loaded.tokenizer)
    adapted = settings.adapter is not None
    stops = stop_ids_of(loaded.model, loaded.tokenizer, _ends(wording, loaded.tokenizer))
    speaker = Speaker(loaded.model, loaded.tokenizer, wording, adapted, sampling, loaded.base_tokenizer, stops)
    return speaker, loaded.device


def _ends(wording: Wording, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token by which the chat template ends a turn, which may not be the tokenizer's end of a text."""
    from rankwise.data import Rows
    from rankwise.data.encoding import RowEncoder

    if not wording.chat:
        return set()
    try:
        return RowEncoder(Rows((), "chat", "", "", ""), tokenizer, wording.template).stop_ids()
    except DataError as error:
        # A template that writes no assistant's turn ends none. Other faults show when it writes the prompts.
        if error.code not in ("RW211", "RW212", "RW213"):
            raise
        return set()


def _wording(settings: GenerateSettings, record: RunRecord | None, tokenizer: PreTrainedTokenizerBase) -> Wording:
    """How prompts are written: as the user asks, else as in training, else by the tokenizer's chat template."""
    from rankwise.data import read_template
    from rankwise.evaluation.loading import template_of

    trained = record.data.get("train", {}) if record is not None else {}
    template: str | None = None
    if settings.chat_template is not None:
        template = read_template(settings.chat_template)
    elif settings.adapter is not None:
        template = template_of([settings.adapter])
    plainly = str(trained.get("template", "")).startswith(("no template", "text"))
    if settings.raw or (plainly and settings.chat_template is None):
        return Wording(chat=False, suffix="" if settings.raw else str(trained.get("prompt_ending") or ""))
    return Wording(chat=bool(template or tokenizer.chat_template), template=template)


def base_model_name(adapter: Path | None) -> str:
    """The base an adapter was trained on. Raises ConfigError (RW122) without one, AdapterError (RW413) if unnamed."""
    if adapter is None:
        raise ConfigError("RW122", "there is nothing to generate with; give --model M, --adapter FOLDER or both.")
    from rankwise.adapters.trained_base import base_model_of

    return base_model_of(adapter)


def print_answer(output: Output, answer: Answer) -> None:
    """Print the answers side by side on a terminal, else as labelled lines."""
    if answer.base is not None and answer.tuned is not None:
        if output.is_terminal:
            output.console.print(side_by_side(answer))
        else:
            lines = (answer.prompt, f"  base:  {answer.base}", f"  tuned: {answer.tuned}", "")
            output.line(printable("\n".join(lines)))
        return
    text = answer.tuned if answer.tuned is not None else answer.base
    output.line(printable(answer.prompt), style="bold")
    output.line(printable(text or ""))
    output.line()


def side_by_side(answer: Answer) -> Group:
    table = light_table(gap=4, expand=True)
    table.add_column("base", ratio=1)
    table.add_column("tuned", ratio=1, style="green")
    table.add_row(Text(printable(answer.base or "")), Text(printable(answer.tuned or "")))
    return titled(printable(answer.prompt), table)


VERB = Verb(
    name="generate",
    settings=GenerateSettings,
    run=run,
    summary="Answer prompts with a base model, a tuned one, or both side by side.",
    examples=(
        'rankwise generate --model demo --prompt "What is a list in Python?"',
        'rankwise generate --adapter runs/first --prompt "Hello" --compare',
        "rankwise generate --adapter runs/first --prompt-file questions.txt --json",
        'rankwise generate --model demo --messages chat.json --system "Be brief."',
        "rankwise generate --adapter runs/first --chat",
    ),
)

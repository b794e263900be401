"""``rankwise generate``: answer prompts with a base model, a tuned one, or both side by side.

Prompts and conversations come from options, files and standard input. Answers that repeat themselves up to the limit of
new tokens are noted. With ``--chat``, a user talks to a model turn by turn, through its chat template.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.text import Text

from rankwise.cli.glance import check_paths, refuse_comparisons
from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output, light_table, titled
from rankwise.cli.settings import GenerateSettings
from rankwise.data.files import kind_of
from rankwise.data.formats import BadRow, conversation, tools_of
from rankwise.data.rows import Message
from rankwise.errors import ConfigError, DataError, RunError, warn
from rankwise.foreign import Fields, JsonObject, parse_json
from rankwise.options import flag
from rankwise.records import RunRecord, read_metrics, record_of
from rankwise.reports.numbers import plural, visible

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer
    from transformers.generation.streamers import BaseStreamer


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt and the models' answers; None for a model that was not asked."""

    prompt: str
    base: str | None
    tuned: str | None
    # The whole conversation, if it is longer than the prompt.
    messages: tuple[Fields, ...] | None = None
    # {"base" or "tuned": number of tokens} of answers that reached the limit of new tokens without a stop token.
    cut_at: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # {"base" or "tuned": phrase} of those that repeat a phrase up to the limit.
    repeats: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Said:
    """A model's answer. ``cut_at``: the limit of new tokens, if it ended the answer; None if a stop token did."""

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
    settings: GenerateSettings
    # The base's tokenizer, without the adapter's new tokens.
    base_tokenizer: PreTrainedTokenizerBase
    # The tokens that end an answer.
    stop_ids: frozenset[int]

    def answer(self, asked: Conversation, *, both: bool) -> Answer:
        """The tuned model's answer, or the base's if there is no adapter; with ``both``, both."""
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

        if self.wording.chat:
            template = self.wording.template
            text = chat_text(self.tokenizer, asked.messages, asked.tools, chat_template=template, place=asked.place)
        else:
            text = asked.prompt.removesuffix(self.wording.suffix) + self.wording.suffix
        # A template writes the BOS token itself.
        encoded = self.tokenizer(text, add_special_tokens=not self.wording.chat, return_tensors="pt")
        return encoded.to(self.model.device)


def run(settings: GenerateSettings, output: Output) -> Document:
    if settings.compare and settings.adapter is None:
        raise ConfigError("RW121", "--compare shows base and tuned model side by side; give --adapter FOLDER too.")
    refuse_comparisons([settings.adapter] if settings.adapter is not None else [])
    check_paths(model=settings.model)
    record = record_of(settings.adapter)
    name = settings.model or base_model_name(settings.adapter)

    from rankwise.models.mapped import mapped_files

    conversations = [] if settings.chat else read_conversations(settings)
    with output.waiting(f"loading {name}"):
        speaker, device = load_speaker(settings, name, record)
    files = mapped_files(speaker.model)
    if settings.chat:
        messages = talk(settings, speaker, f"{settings.adapter or name} on {device}", output)
        return {"model": name, "adapter": str(settings.adapter) if settings.adapter else None, "messages": messages}
    answers = []
    _check_chat(settings, speaker.wording)
    for asked in conversations:
        answers.append(speaker.answer(asked, both=settings.compare))
        files.check()
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
    """Raise ConfigError (RW121) for options that need a chat template if there is none."""
    idle = [f"--{name}" for name in ("system", "messages") if getattr(settings, name) is not None]
    if not idle or wording.chat:
        return
    trained = settings.adapter is not None
    why = f"{settings.adapter} was trained without one" if trained else "the model has none"
    why, away = ("--raw asks for none", "--raw") if settings.raw else (why, "them")
    raise ConfigError(
        "RW121",
        f"only a chat template can write {' and '.join(idle)}, and {why}; leave out {away}, or give the model's "
        "template with --chat-template FILE.",
    )


def load_speaker(settings: GenerateSettings, name: str, record: RunRecord | None) -> tuple[Speaker, str]:
    """The model with its adapter, on its device, and the name of the device."""
    from rankwise.acceleration.generation import stop_ids_of
    from rankwise.evaluation.loading import LoadOptions, load_as_trained

    given = settings.model_dump(include={"dtype", "quantization", "device", "trust_remote_code", "revision"})
    options = LoadOptions(**given, mapped=settings.mmap)
    adapters = () if settings.adapter is None else (settings.adapter,)
    loaded = load_as_trained(name, adapters, options, named=settings.model is not None)
    wording = _wording(settings, record, loaded.tokenizer)
    adapted = settings.adapter is not None
    stops = stop_ids_of(loaded.model, loaded.tokenizer, _ends(wording, loaded.tokenizer))
    speaker = Speaker(loaded.model, loaded.tokenizer, wording, adapted, settings, loaded.base_tokenizer, stops)
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
    """The base an adapter was trained on. Raises ConfigError (RW121) without one, AdapterError (RW413) if unnamed."""
    if adapter is None:
        raise ConfigError("RW121", "there is nothing to generate with; give --model M, --adapter FOLDER or both.")
    from rankwise.adapters.trained_base import base_model_of

    return base_model_of(adapter)


def print_answer(output: Output, answer: Answer) -> None:
    """Print the answers side by side on a terminal, else as labelled lines."""
    if answer.base is not None and answer.tuned is not None:
        if output.is_terminal:
            output.console.print(side_by_side(answer))
        else:
            lines = (answer.prompt, f"  base:  {answer.base}", f"  tuned: {answer.tuned}", "")
            output.line(visible("\n".join(lines)))
        return
    text = answer.tuned if answer.tuned is not None else answer.base
    output.line(visible(answer.prompt), style="bold")
    output.line(visible(text or ""))
    output.line()


def side_by_side(answer: Answer) -> Group:
    table = light_table(gap=4, expand=True)
    table.add_column("base", ratio=1)
    table.add_column("tuned", ratio=1, style="green")
    table.add_row(Text(visible(answer.base or "")), Text(visible(answer.tuned or "")))
    return titled(visible(answer.prompt), table)


COMMAND = Command(
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


STDIN = "-"


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation for the model to answer. A prompt is a conversation of one message."""

    messages: tuple[Message, ...]
    tools: tuple[Fields, ...] | None = None
    # Its name in messages.
    place: str = "the prompt"

    @property
    def prompt(self) -> str:
        return str(self.messages[-1]["content"])


def read_conversations(settings: GenerateSettings) -> list[Conversation]:
    """Everything to answer, in order: the prompts, the prompts of the file, the conversations.

    Raises ConfigError (RW121) if there is nothing to answer, or for a second system message; DataError: RW201,
    RW202, RW205 for a file that cannot be read, RW203 for an entry that is no conversation, RW204 for an empty file.
    """
    prompts = [text for given in settings.prompt for text in (_prompts(STDIN) if given == STDIN else [given])]
    prompts += _prompts(str(settings.prompt_file)) if settings.prompt_file else []
    found = [Conversation(({"role": "user", "content": text},)) for text in prompts]
    found += _conversations(str(settings.messages)) if settings.messages else []
    if not found:
        options = "--prompt TEXT, --prompt-file FILE or --messages FILE"
        raise ConfigError("RW121", f"there is nothing to answer; give {options}.")
    return [_with_system(one, settings.system) for one in found] if settings.system is not None else found


def _with_system(given: Conversation, system: str) -> Conversation:
    if any(message["role"] == "system" for message in given.messages):
        text = f"{given.place} has a system message of its own; leave --system or that message out."
        raise ConfigError("RW121", text)
    return dataclasses.replace(given, messages=({"role": "system", "content": system}, *given.messages))


def _prompts(source: str) -> list[str]:
    """The prompts of a text: one on each line."""
    if source != STDIN and kind_of(Path(source)) not in (None, ".txt"):
        raise DataError("RW202", f"{source} is not a list of prompts; give one a line as text.")
    return [line for _, line in _lines(source)]


def _conversations(source: str) -> list[Conversation]:
    """The conversation of a JSON file, or those of JSON lines."""
    lines = _lines(source) if source.endswith(".jsonl") else [(source, _read(source))]
    return [_conversation(place, text) for place, text in lines]


def _conversation(place: str, text: str) -> Conversation:
    """A list of messages, or an object with ``messages``."""
    try:
        record = parse_json(text)
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, dict):
            raise BadRow(f"expected a list of messages or an object with `messages`, found {str(record)[:40]!r}")
        messages = conversation(record)
        if messages[-1]["role"] not in ("user", "tool"):
            raise BadRow(f"expected a `user` or `tool` message to answer at the end, found `{messages[-1]['role']}`")
        return Conversation(messages, tools_of(record), place)
    except (BadRow, ValueError) as error:
        why = str(error) if isinstance(error, BadRow) else f"invalid JSON ({error})"
        raise DataError("RW203", f"{place}: {why}. Correct or remove it.") from None


def _lines(source: str) -> list[tuple[str, str]]:
    """(place, line) of each line with text. Only newlines separate lines, not Unicode's other line breaks."""
    lines = enumerate(_read(source).replace("\r\n", "\n").split("\n"), 1)
    found = [(f"{source}, line {number}", line) for number, line in lines if line.strip()]
    if not found:
        raise DataError("RW204", f"{source} holds nothing to answer; give at least one prompt or conversation.")
    return found


def _read(source: str) -> str:
    try:
        content = sys.stdin.buffer.read() if source == STDIN else Path(source).read_bytes()
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError("RW205", f"{source} is not UTF-8 (byte {error.start}); save it as such.") from None
    except OSError as error:
        raise DataError("RW201", f"cannot open {source}: {error.strerror or error}.") from None


# The longest phrase that is looked for, how often it must be at the end, and the characters that this must fill.
PHRASE, TIMES, FILLED = 120, 4, 40
# A loss has settled if it ends below SHARE of the first one and, in the second half of the run, keeps SETTLED of its
# value. It has jumped if it was ever FAR_ABOVE the first one.
SHARE, SETTLED, FAR_ABOVE = 0.5, 0.95, 1.5


def repeated(text: str) -> str | None:
    """The word or short phrase that ``text`` repeats up to its end, which may cut the last one; None without one."""
    for size in range(1, PHRASE + 1):
        end = text[-max(TIMES * size, FILLED) :]
        if len(end) >= max(TIMES * size, FILLED) and end[size:] == end[:-size]:
            # From the beginning of a word.
            return (2 * end[:size])[end[:size].find(" ") + 1 :][:size].strip()
    return None


def cause(adapter: Path, *, base_too: bool) -> str:
    """Why an adapter's answers repeat themselves, as far as the losses beside it tell, and what to do.

    ``base_too``: the base's answers do so, too.
    """
    if base_too:
        return "the base repeats itself too; sample with --temperature 0.7"
    record, lines = record_of(adapter), list(read_metrics(adapter))
    kind = next((name for name in ("eval_loss", "loss") if sum(line.get(name) is not None for line in lines) > 1), None)
    if record is None or record.objective != "sft" or kind is None:
        return "an adapter that repeats itself was trained too little, or its run diverged; see its losses"
    losses = [line[kind] for line in lines if line.get(kind) is not None]
    first, middle, last = losses[0], losses[len(losses) // 2], losses[-1]
    if kind == "eval_loss" and record.eval_loss is not None:
        last = record.eval_loss
    went = f"its {'evaluation' if kind == 'eval_loss' else 'training'} loss went from {first:.2f} to {last:.2f}"
    if max(losses) > FAR_ABOVE * first or last >= first:
        return f"the run diverged: {went}, and up to {max(losses):.2f}; train with a lower --learning-rate"
    if SETTLED * middle <= last <= SHARE * first:
        return f"{went} and settled; ask in the form of the training rows, or sample with --temperature 0.7"
    return f"the run was too short: {went}; raise --max-steps or --epochs, or --learning-rate (auto finds one)"


def note_cut(output: Output, tokens: int, phrase: str | None, which: str = "the answer") -> None:
    how = "not at a stop token" if phrase is None else f"repeating {visible(phrase)!r}"
    output.note(f"{which} ended at the limit of {plural(tokens, 'token')} (--max-new-tokens), {how}")


FORGET, LEAVE = "/new", "/exit"


def talk(settings: GenerateSettings, speaker: Speaker, who: str, output: Output) -> list[Fields]:
    """Talk with ``who`` until the input ends. Returns the messages of the last conversation.

    Raises ConfigError: RW121 for options of single prompts, RW121 without a chat template.
    """
    given = [name for name in ("prompt", "prompt_file", "messages", "compare", "raw") if getattr(settings, name)]
    if given:
        raise ConfigError("RW121", f"--chat answers the lines that you type; leave out {', '.join(map(flag, given))}.")
    if not speaker.wording.chat:
        raise ConfigError(
            "RW121",
            f"a conversation needs a chat template, and {who} has none; give one with --chat-template FILE, or ask "
            "single prompts without --chat.",
        )
    output.line(f"{who}; {FORGET} begins anew, {LEAVE} or Ctrl-D ends.", style="dim")
    return _talk(speaker, settings.system, output)


def _talk(speaker: Speaker, system: str | None, output: Output) -> list[Fields]:
    """Answer line by line."""
    start: list[Fields] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    for said in _typed(output):
        if said == FORGET:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        answer = speaker.say(Conversation(tuple(messages)), _streamer(speaker.tokenizer))
        messages.append({"role": "assistant", "content": answer.text})
        if answer.cut_at is not None:
            note_cut(output, answer.cut_at, repeated(answer.text))
    return messages


def _typed(output: Output) -> Iterator[str]:
    """The user's lines, without empty ones."""
    while True:
        try:
            # `input` allows line editing on a terminal; with --json its prompt must not reach the document.
            said = input("> " if output.is_terminal and sys.stdin.isatty() else "").strip()
            # Depending on the locale, Python reads a wrong byte as half a surrogate pair.
            said.encode()
        except EOFError:
            return
        except UnicodeError:
            raise DataError("RW205", "a line of standard input is not UTF-8; send it as such.") from None
        if said == LEAVE:
            return
        if said:
            yield said


def _streamer(tokenizer: PreTrainedTokenizerBase) -> TextStreamer:
    """A streamer that prints an answer word by word as it is generated."""
    from transformers import TextStreamer

    class Printing(TextStreamer):
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            # A model may write control characters, which would act on the terminal.
            print(visible(text), end="\n" if stream_end else "", flush=True)

    return Printing(tokenizer, skip_prompt=True, skip_special_tokens=True)

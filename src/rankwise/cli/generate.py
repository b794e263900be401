"""``rankwise generate``: answer prompts with a base model, a tuned one, or both side by side.

Answers that repeat themselves up to the limit of new tokens are noted. With ``--chat``, a user talks to a model turn by
turn, through its chat template.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.text import Text

from rankwise.cli.options import Command
from rankwise.data.files import read_text
from rankwise.data.formats import BadRow, conversation, tools_of
from rankwise.data.rows import Message
from rankwise.errors import ConfigError, DataError, RunError, warn
from rankwise.evaluation.settings import LoadingOptions
from rankwise.foreign import Fields, JsonObject, parse_json
from rankwise.objectives import OBJECTIVES
from rankwise.options import flag
from rankwise.records import RunRecord, read_metrics, record_of
from rankwise.reports.numbers import plural, visible
from rankwise.verbs.output import Document, Output, light_table, titled
from rankwise.verbs.settings import GenerateSettings, check_paths, refuse_comparisons

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase, TextStreamer
    from transformers.generation.streamers import BaseStreamer


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


@dataclasses.dataclass(frozen=True)
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


def run(settings: GenerateSettings, output: Output) -> Document:
    if settings.compare and settings.adapter is None:
        raise ConfigError("RW121", "--compare shows base and tuned model side by side; give --adapter FOLDER too.")
    refuse_comparisons([settings.adapter] if settings.adapter is not None else [])
    check_paths(model=settings.model)
    record = record_of(settings.adapter)
    name = settings.model or base_model_name(settings.adapter)

    from rankwise.models.prepared import mapped_files

    conversations = [] if settings.chat else read_conversations(settings)
    with output.waiting(f"loading {name}"):
        speaker, device = load_speaker(settings, name, record)
    files = mapped_files(speaker.model)
    if settings.chat:
        messages = talk(settings, speaker, f"{settings.adapter or name} on {device}", output)
        return {"model": name, "adapter": str(settings.adapter) if settings.adapter else None, "messages": messages}
    asks = [flag(one) for one in ("system", "messages") if getattr(settings, one) is not None]
    if asks and not speaker.is_chat:
        raise ConfigError(
            "RW121",
            f"only a chat template can write {' and '.join(asks)}, and {settings.adapter or name} has none; leave them "
            "out, or give --chat-template FILE.",
        )
    found, symptoms = [], []
    for asked in conversations:
        said = speaker.answers(asked)
        files.check()
        title = asked.prompt if asked.expected is None else f"{asked.prompt}\n  data:  {asked.expected}"
        print_answer(output, title, said)
        found.append(_entry(asked, said))
        if "tuned" in said and said["tuned"].repeats:
            symptoms.append("base" in said and said["base"].repeats is not None)
    symptom = cause(settings.adapter, base_too=all(symptoms)) if settings.adapter and symptoms else None
    if symptom is not None:
        output.note(symptom)
    return {
        "model": name,
        "adapter": str(settings.adapter) if settings.adapter else None,
        "device": device,
        "chat_template": speaker.is_chat,
        "answers": found,
        "symptom": symptom,
    }


def _entry(asked: Conversation, said: Mapping[str, Said]) -> JsonObject:
    return {
        "prompt": asked.prompt,
        "expected": asked.expected,
        **{name: said[name].text if name in said else None for name in ("base", "tuned")},
        "messages": asked.messages if len(asked.messages) > 1 else None,
        "cut_at": {name: one.cut_at for name, one in said.items() if one.cut_at},
        "repeats": {name: one.repeats for name, one in said.items() if one.repeats},
    }


def load_speaker(settings: GenerateSettings, name: str, record: RunRecord | None) -> tuple[Speaker, str]:
    """The model with its adapter, on its device, and the name of the device. It is asked by the template that the user
    gives, else as in training, else by the tokenizer's own template.
    """
    from rankwise.acceleration.generation import stop_ids_of
    from rankwise.data import read_template
    from rankwise.evaluation.engine import LoadOptions, load_as_trained, template_of

    given = settings.model_dump(include=LoadingOptions.model_fields.keys() - {"mmap"})
    options = LoadOptions(**given, mapped=settings.mmap)
    adapters = () if settings.adapter is None else (settings.adapter,)
    loaded = load_as_trained(name, adapters, options, named=settings.model is not None)
    trained = record.data.get("train", {}) if record is not None else {}
    is_plain = settings.chat_template is None and str(trained.get("template", "")).startswith(("no template", "text"))
    template = template_of(adapters) if settings.chat_template is None else read_template(settings.chat_template)
    is_chat = not is_plain and bool(template or loaded.tokenizer.chat_template)
    ends = _ends(template, loaded.tokenizer) if is_chat else set()
    stops = stop_ids_of(loaded.model, loaded.tokenizer, ends)
    ending = str(trained.get("prompt_ending") or "") if is_plain else ""
    models = (loaded.model, loaded.tokenizer, settings, loaded.base_tokenizer)
    return Speaker(*models, is_chat, template, ending, stops), loaded.device


def _ends(template: str | None, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The token by which the chat template ends a turn, which may not be the tokenizer's end of a text."""
    from rankwise.data import Rows
    from rankwise.data.encoding import RowEncoder

    try:
        return RowEncoder(Rows((), "chat", "", "", ""), tokenizer, template).stop_ids()
    except DataError as error:
        # A template that writes no assistant's turn ends none. Other faults show when it writes the prompts.
        if error.code not in ("RW211", "RW212", "RW213"):
            raise
        return set()


def base_model_name(adapter: Path | None) -> str:
    """The base an adapter was trained on. Raises ConfigError (RW121) without one, AdapterError (RW413) if unnamed."""
    if adapter is None:
        raise ConfigError("RW121", "there is nothing to generate with; give --model M, --adapter FOLDER or both.")
    from rankwise.adapters.folder import base_model_of

    return base_model_of(adapter)


def print_answer(output: Output, prompt: str, said: Mapping[str, Said]) -> None:
    """Print the answer; of two models, side by side on a terminal, else as labelled lines. Notes what the limit cut."""
    if len(said) == 1:
        output.line(visible(prompt), style="bold")
        output.line(visible(next(iter(said.values())).text))
        output.line()
    elif output.is_terminal:
        table = light_table(gap=4, expand=True)
        for name, style in (("base", None), ("tuned", "green")):
            table.add_column(name, ratio=1, style=style)
        table.add_row(Text(visible(said["base"].text)), Text(visible(said["tuned"].text)))
        output.console.print(titled(visible(prompt), table))
    else:
        lines = (prompt, f"  base:  {said['base'].text}", f"  tuned: {said['tuned'].text}", "")
        output.line(visible("\n".join(lines)))
    for name, one in said.items():
        note_cut(output, one, f"the {name} answer" if len(said) > 1 else "the answer")


COMMAND = Command(
    name="generate",
    settings=GenerateSettings,
    run=run,
    summary="Answer prompts with a base model, a tuned one, or both side by side.",
    examples=(
        'rankwise generate --model demo --prompt "What is a list in Python?"',
        'rankwise generate --adapter runs/first --prompt "Hello" --compare',
        'rankwise generate --model demo --messages chat.json --system "Be brief."',
        "rankwise generate --adapter runs/first --chat",
    ),
)


def read_conversations(settings: GenerateSettings) -> list[Conversation]:
    """Everything to answer, in order: the prompts, then the conversations.

    Raises ConfigError (RW121) if there is nothing to answer, or for a second system message; DataError: RW201 or RW205
    for a file that cannot be read, RW203 for an entry that is no conversation.
    """
    found = [Conversation(({"role": "user", "content": text},)) for text in settings.prompt]
    found += _conversations(settings.messages) if settings.messages else []
    if not found:
        raise ConfigError("RW121", "there is nothing to answer; give --prompt TEXT or --messages FILE.")
    if settings.system is None:
        return found
    if own := [one.place for one in found if any(message["role"] == "system" for message in one.messages)]:
        raise ConfigError("RW121", f"{own[0]} has a system message of its own; leave --system or that message out.")
    system = {"role": "system", "content": settings.system}
    return [dataclasses.replace(one, messages=(system, *one.messages)) for one in found]


def _conversations(path: Path) -> list[Conversation]:
    """The conversation of a JSON file, or those of JSON lines."""
    text = read_text(path)
    if path.suffix != ".jsonl":
        return [_conversation(str(path), text)]
    lines = enumerate(text.split("\n"), 1)
    return [_conversation(f"{path}, line {number}", line) for number, line in lines if line.strip()]


def _conversation(place: str, text: str) -> Conversation:
    """A list of messages, or an object with ``messages``: a row of data, whose last turn may be the answer."""
    try:
        record, answer = parse_json(text), None
        is_row = isinstance(record, dict)
        if isinstance(record, list):
            record = {"messages": record}
        if not isinstance(record, dict):
            raise BadRow(f"expected a list of messages or an object with `messages`, found {str(record)[:40]!r}")
        messages = conversation(record)
        if is_row and len(messages) > 1 and messages[-1]["role"] == "assistant":
            *before, answer = messages
            messages = tuple(before)
        if messages[-1]["role"] not in ("user", "tool"):
            raise BadRow(f"expected a `user` or `tool` message to answer at the end, found `{messages[-1]['role']}`")
        return Conversation(messages, tools_of(record), place, answer)
    except (BadRow, ValueError) as error:
        why = str(error) if isinstance(error, BadRow) else f"invalid JSON ({error})"
        raise DataError("RW203", f"{place}: {why}. Correct or remove it.") from None


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
    if record is None or not OBJECTIVES[record.objective].of_demonstrations or kind is None:
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


def note_cut(output: Output, said: Said, which: str = "the answer") -> None:
    if said.cut_at is not None:
        how = "not at a stop token" if said.repeats is None else f"repeating {visible(said.repeats)!r}"
        output.note(f"{which} ended at the limit of {plural(said.cut_at, 'token')} (--max-new-tokens), {how}")


FORGET, LEAVE = "/new", "/exit"


def talk(settings: GenerateSettings, speaker: Speaker, who: str, output: Output) -> list[Fields]:
    """Talk with ``who`` until the input ends. Returns the messages of the last conversation.

    Raises ConfigError: RW121 for options of single prompts, RW121 without a chat template.
    """
    given = [name for name in ("prompt", "messages", "compare") if getattr(settings, name)]
    if given:
        raise ConfigError("RW121", f"--chat answers the lines that you type; leave out {', '.join(map(flag, given))}.")
    if not speaker.is_chat:
        raise ConfigError(
            "RW121",
            f"a conversation needs a chat template, and {who} has none; give one with --chat-template FILE, or ask "
            "single prompts without --chat.",
        )
    output.line(f"{who}; {FORGET} begins anew, {LEAVE} or Ctrl-D ends.", style="dim")
    start: list[Fields] = [] if settings.system is None else [{"role": "system", "content": settings.system}]
    messages = list(start)
    for said in _typed(output):
        if said == FORGET:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        answer = speaker.say(Conversation(tuple(messages)), _streamer(speaker.tokenizer))
        messages.append({"role": "assistant", "content": answer.text})
        note_cut(output, answer)
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

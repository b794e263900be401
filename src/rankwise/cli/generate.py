"""``rankwise generate``: answer prompts with a base model, a tuned one, or both side by side.

Answers that repeat themselves up to the limit of new tokens are noted. With ``--chat``, a user talks to a model turn by
turn, through its chat template.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rich.text import Text

from rankwise.cli.options import Command
from rankwise.data.files import read_text
from rankwise.data.formats import BadRow, conversation, tools_of
from rankwise.errors import ConfigError, DataError
from rankwise.foreign import Fields, JsonObject, parse_json
from rankwise.objectives import OBJECTIVES
from rankwise.options import flag
from rankwise.records import read_metrics, record_of
from rankwise.reports.numbers import plural, visible
from rankwise.verbs.output import Document, Output, light_table, titled
from rankwise.verbs.settings import GenerateSettings, check_paths, refuse_comparisons
from rankwise.verbs.speaker import Conversation, Said, Speaker, load_speaker

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer


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


# A loss has settled if it ends below SHARE of the first one and, in the second half of the run, keeps SETTLED of its
# value. It has jumped if it was ever FAR_ABOVE the first one.
SHARE, SETTLED, FAR_ABOVE = 0.5, 0.95, 1.5


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

"""``rankwise generate --chat``: talk to a model in the terminal, turn by turn, through its chat template."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rankwise.cli.output import Output
from rankwise.cli.repetition import note_cut, repeated
from rankwise.cli.settings import GenerateSettings
from rankwise.cli.words import printable
from rankwise.errors import ConfigError, DataError
from rankwise.foreign import Fields
from rankwise.options import flag

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, TextStreamer

    from rankwise.cli.generate import Speaker

FORGET, LEAVE = "/new", "/exit"


def talk(settings: GenerateSettings, speaker: Speaker, who: str, output: Output) -> list[Fields]:
    """Talk with ``who`` until the input ends. Returns the messages of the last conversation.

    Raises ConfigError: RW121 for options of single prompts, RW754 without a chat template.
    """
    given = [name for name in ("prompt", "prompt_file", "messages", "compare", "raw") if getattr(settings, name)]
    if given:
        raise ConfigError("RW121", f"--chat answers the lines that you type; leave out {', '.join(map(flag, given))}.")
    if not speaker.wording.chat:
        raise ConfigError(
            "RW754",
            f"a conversation needs a chat template, and {who} has none; give one with --chat-template FILE, or ask "
            "single prompts without --chat.",
        )
    output.line(f"{who}; {FORGET} begins anew, {LEAVE} or Ctrl-D ends.", style="dim")
    return _talk(speaker, settings.system, output)


def _talk(speaker: Speaker, system: str | None, output: Output) -> list[Fields]:
    """Answer line by line."""
    # Imports the formats of data, which the help of all verbs does not need.
    from rankwise.cli.conversations import Conversation

    start: list[Fields] = [] if system is None else [{"role": "system", "content": system}]
    messages = list(start)
    for said in _lines(output):
        if said == FORGET:
            messages = list(start)
            continue
        messages.append({"role": "user", "content": said})
        answer = speaker.say(Conversation(tuple(messages)), _streamer(speaker.tokenizer))
        messages.append({"role": "assistant", "content": answer.text})
        if answer.cut_at is not None:
            note_cut(output, answer.cut_at, repeated(answer.text))
    return messages


def _lines(output: Output) -> Iterator[str]:
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
            print(printable(text), end="\n" if stream_end else "", flush=True)

    return Printing(tokenizer, skip_prompt=True, skip_special_tokens=True)

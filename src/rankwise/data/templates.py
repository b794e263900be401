"""A row as text: pieces that are trained on and pieces that are not.

With a chat template, the trained pieces are the assistant's turns, each with its stop token. A template that marks
them itself (``{% generation %}``) is taken at its word; for any other the turn is what ``messages[:i+1]`` adds to
``messages[:i]`` with the generation prompt, and a template for which that is not so is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.data.rows import Message, Row, Rows
from rankwise.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

GENERATION_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
GENERATION_TAGS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
PROBE_ANSWER = "probed answer"
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a row's text, and whether its tokens are in the loss."""

    text: str
    trained: bool


@dataclasses.dataclass(frozen=True, slots=True)
class Rendered:
    """A row before tokenization."""

    segments: tuple[Segment, ...]
    opened: bool
    # The tokenizer's own first token (a BOS, where it has one) goes in front: no template wrote it.
    closed: bool
    # The tokenizer's end-of-sequence token goes behind and is trained on: the text does not end with a stop token.


def read_template(path: Path) -> str:
    """The Jinja text of ``--chat-template``. Raises DataError RW211 when it cannot be read or parsed."""
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
        # transformers adds the generation tag to Jinja; for the parse alone it can go.
        plain = GENERATION_TAGS.sub("", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except UnicodeDecodeError:
        raise DataError("RW211", f"the chat template {path} is not UTF-8; save it as such.") from None
    except OSError as error:
        reason = (error.strerror or "no reason given").lower()
        raise DataError("RW211", f"cannot read the chat template {path}: {reason}; give a Jinja file.") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError("RW211", f"the chat template {path}, line {error.lineno}: {error.message}.") from None
    return text


def renderer(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> tuple[str, Callable[[Row], Rendered]]:
    """How rows of this kind are written for this tokenizer: the name of the way, and the function.

    Raises DataError RW210 for chat rows where there is no template, RW213 where no stop token is known.
    """
    has_template = bool(chat_template or tokenizer.chat_template)
    if rows.kind == "chat" and not has_template:
        raise DataError(
            "RW210",
            f"{rows.source} holds chat messages and the tokenizer has no chat template; give the model's own with "
            "--chat-template FILE, or take the instruction-tuned variant of the model.",
        )
    if has_template and (rows.kind == "chat" or (rows.kind == "prompt" and rows.uses_template)):
        whose = "the one given" if chat_template else "the tokenizer's"
        return f"chat template ({whose})", ChatRenderer(tokenizer, chat_template)
    if tokenizer.eos_token is None:
        raise DataError(
            "RW213",
            "the tokenizer has no end-of-sequence token, so the model could not learn to stop; "
            "set `eos_token` in its tokenizer_config.json.",
        )
    if rows.kind == "text":
        return "text, trained on whole", functools.partial(_plain_text, eos_token=tokenizer.eos_token)
    between = f" + {rows.separator!r} + " if rows.separator else " + "
    name = f"no template: prompt{between}completion"
    return name, functools.partial(_plain_pair, separator=rows.separator, eos_token=tokenizer.eos_token)


def _plain_text(row: Row, *, eos_token: str) -> Rendered:
    return Rendered((Segment(row.text, True),), opened=True, closed=not row.text.endswith(eos_token))


def _plain_pair(row: Row, *, separator: str, eos_token: str) -> Rendered:
    segments = (Segment(row.prompt + separator, False), Segment(row.completion, True))
    return Rendered(segments, opened=True, closed=not row.completion.endswith(eos_token))


class ChatRenderer:
    """Rows through a chat template. ``stop`` is the special token that ends an assistant's turn, if one does."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def __call__(self, row: Row) -> Rendered:
        messages, tools = _conversation(row), list(row.tools) if row.tools else None
        template = self._template(tools, row.place)
        if GENERATION_MARK.search(template):
            text, spans = self._marked_spans(template, messages, tools, row)
        else:
            text, spans = self._grown_spans(messages, tools, row)
        if not spans:
            raise DataError("RW212", f"{row.place}: the chat template marks no assistant text in this row.")
        spans = [(start, self._turn_end(text, start, end)) for start, end in spans]
        closed = self.stop is None and spans[-1][1] == len(text)
        return Rendered(_segments(text, spans), opened=False, closed=closed)

    @functools.cached_property
    def stop(self) -> str | None:
        """The first special token that the template writes behind an assistant's text."""
        probe: list[Message] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": PROBE_ANSWER},
        ]
        text = self._render(probe, None, "a sample exchange", generation_prompt=False)
        if PROBE_ANSWER not in text:
            raise DataError(
                "RW212",
                "the chat template leaves the assistant's text out (those of vision models want another form of "
                "message); give one for plain text by --chat-template FILE.",
            )
        added = self.tokenizer.added_tokens_decoder.values()
        specials = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        ends = sorted(specials, key=len, reverse=True)
        found = re.search("|".join(map(re.escape, ends)), text.rpartition(PROBE_ANSWER)[2]) if ends else None
        if found:
            return found.group()
        if self.tokenizer.eos_token is None:
            raise DataError(
                "RW213",
                "neither the chat template nor the tokenizer has a token that ends an answer, so the model could "
                "not learn to stop; set `eos_token` in its tokenizer_config.json.",
            )
        return None

    def _template(self, tools: list[Any] | None, place: str) -> str:
        try:
            return self.tokenizer.get_chat_template(self.chat_template, tools)
        except ValueError as error:
            raise DataError("RW210", f"{place}: no chat template fits: {_one_line(error)}") from None

    def _render(
        self, messages: Sequence[Message], tools: list[Any] | None, place: str, *, generation_prompt: bool
    ) -> str:
        import jinja2

        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError("RW211", f"{place}: the chat template refuses it: {_one_line(error)}") from None
        return str(text)

    def _marked_spans(
        self, template: str, messages: Sequence[Message], tools: list[Any] | None, row: Row
    ) -> tuple[str, list[Span]]:
        import jinja2
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            # Annotated as str, but it gives the texts and, with the mask, the marked character spans.
            render: Any = render_jinja_template
            texts, spans = render(
                [[dict(message) for message in messages]],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise DataError("RW211", f"{row.place}: the chat template refuses it: {_one_line(error)}") from None
        start = len(self._before(texts[0], messages, tools, row, row.first_trained)) if row.first_trained else 0
        return texts[0], [span for span in spans[0] if span[1] > start]

    def _grown_spans(self, messages: Sequence[Message], tools: list[Any] | None, row: Row) -> tuple[str, list[Span]]:
        text = self._render(messages, tools, row.place, generation_prompt=False)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index < row.first_trained:
                continue
            start = len(self._before(text, messages, tools, row, index))
            end = len(text)
            if index + 1 < len(messages):
                end = self._turn_border(text, start, messages, tools, row, index)
            spans.append((start, end))
        return text, spans

    def _turn_border(
        self,
        text: str,
        start: int,
        messages: Sequence[Message],
        tools: list[Any] | None,
        row: Row,
        index: int,
    ) -> int:
        """Where the answer ``messages[index]``, which starts at ``start``, ends in ``text``."""
        grown = self._render(messages[: index + 1], tools, row.place, generation_prompt=False)
        if text.startswith(grown):
            return len(grown)
        # Templates that close a conversation, or drop the reasoning of earlier turns, write the turn differently
        # when it is the last. Where its own words and the stop token follow each other, they show its end.
        content, stop = messages[index]["content"].strip(), self.stop
        end = text.find(content, start) + len(content)
        if stop and content and end >= start + len(content) and text[end:].lstrip().startswith(stop):
            return text.index(stop, end) + len(stop)
        return len(_prefix(grown, text, row, index))

    def _before(self, text: str, messages: Sequence[Message], tools: list[Any] | None, row: Row, index: int) -> str:
        """The text in front of the answer ``messages[index]``, as generation would see it."""
        if index == 0:
            raise DataError(
                "RW212",
                f"{row.place}: the first message is the assistant's, and the chat template does not mark where it "
                "starts; begin with a user message, or give a template with {% generation %} marks.",
            )
        before = self._render(messages[:index], tools, row.place, generation_prompt=True)
        return _prefix(before, text, row, index)

    def _turn_end(self, text: str, start: int, end: int) -> int:
        """Up to the stop token of the turn: what the template writes behind it the model never generates."""
        if self.stop is None:
            return end
        inside = text.rfind(self.stop, start, end)
        if inside >= 0:
            return inside + len(self.stop)
        behind = end + len(text[end:]) - len(text[end:].lstrip())
        return behind + len(self.stop) if text.startswith(self.stop, behind) else end


def _conversation(row: Row) -> Sequence[Message]:
    if row.kind == "chat":
        return row.messages
    return ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion})


def _prefix(part: str, whole: str, row: Row, index: int) -> str:
    if whole.startswith(part):
        return part
    at = next((place for place, (a, b) in enumerate(zip(part, whole)) if a != b), min(len(part), len(whole)))
    raise DataError(
        "RW212",
        f"{row.place}: what the chat template writes up to message {index + 1} is not how it begins the whole "
        f"conversation ({part[at : at + 30]!r} becomes {whole[at : at + 30]!r}), so the assistant's text cannot be "
        "told apart; give a template with {% generation %} marks by --chat-template FILE.",
    )


def _segments(text: str, spans: Sequence[Span]) -> tuple[Segment, ...]:
    segments, position = [], 0
    for start, end in spans:
        segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    segments.append(Segment(text[position:], False))
    return tuple(segment for segment in segments if segment.text)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") + "."

"""Format rows as text, in trained and untrained segments.

With a chat template, the trained segments are the assistant's turns, each with its stop token. A template with ``{%
generation %}`` marks defines the assistant's text. For any other template, a turn is the text that ``messages[:i+1]``
adds to ``messages[:i]`` with the generation prompt. A template for which this does not hold is refused.

Arguments of tool calls are given as objects, which transformers asks templates to expect, or else as JSON text.

A row of which the template omits a part is refused: each part's words must occur in the rendered text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.data.rows import Message, Row, Rows
from rankwise.errors import DataError, one_line
from rankwise.foreign import Fields, Json

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
    # Whether the tokenizer's BOS token, if it has one, is put before the text, since no template wrote it.
    opened: bool
    # Whether the EOS token is appended and trained, since the text does not end with a stop token.
    closed: bool

    @property
    def characters(self) -> int:
        return sum(len(segment.text) for segment in self.segments)


class RowRefused(DataError):
    """A row that cannot be formatted, while others may be. The message does not name the row."""


def read_template(path: Path) -> str:
    """The Jinja text of ``--chat-template``. Raises DataError RW211 when it cannot be read or parsed."""
    import jinja2

    try:
        text = path.read_text(encoding="utf-8")
        # transformers adds the generation tag to Jinja; the parse does not need it.
        plain = GENERATION_TAGS.sub("", text)
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError("RW211", f"cannot read the chat template {path} ({one_line(error)}); give UTF-8.") from None
    except jinja2.TemplateSyntaxError as error:
        raise DataError("RW211", f"the chat template {path}, line {error.lineno}: {error.message}.") from None
    return text


def renderer(
    rows: Rows, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> tuple[str, Callable[[Row], Rendered]]:
    """(name of the way in which rows of this kind are formatted for this tokenizer, function that formats a row).

    Raises DataError RW210 for chat rows without a template, RW213 if no stop token is known.
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
    """Writes rows through a chat template.

    ``stop`` is what ends an assistant's turn, if anything does: a special token, or several in a row, of which the last
    is the stop token. transformers runs templates in Jinja's sandbox, without limits of time or memory.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None) -> None:
        self.tokenizer = tokenizer
        self.chat_template = chat_template

    def __call__(self, row: Row) -> Rendered:
        tools = list(row.tools) if row.tools else None
        template = self._template(tools)
        write = functools.partial(self._render, tools=tools, generation_prompt=False)
        messages = suit_arguments(_conversation(row), write)
        marked: list[Span] | None = None
        if GENERATION_MARK.search(template):
            text, marked = self._marked(template, messages, tools)
        else:
            text = self._render(messages, tools, generation_prompt=False)
        refuse_left_out(messages, tools, text)
        if marked is None:
            spans = self._grown_spans(text, messages, tools, row.first_trained)
        else:
            first = row.first_trained
            start = len(self._before(text, messages, tools, first)) if first else 0
            spans = [span for span in marked if span[1] > start]
        spans = self._whole_turns(text, spans, are_marked=marked is not None)
        if not any(start < end for start, end in spans):
            raise RowRefused("RW212", "the chat template marks no assistant text in this row")
        closed = self.stop is None and spans[-1][1] == len(text)
        return Rendered(_segments(text, spans), opened=False, closed=closed)

    @functools.cached_property
    def stop(self) -> str | None:
        """The first special tokens that the template writes after an assistant's text, wherever the text is."""
        probe: list[Message] = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": PROBE_ANSWER},
        ] * 2
        try:
            text = self._render(probe, None, generation_prompt=False)
        except RowRefused as error:
            raise DataError(error.code, f"a sample exchange: {error.message}.") from None
        _, *behind = text.split(PROBE_ANSWER)
        if not behind:
            raise DataError(
                "RW212",
                "the chat template leaves the assistant's text out (those of vision models want a different form of "
                "message); give one for plain text by --chat-template FILE.",
            )
        runs = list(map(self._first_specials, behind))
        # After the last answer a token may close the conversation, and after any other the next turn opens.
        common = itertools.takewhile(lambda tokens: len(set(tokens)) == 1, zip(*runs))
        if found := "".join(tokens[0] for tokens in common) or "".join(runs[-1][:1]):
            return found
        if self.tokenizer.eos_token is None:
            raise DataError(
                "RW213",
                "neither the chat template nor the tokenizer has a token that ends an answer, so the model could "
                "not learn to stop; set `eos_token` in its tokenizer_config.json.",
            )
        return None

    @functools.cached_property
    def _specials(self) -> tuple[str, ...]:
        added = self.tokenizer.added_tokens_decoder.values()
        found = {token.content for token in added if token.special} | set(self.tokenizer.all_special_tokens)
        return tuple(sorted(found, key=len, reverse=True))

    def _first_specials(self, text: str) -> list[str]:
        """The special tokens that directly follow each other from the first one on."""
        one = "|".join(map(re.escape, self._specials))
        run = re.search(f"(?:{one})+", text)
        return re.findall(one, run.group()) if run else []

    def _template(self, tools: Tools) -> str:
        try:
            return self.tokenizer.get_chat_template(self.chat_template, tools)
        except ValueError as error:
            raise DataError("RW210", f"no chat template fits: {one_line(error)}.") from None

    def _render(self, messages: Sequence[Message], tools: Tools, *, generation_prompt: bool) -> str:
        with _refusals():
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=tools,
                chat_template=self.chat_template,
                add_generation_prompt=generation_prompt,
                tokenize=False,
            )
            return _encodable(str(text))

    def _marked(self, template: str, messages: Sequence[Message], tools: Tools) -> tuple[str, list[Span]]:
        from transformers.utils.chat_template_utils import render_jinja_template

        with _refusals():
            # Annotated as str, but it gives the texts and, with the mask, the marked character spans.
            render: Any = render_jinja_template
            texts, spans = render(
                [[dict(message) for message in messages]],
                tools=tools,
                chat_template=template,
                return_assistant_tokens_mask=True,
                **self.tokenizer.special_tokens_map,
            )
            return _encodable(texts[0]), spans[0]

    def _grown_spans(self, text: str, messages: Sequence[Message], tools: Tools, first_trained: int) -> list[Span]:
        """The spans of the answers, found by rendering the conversation up to each of them."""
        spans: list[Span] = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant" and index >= first_trained:
                start, is_last = len(self._before(text, messages, tools, index)), index + 1 == len(messages)
                spans.append((start, len(text) if is_last else self._turn_border(text, start, messages, tools, index)))
        return spans

    def _turn_border(self, text: str, start: int, messages: Sequence[Message], tools: Tools, index: int) -> int:
        """The end in ``text`` of the answer ``messages[index]``, which starts at ``start``."""
        grown = self._render(messages[: index + 1], tools, generation_prompt=False)
        if text.startswith(grown):
            return len(grown)
        # Templates that close a conversation, or drop the reasoning of earlier turns, write the turn differently
        # when it is the last. Where its own words and the stop token follow each other, they show its end.
        content, stop = messages[index]["content"].strip(), self.stop
        end = text.find(content, start) + len(content)
        if stop and content and end >= start + len(content) and text[end:].lstrip().startswith(stop):
            return text.index(stop, end) + len(stop)
        return len(_prefix(grown, text, index))

    def _before(self, text: str, messages: Sequence[Message], tools: Tools, index: int) -> str:
        """The text before the answer ``messages[index]``, as at generation."""
        if index == 0:
            raise RowRefused(
                "RW212",
                "the first message is the assistant's, and the chat template does not mark where it starts (begin "
                "with a user message, or mark it)",
            )
        before = self._render(messages[:index], tools, generation_prompt=True)
        return _prefix(before, text, index)

    def _whole_turns(self, text: str, spans: Sequence[Span], *, are_marked: bool) -> list[Span]:
        """Each span extended to its stop token. Some templates write the stop token outside their generation marks."""
        turns: list[Span] = []
        for start, end in spans:
            free = max(start, turns[-1][1]) if turns else start
            if free < end or not turns:
                turns.append((free, self._turn_end(text, free, end, is_marked=are_marked)))
        return turns

    def _turn_end(self, text: str, start: int, end: int, *, is_marked: bool) -> int:
        """The end of the turn's stop token. The model never generates what the template writes after it."""
        if self.stop is None:
            return end
        inside = text.rfind(self.stop, start, end)
        if inside >= 0:
            # The template's own marks win.
            return end if is_marked else inside + len(self.stop)
        behind = end + len(text[end:]) - len(text[end:].lstrip())
        return behind + len(self.stop) if text.startswith(self.stop, behind) else end


def chat_text(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Message] | None = None,
    *,
    chat_template: str | None = None,
    place: str = "the prompt",
) -> str:
    """The conversation up to the point where an answer would start.

    Raises DataError RW211, RW221 with ``place``.
    """
    render = functools.partial(ChatRenderer(tokenizer, chat_template)._render, generation_prompt=True)
    offered = list(tools) if tools else None
    try:
        asked = suit_arguments(messages, functools.partial(render, tools=offered))
        text = render(asked, offered)
        refuse_left_out(asked, offered, text)
    except RowRefused as error:
        raise DataError(error.code, f"{place}: {error.message}.") from None
    return text


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Raise any error of a template but a lack of memory as RowRefused."""
    import jinja2

    try:
        yield
    except (MemoryError, DataError):
        raise
    except jinja2.TemplateSyntaxError as error:
        raise DataError("RW211", f"the chat template, line {error.lineno}: {one_line(error)}.") from None
    except Exception as error:  # noqa: BLE001  a template may raise anything
        raise RowRefused("RW211", f"the chat template refuses it: {one_line(error)}") from None


def _encodable(text: str) -> str:
    """The text unchanged. Raises UnicodeEncodeError for a lone surrogate, which is not a character."""
    text.encode()
    return text


def _conversation(row: Row) -> Sequence[Message]:
    if row.kind == "chat":
        return row.messages
    return ({"role": "user", "content": row.prompt}, {"role": "assistant", "content": row.completion})


def _prefix(part: str, whole: str, index: int) -> str:
    if whole.startswith(part):
        return part
    at = next((place for place, (a, b) in enumerate(zip(part, whole)) if a != b), min(len(part), len(whole)))
    raise RowRefused(
        "RW212",
        f"what the chat template writes up to message {index + 1} is not how it begins the whole conversation "
        f"({part[at : at + 30]!r} becomes {whole[at : at + 30]!r}), so the assistant's text cannot be told apart",
    )


def _segments(text: str, spans: Sequence[Span]) -> tuple[Segment, ...]:
    segments, position = [], 0
    for start, end in spans:
        segments += [Segment(text[position:start], False), Segment(text[start:end], True)]
        position = end
    segments.append(Segment(text[position:], False))
    return tuple(segment for segment in segments if segment.text)


def suit_arguments(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> Sequence[Message]:
    """The conversation with the arguments of its calls as objects; as JSON text where the template refuses objects
    (DeepSeek), or writes them as Python does.
    """
    if not any(message.get("tool_calls") for message in messages):
        return messages
    objects, texts = ([_with_arguments(message, form) for message in messages] for form in (_object, _json))
    try:
        text = render(objects)
    except DataError:
        return texts
    given = [function_of(call).get("arguments") for message in objects for call in message.get("tool_calls") or ()]
    return texts if any(str(item) in text and str(item) != _json(item) for item in given if item) else objects


def _with_arguments(message: Message, form: Callable[[Json], Json]) -> Message:
    calls = []
    for call in message.get("tool_calls") or ():
        function = function_of(call)
        changed = {**function, "arguments": form(function.get("arguments"))} if function.get("arguments") else call
        calls.append({**call, "function": changed} if function is not call and changed is not call else changed)
    return {**message, "tool_calls": calls} if calls else message


def _object(arguments: Json) -> Json:
    """The object of a JSON text; anything else unchanged."""
    try:
        parsed = json.loads(arguments) if isinstance(arguments, str) else arguments
    except (ValueError, RecursionError):
        return arguments
    return parsed if isinstance(parsed, Mapping) else arguments


def _json(value: Json) -> str:
    """The value as the filter tojson of transformers' templates writes it; a text unchanged."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# transformers' type of tools.
Tools = list[Any] | None
# Names for the reasoning of a message; transformers passes the first two to every template.
REASONING = ("reasoning_content", "thinking", "reasoning")
# Templates trim and indent, and write text as JSON.
REWRITTEN = re.compile(r"\\[nrt]|[\s\\]")
# What may stand between reasoning inside the ``content`` and the answer.
END_OF_THOUGHT = re.compile(r"</[^<>]*>|\n")


def refuse_left_out(messages: Sequence[Message], tools: Tools, text: str) -> None:
    """Raise RowRefused (RW221) for parts of a conversation whose words are missing in its ``text``."""
    written = _plain(text)
    lost = [name for name, words in _parts(messages, tools) if _plain(str(words or "")) not in written]
    if lost:
        raise RowRefused("RW221", f"the chat template leaves out {', '.join(dict.fromkeys(lost))}")


def _parts(messages: Sequence[Message], tools: Tools) -> Iterator[tuple[str, object]]:
    """(name, words) of each part that a template must write. Templates may drop the reasoning of earlier answers."""
    yield from (("`tools`", function_of(tool).get("name")) for tool in tools or ())
    last = max((index for index, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
    for index, message in enumerate(messages):
        place, content = f"of message {index + 1}", message["content"]
        is_earlier = message["role"] == "assistant" and index < last
        yield f"the `content` {place}", END_OF_THOUGHT.split(content.strip())[-1] if is_earlier else content
        if (thought := next((key for key in REASONING if message.get(key)), None)) and not is_earlier:
            yield f"the `{thought}` {place}", message[thought]
        for call in message.get("tool_calls") or ():
            yield f"`tool_calls` {place}", function_of(call).get("name")


def function_of(call: Json) -> Fields:
    """The part that names the function: the call itself, or its `function` field in OpenAI's form."""
    inner = call.get("function", call) if isinstance(call, Mapping) else None
    return inner if isinstance(inner, Mapping) else {}


def _plain(text: str) -> str:
    return REWRITTEN.sub("", text)

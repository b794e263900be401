"""The layouts of rows with images, as in TRL's documentation: a conversation and a column of images."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from rankwise.data.formats import (
    ROLES,
    BadRow,
    Format,
    Record,
    check_weights,
    encodable,
    is_number,
    quoted,
    tools_of,
)
from rankwise.data.left_out import CALLS, REASONING
from rankwise.data.rows import Message, Rows
from rankwise.foreign import JsonObject


def _with_images(column: str, rest: tuple[str, ...]) -> Callable[[Record], JsonObject]:
    """A reader of rows with the images of ``column``: the conversation in parts, as TRL's collator takes it.

    ``rest``: the column of messages, or those of the prompt and the completion.
    """

    def fields(record: Record) -> JsonObject:
        found = record.get(column) or []
        images = tuple(_image(item, column) for item in (found if isinstance(found, list) else [found]))
        if tools_of(record):
            raise BadRow("expected no `tools` beside images, which the model would not see")
        parts = [_as_messages(record.get(name), role) for name, role in zip(rest, ("user", "assistant"))]
        messages = [message for part in parts for message in part] if all(parts) else None
        return {"messages": _in_parts(messages, len(images)), "images": images}

    return fields


def _as_messages(value: object, role: str) -> list[object]:
    """A list of messages, or a text as one message; empty for anything else."""
    if isinstance(value, str) or is_number(value):
        return [{"role": role, "content": str(value)}]
    return value if isinstance(value, list) else []


def _image(item: object, column: str) -> str | bytes:
    """A path, or the bytes of a file: written plainly, or in the form of ``datasets``."""
    found = (item.get("bytes") or item.get("path")) if isinstance(item, Mapping) else item
    if not isinstance(found, str | bytes) or not found:
        raise BadRow(f"expected paths or bytes of images in `{column}`, found {str(item)[:40]!r}")
    return found


def _in_parts(messages: object, images: int) -> tuple[Message, ...]:
    """The messages with a list of parts as their contents; of plain texts the first question gets all images.

    A part has both fields, because tables write missing ones as null, which templates would print.
    """
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise BadRow(f"expected a conversation (a list of messages) beside the images, found {str(messages)[:40]!r}")
    roles = [message.get("role") for message in messages]
    if roles.count("assistant") != 1 or roles[-1] != "assistant":
        raise BadRow(
            f"expected one `assistant` message, the last, beside images, found {', '.join(map(str, roles)) or 'none'}"
        )
    is_plain = all(isinstance(message.get("content"), str) for message in messages)
    found: list[Message] = []
    for number, message in enumerate(messages, 1):
        place, content = f"message {number}", message.get("content")
        if message["role"] not in ROLES:
            raise BadRow(f"expected one of {', '.join(ROLES)} as `role` of {place}, found {message['role']!r}")
        if lost := [key for key in (*CALLS, *REASONING) if message.get(key)]:
            raise BadRow(f"expected no {quoted(lost)} in {place} beside images, which the model would not see")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if is_plain and message["role"] == "user" and number == roles.index("user") + 1:
            parts = [{"type": "image"}] * images + list(parts or [])
        found.append({"role": message["role"], "content": [_part(part, place) for part in parts or []]})
    placed = sum(part["type"] == "image" for message in found for part in message["content"])
    if placed != images:
        raise BadRow(f"expected a part of the type `image` for each image, found {placed} for {images}")
    check_weights(messages[-1], "the answer")
    if any(part["type"] == "image" for part in found[-1]["content"]):
        raise BadRow("expected text alone in the answer, found a part of the type `image`")
    if not any(part["text"].strip() for part in found[-1]["content"]):
        raise BadRow("expected text in the answer, found none to train on")
    return tuple(found)


def _part(part: object, place: str) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    text = part.get("text") if isinstance(part, Mapping) and kind == "text" else ""
    if kind not in ("image", "text") or not isinstance(text, str):
        raise BadRow(f"expected parts of the types `text` and `image` in {place}, found {str(part)[:40]!r}")
    return {"type": kind, "text": encodable(text, f"`content` of {place}")}


def image_format(column: str, rest: tuple[str, ...]) -> Format:
    """The layout of the images in ``column`` beside messages, or beside a prompt and a completion."""
    return Format(f"images ({', '.join((column, *rest))})", "images", rest, _with_images(column, rest), marks=(column,))


IMAGE_COLUMNS = ("images", "image")
# Tried before the text layouts, whose columns they include.
IMAGE_FORMATS: Collection[Format] = tuple(
    image_format(column, rest) for column in IMAGE_COLUMNS for rest in (("messages",), ("prompt", "completion"))
)


def with_files(rows: Rows, folder: Path) -> Rows:
    """The rows with image paths relative to ``folder`` resolved, and a hash that covers the existing images."""
    digest, items = hashlib.sha256(rows.sha256.encode()), []
    for row in rows:
        images = tuple(str(folder / image) if isinstance(image, str) else image for image in row.images)
        for image in images:
            if isinstance(image, str) and Path(image).is_file():
                digest.update(hashlib.sha256(Path(image).read_bytes()).digest())
        items.append(dataclasses.replace(row, images=images))
    return dataclasses.replace(rows, items=items, sha256=digest.hexdigest())

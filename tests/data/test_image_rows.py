"""Rows with images, in every layout, and what is said of bad ones."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.data import rows_from_records
from rankwise.errors import DataError

USER, ANSWER = {"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a cat"}
IMAGE = {"type": "image"}


def text(content: str) -> dict[str, str]:
    return {"type": "text", "text": content}


PARTS = ({"role": "user", "content": [IMAGE, text("what is it?")]}, {"role": "assistant", "content": [text("a cat")]})


@pytest.mark.parametrize(
    ("record", "images"),
    [
        ({"images": ["a.png"], "messages": [USER, ANSWER]}, ("a.png",)),
        ({"image": "a.png", "messages": [USER, ANSWER]}, ("a.png",)),
        ({"image": {"bytes": None, "path": "a.png"}, "messages": [USER, ANSWER]}, ("a.png",)),
        ({"images": [{"bytes": b"png", "path": "a.png"}], "prompt": "what is it?", "completion": "a cat"}, (b"png",)),
        ({"images": ["a.png"], "prompt": [USER], "completion": [ANSWER]}, ("a.png",)),
        ({"images": ["a.png"], "messages": PARTS}, ("a.png",)),
    ],
)
def test_every_layout_is_a_conversation_in_parts(record: dict[str, Any], images: tuple[Any, ...]) -> None:
    if not isinstance(record.get("messages", []), list):
        record = {**record, "messages": list(record["messages"])}
    [row] = rows_from_records([(1, record)], "rows.jsonl")
    found = [
        {**message, "content": [{key: part[key] for key in part if part[key] or key == "type"} for part in parts]}
        for message in row.messages
        for parts in [message["content"]]
    ]
    assert (found, row.images) == (list(PARTS), images)


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": [""]}, "expected paths or bytes of images in `images`, found ''"),
        ({"images": [3]}, "expected paths or bytes of images"),
        ({"images": [{"bytes": None, "path": None}]}, "expected paths or bytes of images"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "found the answer with `weight` 0"),
        ({"messages": [USER, {**ANSWER, "content": [IMAGE]}]}, "a part of the type `image` for each image, found 1"),
        ({"messages": [USER, {**ANSWER, "content": " "}]}, "expected text in the answer"),
        ({"messages": [USER]}, "expected one `assistant` message, the last"),
        ({"messages": [{**USER, "role": "bot"}, ANSWER]}, "as `role` of message 1"),
        ({"messages": [USER, {**ANSWER, "thinking": "so"}]}, "expected no `thinking` in message 2"),
        ({"tools": [{"name": "f"}]}, "expected no `tools` beside images"),
    ],
)
def test_a_bad_row_is_named(changes: dict[str, Any], complaint: str) -> None:
    record = {"images": ["a.png", "b.png"], "messages": [USER, ANSWER], **changes}
    with pytest.raises(DataError, match=r"RW203: rows\.jsonl, line 1: ") as caught:
        rows_from_records([(1, record)], "rows.jsonl")
    assert complaint in caught.value.message


def test_what_else_a_question_is_marked_with_is_no_matter() -> None:
    """Only answers are trained on."""
    record = {"images": ["a.png"], "messages": [{**USER, "weight": 0}, ANSWER]}
    [row] = rows_from_records([(1, record)], "rows.jsonl")
    assert row.images == ("a.png",)

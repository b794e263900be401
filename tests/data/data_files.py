"""What the tests of readers write and ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rankwise.data import read_rows
from rankwise.errors import DataError


def jsonl(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def refusal(source: str | Path, **options: Any) -> str:
    """The error's text: one line that starts with its code."""
    with pytest.raises(DataError) as caught:
        read_rows(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)

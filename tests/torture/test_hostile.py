"""The short form of `hostile.py`: some hundred inputs for each reader, and that hostile ones are what it writes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hostile import readers, try_reader

INPUTS = 150
NAMES = (
    *("safetensors", "gguf", "adapter configuration", "adapter weights", "4-bit states", "model configuration"),
    *("run.json", "metrics", "manifest", "optimizer's JSON", "optimizer's tensors", "random states"),
    *("trainer's state", "comparison", "yaml", "rows", "templates", "rewards", "other settings", "conversations"),
    *("results", "predictions", "judge's replies", "board", "run's template", "outcomes", "encoded rows", "timings"),
)
# What is damaged there is made anew, or passed over with a warning.
NEVER_REFUSED = ("judge's replies", "board", "encoded rows", "timings")


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return readers(tmp_path_factory.mktemp("sound"))


def test_every_reader_is_tried(known: dict[str, Any]) -> None:
    assert set(known) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_hostile_file_loads_or_is_one_coded_error(name: str, known: dict[str, Any], tmp_path: Path) -> None:
    # Of templates each is a process, and some compute for seconds.
    count = 12 if name == "templates" else max(30, int(INPUTS * known[name].share))
    found = try_reader(name, known[name], range(count), 0, tmp_path / "input")
    assert found["problems"] == []
    # Neither all sound nor all of one fault.
    assert found["loaded"] < count or name in NEVER_REFUSED
    assert found["refused"] or name in NEVER_REFUSED

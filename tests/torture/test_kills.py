"""The short form of `kills.py`: each command is killed some times, and goes on as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from shim import run

pytestmark = pytest.mark.slow

KILLS = {"train": 1, "ranks": 1, "merge": 1, "export": 1, "compare": 1, "saves": 2}


def test_what_was_killed_goes_on_to_the_same_bits(library: Path, tmp_path: Path) -> None:
    """In one process and its forks, since importing torch takes longer than all of them."""
    counts = [word for name, count in KILLS.items() for word in (f"--{name}", count)]
    done = run(library, "kills.py", [tmp_path, *counts])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line for line in found if line["problems"]] == []
    assert {line["kind"]: line["kills"] for line in found} == KILLS
    # A kill at a call always hits; one at a moment comes too late where the machine has become less busy.
    places = {line["kind"]: line["places"] for line in found}
    assert "had ended" not in places["saves"]

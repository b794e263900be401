"""Every command on a full, broken or read-only disk: a code, the file, what to do; and what is there is whole."""

from __future__ import annotations

from pathlib import Path

import pytest
from shim import run

pytestmark = pytest.mark.slow

# COMMAND:ERROR:STRIDE:FIRST. `make torture` fails every call of every command in turn.
CASES = (
    "train:ENOSPC:193",
    "train:SIGKILL:263",
    "resume:EIO:167",
    "overwrite:SIGKILL:257",
    "merge:ENOSPC:19",
    "merge:SIGKILL:23",
    "export:ENOSPC:19",
    "gguf:EIO:19",
    "evaluate:ENOSPC:73",
    "evaluate:SIGKILL:83",
    "plan:SIGKILL:1",
)


def test_a_failing_disk_stops_every_command_by_code(library: Path, tmp_path: Path) -> None:
    """In one process, since importing torch takes as long as all the calls."""
    done = run(library, "disk_cases.py", [tmp_path, *CASES])
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == list(CASES), done.stdout
    # Far fewer calls, and the shim sees no more what is written.
    few = {"export": 10, "gguf": 10, "plan": 3}
    assert all(int(line.split()[-2]) > few.get(line.partition(":")[0], 40) for line in lines)

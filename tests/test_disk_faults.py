"""Every verb on a full, broken or read-only disk: a code, the file, what to do; and what is there is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STRIDE = os.environ.get("RANKWISE_DISK_STRIDE")
# In place of those below; 1 fails every call of every verb in turn, which takes many minutes.


# VERB:ERROR:STRIDE
CASES = (
    "train:ENOSPC:41",
    "train:SIGKILL:67",
    "resume:EIO:31",
    "overwrite:SIGKILL:61",
    "merge:ENOSPC:19",
    "merge:EIO:17",
    "merge:SIGKILL:23",
    "export:ENOSPC:5",
    "export:SIGKILL:9",
    "gguf:ENOSPC:5",
    "gguf:EIO:7",
    "evaluate:ENOSPC:19",
    "evaluate:SIGKILL:23",
)


def test_a_failing_disk_stops_every_verb_by_code(tmp_path: Path) -> None:
    """In one process, since importing torch takes as long as all the calls."""
    cases = CASES if STRIDE is None else [f"{case.rpartition(':')[0]}:{STRIDE}" for case in CASES]
    environment = {
        **os.environ,
        "LD_PRELOAD": str(_shim(tmp_path)),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    command = [sys.executable, str(HERE / "disk_cases.py"), str(tmp_path), *cases]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.rpartition(": ")[0] for line in lines] == list(cases), done.stdout
    # Far fewer calls, and the shim sees no more what is written.
    assert all(int(line.split()[-2]) > (10 if line.startswith(("export", "gguf")) else 40) for line in lines)


def _shim(folder: Path) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc and Linux's LD_PRELOAD")
    library = folder / "failing_disk.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "failing_disk.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc cannot build the shim: {done.stderr[-300:]}")
    return library

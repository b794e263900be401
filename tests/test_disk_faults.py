"""Every verb on a full, broken or read-only disk: a code, the file, what to do; and what is there is whole."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STRIDE = int(os.environ.get("RANKWISE_DISK_STRIDE", "0"))
# Between calls that fail. 1 takes every call of every verb, and some minutes.


@pytest.fixture(scope="module")
def shim(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("needs gcc and Linux's LD_PRELOAD")
    library = tmp_path_factory.mktemp("shim") / "failing_disk.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "failing_disk.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"gcc cannot build the shim: {done.stderr[-300:]}")
    return library


@pytest.mark.parametrize(
    ("error", "stride", "verbs"), [("ENOSPC", 41, ("train", "merge", "evaluate")), ("EIO", 31, ("resume", "merge"))]
)
def test_a_failing_disk_stops_every_verb_by_code(
    error: str, stride: int, verbs: tuple[str, ...], shim: Path, tmp_path: Path
) -> None:
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), *sys.path]),
    }
    command = [sys.executable, str(HERE / "disk_cases.py"), str(tmp_path), error, str(STRIDE or stride), *verbs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = done.stdout.splitlines()
    assert [line.split(":")[0] for line in lines if line.endswith(" calls")] == list(verbs), done.stdout
    assert len(lines) == len(verbs), done.stdout

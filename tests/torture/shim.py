"""`failing_disk.c`, built by the system's compiler."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def build(folder: Path) -> Path | str:
    """The library, or why there is none."""
    compiler = shutil.which("gcc")
    if compiler is None or sys.platform != "linux":
        return "needs gcc and Linux's LD_PRELOAD"
    library = folder / "failing_disk.so"
    command = [compiler, "-shared", "-fPIC", "-o", str(library), str(HERE / "failing_disk.c"), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"gcc cannot build the shim: {done.stderr[-300:]}" if done.returncode else library


def run(library: Path, script: str, arguments: Sequence[object]) -> subprocess.CompletedProcess[str]:
    """A script of this folder in a process whose calls of the disk can fail."""
    environment = {
        **os.environ,
        "LD_PRELOAD": str(library),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent), *sys.path]),
    }
    command = [sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)

"""Run cases of Triton in other processes: Triton decides when it is imported whether it interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rankwise import ops


def run_cases(name: str, tmp_path: Path, interpret: str, chosen: str) -> None:
    """Every case in the file ``name`` whose marks are ``chosen`` passes; none is skipped."""
    source = str(Path(ops.__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": source}
    environment |= {"OMP_NUM_THREADS": "1"} if interpret == "1" else {}
    cases = str(Path(__file__).with_name(name))
    command = [sys.executable, "-m", "pytest", cases, "-m", chosen, "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    summary = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in summary
    assert "skipped" not in summary

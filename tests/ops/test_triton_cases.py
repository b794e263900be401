"""Run the files of Triton's cases in another process: Triton decides when it is imported whether it interprets."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rankwise import ops

pytest.importorskip("triton")

# In one process: to import transformers again for each file takes as long as a file's cases.
CASES = sorted(str(path) for path in Path(__file__).parent.glob("triton_*cases.py"))


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernels_equal_the_reference_under_the_interpreter(chosen: str, tmp_path: Path) -> None:
    run_cases(tmp_path, "1", chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compiled kernels cannot run here")
def test_kernels_equal_the_reference_on_a_card(tmp_path: Path) -> None:
    run_cases(tmp_path, "0", "long or not long")


def run_cases(tmp_path: Path, interpret: str, chosen: str) -> None:
    """Every case whose marks are ``chosen`` passes; none is skipped."""
    source = str(Path(ops.__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": source}
    environment |= {"OMP_NUM_THREADS": "1"} if interpret == "1" else {}
    command = [sys.executable, "-m", "pytest", *CASES, "-m", chosen, "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    summary = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in summary
    assert "skipped" not in summary

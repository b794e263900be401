"""Runs `triton_cases` in other processes: Triton decides when it is imported whether it interprets its kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from rankwise import ops
from rankwise.errors import QuantizationError
from rankwise.ops import selection

pytest.importorskip("triton")

CASES = Path(__file__).with_name("triton_cases.py")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANKWISE_OPS", raising=False)
    ops.set_implementation("auto")
    yield
    ops.set_implementation("auto")


def run_cases(tmp_path: Path, interpret: str, chosen: str) -> None:
    """Every case whose marks are ``chosen`` passes; none is skipped."""
    source = str(Path(ops.__file__).parents[2])
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": source}
    environment |= {"OMP_NUM_THREADS": "1"} if interpret == "1" else {}
    command = [sys.executable, "-m", "pytest", str(CASES), "-m", chosen, "-p", "no:cacheprovider", "--tb=short"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    summary = (done.stdout.strip().splitlines() or [done.stderr])[-1]
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "passed" in summary
    assert "skipped" not in summary


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernels_equal_the_reference_under_the_interpreter(chosen: str, tmp_path: Path) -> None:
    run_cases(tmp_path, "1", chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compiled kernels cannot run here")
def test_kernels_equal_the_reference_on_a_card(tmp_path: Path) -> None:
    run_cases(tmp_path, "0", "long or not long")


@pytest.mark.usefixtures("automatic")
def test_a_cuda_tensor_gets_triton() -> None:
    assert selection.module_for(torch.device("cuda")).__name__ == "rankwise.ops.triton.four_bit"


@pytest.mark.usefixtures("automatic")
def test_triton_forced_on_a_cpu_tensor_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    ops.set_implementation("triton")
    with pytest.raises(QuantizationError, match=r"RW607.*'triton' was forced.*CUDA tensors"):
        ops.quantize_4bit(torch.ones(64))


@pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: the kernels of this process are interpreted")
def test_asking_for_the_interpreter_too_late_says_so() -> None:
    from rankwise.ops.triton import four_bit

    with pytest.raises(QuantizationError, match=r"RW607.*before Python starts"):
        four_bit.quantize_4bit(torch.ones(64))

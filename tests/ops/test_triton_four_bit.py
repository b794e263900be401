"""Runs `triton_cases` in other processes: Triton decides when it is imported whether it interprets its kernels."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from triton_processes import run_cases

from rankwise import ops
from rankwise.errors import QuantizationError
from rankwise.ops import selection

pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture
def automatic(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("RANKWISE_OPS", raising=False)
    ops.set_implementation("auto")
    yield
    ops.set_implementation("auto")


@pytest.mark.slow
@pytest.mark.parametrize("chosen", ["not long", pytest.param("long", marks=pytest.mark.long)])
def test_kernels_equal_the_reference_under_the_interpreter(chosen: str, tmp_path: Path) -> None:
    run_cases("triton_cases.py", tmp_path, "1", chosen)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: compiled kernels cannot run here")
def test_kernels_equal_the_reference_on_a_card(tmp_path: Path) -> None:
    run_cases("triton_cases.py", tmp_path, "0", "long or not long")


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

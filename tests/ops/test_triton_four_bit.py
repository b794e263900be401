"""Which implementation of the 4-bit operators a tensor gets, and what forcing Triton says where it cannot run."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

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

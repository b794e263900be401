"""Element-wise operators: which implementation a tensor gets, and what of Triton's cases needs no Triton."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from rankwise import ops
from rankwise.errors import QuantizationError
from rankwise.ops import elementwise, reference, table

triton = pytest.importorskip("triton")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPCHECKS = ("test_schema", "test_faketensor")
compiling = pytest.mark.skipif(INTERPRETED, reason="TRITON_INTERPRET=1: kernels are not compiled")


@compiling
def test_cuda_tensors_get_triton_and_cpu_tensors_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANKWISE_OPS", raising=False)
    ops.set_implementation("auto")
    monkeypatch.setattr(Tensor, "is_cuda", True)
    monkeypatch.setattr(Tensor, "is_cpu", False)
    monkeypatch.setattr(Tensor, "device", torch.device("cuda"))
    assert table.module_for(torch.ones(1, dtype=torch.bfloat16)).__name__ == "rankwise.ops.triton.elementwise"
    monkeypatch.undo()
    assert table.module_for(torch.ones(1, dtype=torch.float16)).__name__ == "rankwise.ops.reference"


@pytest.fixture(params=["auto", "reference"])
def chosen(request: pytest.FixtureRequest) -> Any:
    ops.set_implementation(request.param)
    yield request.param
    ops.set_implementation("auto")


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("N", [33, 0])
def test_row_cross_without_triton(N: int, dtype: torch.dtype) -> None:
    W, A, B = torch.randn(N, 50).to(dtype), torch.randn(5, 50), torch.randn(N, 5)
    truth = ((W.double() @ A.double().T) * B.double()).sum(1)
    for weight in (W, W.T.contiguous().T):
        torch.testing.assert_close(elementwise.row_cross(weight, A, B).double(), truth, rtol=1e-5, atol=1e-4)
    torch.library.opcheck(torch.ops.rankwise.row_cross.default, (W, A, B), test_utils=OPCHECKS)


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize(("N", "K"), [(9, 128), (3, 7), (0, 64)])
def test_row_cross_4bit_without_triton(N: int, K: int, double: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "CHUNK_ELEMENTS", 256)
    packed = ops.quantize_weight(torch.randn(N, K), double_quant=double)
    A, B = torch.randn(5, K), torch.randn(N, 5)
    W = ops.dequantize_weight(packed, torch.bfloat16)
    truth = ((W.double() @ A.double().T) * B.double()).sum(1)
    found = ops.row_cross_4bit(packed, A, B, torch.bfloat16)
    torch.testing.assert_close(found.double(), truth, rtol=1e-5, atol=1e-4)
    given = (*packed.parts, A, B, torch.bfloat16)
    torch.library.opcheck(torch.ops.rankwise.row_cross_4bit.default, given, test_utils=OPCHECKS)


def test_factors_that_do_not_fit_are_refused() -> None:
    W, A, B = torch.ones(3, 4), torch.ones(2, 4), torch.ones(3, 2)
    for bad in ((W, A.T, B), (W, A, B.T), (W, A.int(), B), (W[0], A, B)):
        with pytest.raises(QuantizationError, match=r"RW606.*row_cross needs W \(N, K\)"):
            elementwise.row_cross(*bad)

"""The mixed term of DoRA's norm, against float64, at every instruction set."""

from __future__ import annotations

import pytest
import torch

import rankwise as rw
from rankwise.adapters.low_rank import adapted_row_norms, row_norms_squared
from rankwise.ops import elementwise
from tables import thinned

SHAPES = [(1, 1, 1), (5, 7, 3), (33, 65, 4), (16, 64, 16), (130, 100, 9), (0, 8, 2)]


@thinned({"shape": SHAPES, "dtype": [torch.float32, torch.bfloat16, torch.float16]})
def test_against_float64(level: str | None, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    N, K, R = shape
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(N, K, generator=generator).to(dtype)
    A, B = torch.randn(R, K, generator=generator), torch.randn(N, R, generator=generator)
    exact = ((W.double() @ A.double().T) * B.double()).sum(1)
    found = elementwise.row_cross(W, A, B)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5 * K**0.5)
    transposed = elementwise.row_cross(W.T.contiguous().T, A, B)
    torch.testing.assert_close(transposed, found, rtol=1e-5, atol=1e-5 * K**0.5)


def test_norms_survive_a_cancelled_row() -> None:
    """W + s B A = 0 in row 0: float32 sums leave at most rounding, and no NaN."""
    W, A = torch.randn(3, 64), torch.randn(2, 64)
    B = torch.zeros(3, 2)
    W[0], B[0, 0] = 2.0 * A[0], -1.0
    norms = adapted_row_norms(W, row_norms_squared(W), A, B, 2.0)
    assert norms[0] <= 1e-2 * W[0].norm()
    torch.testing.assert_close(norms[1:], W[1:].norm(dim=1))


@pytest.mark.parametrize("double_quant", [False, True])
def test_of_a_4_bit_layer(double_quant: bool) -> None:
    layer = rw.Linear4bit.from_weight(torch.randn(24, 64), block_size=32, double_quant=double_quant)
    A, B = torch.randn(4, 64), torch.randn(24, 4)
    exact = ((layer.dequantize().double() @ A.double().T) * B.double()).sum(1)
    torch.testing.assert_close(layer.row_cross(A, B).double(), exact, rtol=1e-4, atol=1e-4)

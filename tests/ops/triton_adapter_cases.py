"""Triton's operators of adapters against the reference. `test_triton_cases` runs this file in other processes.

The device is the CPU where Triton interprets its kernels (TRITON_INTERPRET=1 before Python starts), else a CUDA card.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from triton_running import (
    DEVICE,
    DTYPES,
    assert_as_good,
    check_all_have_run,
    noting_launches,
    rand,
    randn,
    triton_on_poisoned_memory,
)

from rankwise import ops
from rankwise.ops import elementwise, low_rank_steps, selection, table
from rankwise.ops import reference as card
from rankwise.ops import reference as four_bit
from rankwise.ops import reference as reference
from rankwise.ops.branch import Branch, Dropout, Frozen
from rankwise.ops.four_bit import adapted_gain_4bit
from rankwise.ops.low_rank_linear import low_rank_linear
from tables import thinned

# Of `rankwise.ops.triton`, whose kernels all run here.
MODULES = ("adapter",)


@pytest.fixture(scope="module", autouse=True)
def launched() -> Iterator[set[str]]:
    with noting_launches() as names:
        yield names


@pytest.fixture(autouse=True)
def triton_alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with triton_on_poisoned_memory(monkeypatch, 0x2B):
        yield


@thinned(
    {
        "N,K,R": [(1, 1, 1), (70, 130, 5), (9, 1100, 16), (5, 33, 70), (3, 0, 4), (0, 8, 2)],
        "factors": [torch.float32, torch.bfloat16],
        "dtype": DTYPES,
    }
)
def test_row_cross(N: int, K: int, R: int, factors: torch.dtype, dtype: torch.dtype) -> None:
    W, A, B = randn(N, K, dtype=dtype), randn(R, K, dtype=factors), randn(N, R, dtype=factors)
    truth = ((W.double() @ A.double().T) * B.double()).sum(1)
    found = elementwise.row_cross(W, A, B)
    assert_as_good(found, reference.row_cross(W, A, B), truth)
    assert torch.equal(found, elementwise.row_cross(W, A, B))
    assert_as_good(elementwise.row_cross(W.T.contiguous().T, A, B), found, truth)


@thinned(
    {
        "N,K,block_size,R": [(17, 128, 64, 5), (3, 1152, 128, 16), (1, 1536, 512, 3), (5, 96, 32, 70), (3, 7, 64, 2)],
        "double": [False, True],
        "dtype": DTYPES,
    }
)
def test_row_cross_of_a_packed_weight(
    N: int, K: int, block_size: int, R: int, double: bool, dtype: torch.dtype
) -> None:
    packed = ops.quantize_weight(randn(N, K), "nf4", block_size, double)
    W = four_bit.dequantize_4bit(packed, dtype)
    for factors in (torch.float32, torch.bfloat16):
        A, B = randn(R, K, dtype=factors), randn(N, R, dtype=factors)
        truth = ((W.double() @ A.double().T) * B.double()).sum(1)
        found = ops.row_cross_4bit(packed, A, B, dtype)
        assert_as_good(found, reference.row_cross(W, A, B), truth)


def test_factors_of_float32_lose_nothing_against_a_bfloat16_weight() -> None:
    """Of one column and one rank the sum is a single product of A, which three bfloat16 numbers hold to 24 bits."""
    W, B = torch.ones(70, 1, dtype=torch.bfloat16, device=DEVICE), torch.ones(70, 1, device=DEVICE)
    for power in range(-6, 6):
        A = randn(1, 1) * 10.0**power
        found = elementwise.row_cross(W, A, B).double()
        assert ((found - A.double()).abs() <= A.double().abs() * 2.0**-24).all()


@thinned(
    {
        "N,K,R": [(1, 1, 1), (70, 130, 5), (9, 1100, 16), (33, 50, 40), (5, 33, 70), (3, 0, 4), (0, 8, 2)],
        "adapters_in": [torch.float32, torch.bfloat16],
        "dtype": DTYPES,
    }
)
def test_adapted_gain(N: int, K: int, R: int, adapters_in: torch.dtype, dtype: torch.dtype) -> None:
    W, A, B = randn(N, K, dtype=dtype), randn(R, K, dtype=adapters_in), randn(N, R, dtype=adapters_in)
    m = rand(N) + 0.5
    if N > 3:
        W[2], B[2] = 0, 0
    squared = W.float().square().sum(1)
    norms = (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    truth = torch.where(norms == 0, 1.0, m.double() / torch.where(norms == 0, 1.0, norms))
    found, plain = elementwise.adapted_gain(W, squared, A, B, m, 0.7), card.adapted_gain(W, squared, A, B, m, 0.7)
    assert found.shape == (N,)
    torch.testing.assert_close(found.double(), truth, rtol=3e-5, atol=3e-5)
    assert_as_good(found, plain, truth)
    assert torch.equal(found, elementwise.adapted_gain(W, squared, A, B, m, 0.7))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("N", "K", "R"), [(17, 128, 5), (3, 1152, 16), (5, 96, 70), (3, 7, 2)])
def test_gain_and_product_with_a_packed_weight(N: int, K: int, R: int, dtype: torch.dtype) -> None:
    packed = dataclasses.replace(ops.quantize_weight(randn(N, K), double_quant=True), dtype=dtype)
    W, A, B, m = four_bit.dequantize_4bit(packed, dtype), randn(R, K), randn(N, R), rand(N) + 0.5
    squared = W.float().square().sum(1)
    found = adapted_gain_4bit(packed, squared, A, B, m, 0.7)
    truth = m.double() / (W.double() + 0.7 * B.double() @ A.double()).norm(dim=1)
    assert_as_good(found, card.adapted_gain(W, squared, A, B, m, 0.7), truth)
    exact = m.double()[:, None] * four_bit.dequantize_4bit(packed, torch.float32).double()
    assert_as_good(ops.dequantize_weight(packed, dtype, m), card.dequantize_gained_4bit(packed, m, dtype), exact)


@thinned(
    {
        "T,N,R": [(1, 1, 1), (5, 33, 3), (129, 130, 16), (129, 257, 8), (40, 70, 70), (0, 4, 2), (4, 3, 0)],
        "dtype": DTYPES,
    }
)
def test_low_rank_grads(T: int, N: int, R: int, dtype: torch.dtype) -> None:
    dy, y, g, m = randn(T, N, dtype=dtype), randn(T, N, dtype=dtype), rand(N) + 0.5, rand(N) + 0.5
    wide_U, wide_dU, B = randn(T, R + 5, dtype=dtype), randn(T, R + 5, dtype=dtype), randn(N, R, dtype=dtype)
    m[0] = 0
    # Columns of wider matrices: of the one what lies beside them is not read, of the other it stays.
    U, before = wide_U[:, 3 : 3 + R], wide_dU.clone()
    for gain, folded, out, over in ((None, False, None, None), (g, False, y, m), (g, True, y, None), (g, True, y, m)):
        dU = wide_dU[:, 3 : 3 + R]
        made = table.call("low_rank_grads_", dU, dy, U, B, 0.7, gain, folded, out, over)
        plain_dU = U.clone()
        plain = card.low_rank_grads_(plain_dU, dy, U, B, 0.7, gain, folded, out, over)
        # From what is written: dz is rounded before it is multiplied.
        dz = dy.double() if made[2] is None else made[2].double()
        true_dU = 0.7 * dz @ B.double()
        true_dB = 0.7 * dz.T @ U.double() * (gain.double()[:, None] if folded else 1.0)
        assert_as_good(dU, plain_dU, true_dU)
        assert_as_good(made[0], plain[0], true_dB)
        assert [one is None for one in made] == [one is None for one in plain]
        if out is not None:
            total = (dy.double() * out.double()).sum(0)
            total = total if over is None else torch.where(m == 0, 0.0, total / torch.where(m == 0, 1.0, m.double()))
            assert_as_good(made[1], plain[1], total)
        if made[2] is not None:
            assert torch.equal(made[2], plain[2])
    assert torch.equal(wide_dU[:, :3], before[:, :3])
    assert torch.equal(wide_dU[:, 3 + R :], before[:, 3 + R :])


class Dense:
    eight_bit = scales = None

    def __init__(self, W: Tensor) -> None:
        self.W = W

    def product(self, x: Tensor) -> Tensor:
        return x @ self.W.T

    def add_input_grad(self, dz: Tensor, dx: Tensor | None) -> Tensor:
        return dz @ self.W if dx is None else dx.addmm_(dz, self.W)


@pytest.mark.parametrize("p", [0.0, 0.4])
def test_an_adapted_layer_has_the_gradients_of_autograd(p: float) -> None:
    N, K, R, T = 40, 24, 6, 9
    W, gain = randn(N, K), rand(N) + 0.5
    x, A, B, bias = (t.requires_grad_() for t in (randn(T, K), randn(R, K), randn(N, R), randn(N)))
    m = (rand(N) + 0.5).requires_grad_()
    dropout = Dropout(p, 3) if p else None
    (y,) = low_rank_linear(x, (Branch(frozen=Dense(W), scale=0.5, A=A, B=B, bias=bias, m=m, gain=gain),), dropout)
    dropped = x * reference.dropout(torch.ones_like(x), p, 3)
    norms = m.detach() / gain
    plain = m / norms * (x @ W.T + 0.5 * dropped @ A.T @ B.T) + bias
    torch.testing.assert_close(y, plain, rtol=1e-5, atol=1e-5)
    grad = randn(T, N)
    inputs = (x, A, B, bias, m)
    for ours, expected in zip(torch.autograd.grad(y, inputs, grad), torch.autograd.grad(plain, inputs, grad)):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@thinned(
    {
        "dora": [False, True],
        "four_bits": [False, True],
        "p": [0.0, 0.4],
        "dtype": [torch.bfloat16, torch.float16],
    }
)
def test_layers_on_a_card_are_no_worse_than_separate_products(
    dora: bool, four_bits: bool, p: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two that share an input, of ranks 4 and 16, one with a bias: by the norm of the error against float64."""
    K, T = 64, 70
    made, exact = [], []
    for r, N, has_bias in ((4, 40, False), (16, 24, True)):
        W = randn(N, K, dtype=dtype)
        frozen = Frozen(dataclasses.replace(ops.quantize_weight(W), dtype=dtype) if four_bits else W)
        A, B = (randn(*shape).requires_grad_() for shape in ((r, K), (N, r)))
        m = (rand(N) + 0.5).requires_grad_() if dora else None
        gain = None if m is None else m.detach() / (rand(N) + 0.5)
        bias = randn(N, dtype=dtype).requires_grad_() if has_bias else None
        made.append(Branch(frozen=frozen, scale=0.5, A=A, B=B, bias=bias, m=m, gain=gain))
        # What 4 bits hold, before it is rounded: with a gain it is rounded once, together with the gain.
        exact.append(frozen.dense(torch.float32).double())
    x, dropout = randn(T, K, dtype=dtype).requires_grad_(), Dropout(p, 3) if p else None
    inputs = [x, *(tensor for branch in made for tensor in branch.tensors if tensor is not None)]
    dys = [randn(T, 40, dtype=dtype), randn(T, 24, dtype=dtype)]

    def results() -> list[Tensor]:
        ys = low_rank_linear(x, made, dropout)
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, dys)]

    found = results()
    assert type(low_rank_linear.__globals__["_steps"](x, made)) is low_rank_steps.CardSteps
    monkeypatch.setattr(selection, "takes_triton", lambda tensor: False)
    plain = results()
    wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
    given = iter(wide)
    wide_x, ys = next(given), []
    dropped = wide_x * reference.dropout(torch.ones_like(wide_x), p, 3)
    for branch, W in zip(made, exact):
        A, B, *rest = (next(given) for tensor in branch.tensors if tensor is not None)
        y = wide_x @ W.T + 0.5 * dropped @ A.T @ B.T
        bias = rest.pop(0) if branch.bias is not None else 0
        ys.append((y if branch.m is None else y * rest[0] * (branch.gain.double() / branch.m.detach().double())) + bias)
    truth = [*(y.detach() for y in ys), *torch.autograd.grad(ys, wide, [dy.double() for dy in dys])]
    for index, (ours, other, right) in enumerate(zip(found, plain, truth, strict=True)):
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        error, allowed = (float((one.double() - right).norm() / right.norm()) for one in (ours, other))
        assert error <= 1.5 * allowed + 1e-5, index


def test_every_kernel_has_run(launched: set[str]) -> None:
    """After all others in this file."""
    check_all_have_run(MODULES, launched)

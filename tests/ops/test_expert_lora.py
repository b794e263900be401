"""Stacked experts with low-rank branches against a loop over the tokens, and their gradients by hand."""

from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from marks import at_every_level
from precision import assert_as_exact
from rankwise.ops import eight_bit as eight_bits
from rankwise.ops.cpu import products
from rankwise.ops.experts import DenseStack, ExpertBranch, FrozenStack, RowsByExpert, low_rank_experts
from rankwise.quantization.experts import PackedStack, StackScales, put_stack, quantize_stack
from tiny_models import mxfp4

E, H, WIDTH, R = 4, 2, 2, 1
# Expert 2 gets no token.
CHOSEN = torch.tensor([[0, 3], [1, 0], [3, 1], [0, 1], [3, 0]])


def gate(z: Tensor) -> Tensor:
    first, second = z.chunk(2, -1)
    return first.sigmoid() * second


def made(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def branches(up_adapts: bool, down_adapts: bool) -> tuple[ExpertBranch, ExpertBranch]:
    torch.manual_seed(0)

    def branch(K: int, N: int, adapts: bool, **more: Tensor) -> ExpertBranch:
        A, B = (made(E, R, K).requires_grad_(), made(E, N, R).requires_grad_()) if adapts else (None, None)
        return ExpertBranch(frozen=DenseStack(made(E, N, K)), scale=0.7, A=A, B=B, **more)

    return branch(H, 2 * WIDTH, up_adapts, bias=made(E, 2 * WIDTH)), branch(WIDTH, H, down_adapts)


def plain(x: Tensor, index: int, branch: ExpertBranch) -> Tensor:
    y = x @ branch.frozen.W[index].T + (0 if branch.bias is None else branch.bias[index])  # type: ignore[attr-defined]
    if branch.A is None or branch.B is None:
        return y
    return y + branch.scale * x @ branch.A[index].T @ branch.B[index].T


@pytest.mark.parametrize(("up_adapts", "down_adapts"), itertools.product([True, False], repeat=2))
def test_equals_a_loop_over_the_tokens(up_adapts: bool, down_adapts: bool) -> None:
    up, down = branches(up_adapts, down_adapts)
    x = made(len(CHOSEN), H)
    expected = [
        plain(gate(plain(token, e, up)), e, down) for token, experts in zip(x, CHOSEN.tolist()) for e in experts
    ]
    for graded in (True, False):
        with torch.set_grad_enabled(graded):
            torch.testing.assert_close(low_rank_experts(x, CHOSEN, E, gate, up, down), torch.stack(expected))


@pytest.mark.parametrize("frozen", [None, 0, 1, 2, 3, 4])
@pytest.mark.parametrize(("up_adapts", "down_adapts"), [(True, True), (True, False), (False, True)])
def test_gradcheck_in_float64(up_adapts: bool, down_adapts: bool, frozen: int | None) -> None:
    """Of x and of each factor; the one numbered ``frozen`` gets no gradient."""
    up, down = branches(up_adapts, down_adapts)
    given = [made(len(CHOSEN), H).requires_grad_(), *up.tensors, *down.tensors]
    if frozen is not None and given[frozen] is not None:
        given[frozen] = given[frozen].detach()  # type: ignore[union-attr]

    def call(x: Tensor, *factors: Tensor | None) -> Tensor:
        return low_rank_experts(x, CHOSEN, E, gate, up.with_tensors(*factors[:2]), down.with_tensors(*factors[2:]))

    assert torch.autograd.gradcheck(call, given, fast_mode=True)


@at_every_level
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", ["dense", "transposed", "nf4", "fp4 across", "mxfp4"])
def test_all_experts_in_one_call(kind: str, dtype: torch.dtype) -> None:
    """Natively, against one product per expert: no further from float64. Expert 2 gets no row, expert 0 half of all."""
    torch.manual_seed(0)
    experts, T, H, width, r = 6, 150, 64, 96, 5
    chosen = torch.stack([torch.tensor([0, 1 + 2 * (row % 3 > 0) + row % 2]) for row in range(T)])

    def branch(K: int, N: int) -> ExpertBranch:
        W, bias = torch.randn(experts, N, K) / K**0.5, torch.randn(experts, N).to(dtype)
        pair = torch.randn(experts, r, K) / K**0.5, torch.randn(experts, N, r)
        A, B = (part.requires_grad_() for part in pair)
        return ExpertBranch(frozen=stack_of(W, kind, dtype), bias=bias, scale=0.5, A=A, B=B)

    up, down = branch(H, 2 * width), branch(width, H)
    x, dy = torch.randn(T, H).to(dtype), torch.randn(2 * T, H)

    def outcome(as_dtype: torch.dtype, branches: tuple[ExpertBranch, ExpertBranch]) -> list[Tensor]:
        given = x.to(as_dtype, copy=True).requires_grad_()
        tensors = [tensor for part in branches for tensor in part.tensors if tensor is not None]
        y = low_rank_experts(given, chosen, experts, gate, *branches)
        return [y.detach(), *torch.autograd.grad((y.float() * dy).sum(), [given, *tensors])]

    assert (up.native(x) is not None) == products.take(dtype)
    exact = outcome(torch.float64, (in_float64(up), in_float64(down)))
    found = outcome(dtype, (up, down))
    products.allow(False)
    try:
        plain = outcome(dtype, (up, down))
    finally:
        products.allow(True)
    assert_as_exact(found, plain, exact, slack=1.2, dtype=dtype)


@at_every_level
@pytest.mark.parametrize("kind", ["dense", "nf4", "mxfp4"])
def test_in_8_bits_each_expert_has_the_scales_of_its_rows(kind: str) -> None:
    """Natively, against the plain products of `rankwise.ops.eight_bit`, forward and backward."""
    if not products.take(torch.bfloat16):
        pytest.skip("this level has no sums of products")
    torch.manual_seed(0)
    sizes, N, K = [3, 0, 40, 1], 96, 64
    W = torch.randn(4, N, K) * torch.rand(4, N, 1)
    stack, eight_bit = stack_of(W, kind, torch.bfloat16), eight_bits.EightBit()
    rows = RowsByExpert(torch.repeat_interleave(torch.arange(4), torch.tensor(sizes)), 4)
    x, dz = (torch.randn(sum(sizes), width).to(torch.bfloat16) * torch.rand(width) for width in (K, N))
    x, dz = x.to(torch.bfloat16), dz.to(torch.bfloat16)
    branch = ExpertBranch(frozen=stack, eight_bit=eight_bit)
    y, dx = branch.forward(x, rows)[0], branch.backward(dz, None, None, rows, want_dx=True)[0]
    scales, dense = eight_bit.scales(stack), list(stack.parts(torch.bfloat16))
    assert scales is not None
    assert dx is not None
    for index, mine in rows.slices():
        own = {name: getattr(scales, name)[index * N : (index + 1) * N] for name in ("row", "per_row")}
        of_expert = dataclasses.replace(scales, **own)
        expected = eight_bits.product(x[mine], dense[index], of_expert)
        torch.testing.assert_close(y[mine].float(), expected, rtol=2**-8, atol=1e-5)
        expected = eight_bits.input_grad(dz[mine], dense[index], of_expert)
        torch.testing.assert_close(dx[mine].float(), expected, rtol=2**-8, atol=1e-5)


def stack_of(W: Tensor, kind: str, dtype: torch.dtype) -> FrozenStack:
    if kind == "dense":
        return DenseStack(W.to(dtype))
    across = kind in ("transposed", "fp4 across")
    stored = W.transpose(1, 2).contiguous() if across else W
    if kind == "transposed":
        return DenseStack(stored.to(dtype).transpose(1, 2))
    experts = nn.Module()
    experts.config = SimpleNamespace()
    experts.register_parameter("up_proj", nn.Parameter(stored.to(dtype), requires_grad=False))
    if kind == "mxfp4":
        blocks, exponents = mxfp4(W.transpose(1, 2))
        scales = StackScales(W.shape, quant_type=kind, block_size=32, double_quant=False, dtype=dtype)
        scales.absmax, experts.is_transposed = exponents.flatten(), False
        return PackedStack(put_stack(experts, "up_proj", scales, blocks.reshape(-1, W.shape[2] // 2)), False)
    settings = {"quant_type": kind[:3], "block_size": 64 if kind == "nf4" else 32, "double_quant": kind == "nf4"}
    return PackedStack(quantize_stack(experts, "up_proj", compute_dtype=None, **settings), across)


def in_float64(branch: ExpertBranch) -> ExpertBranch:
    frozen = branch.frozen
    if isinstance(frozen, DenseStack):
        W = frozen.W
    else:
        assert isinstance(frozen, PackedStack)
        W = frozen.stack.dequantize()
        W = W.transpose(1, 2) if frozen.transposed else W
    bias = None if branch.bias is None else branch.bias.double()
    return dataclasses.replace(branch, frozen=DenseStack(W.double()), bias=bias).with_tensors(*branch.tensors)

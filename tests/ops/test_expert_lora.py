"""Stacked experts with low-rank branches against a loop over the tokens, and their gradients by hand."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rankwise.ops.experts import DenseStack, ExpertBranch, low_rank_experts

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
        return ExpertBranch(DenseStack(made(E, N, K)), scale=0.7, A=A, B=B, **more)

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

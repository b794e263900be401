"""Outputs of DoRA layers that rotary positions give back are not kept, and the magnitudes' gradients stay."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from test_low_rank_linear import branches, plain, trained
from test_normed import storages
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankwise.acceleration.parts import rope, turned_back
from rankwise.ops import elementwise, low_rank_steps, reference
from rankwise.ops.branch import Branch
from rankwise.ops.kept import offered_by
from rankwise.ops.low_rank_linear import low_rank_linear

HEADS, WIDTH = 3, 8


def made(*, comes_back: bool = True) -> list[Branch]:
    found = branches(torch.float64, dora=True, bias=True, widths=(HEADS * WIDTH, WIDTH))
    return [dataclasses.replace(branch, comes_back=comes_back) for branch in found]


def angles(turned: int = WIDTH) -> tuple[Tensor, Tensor]:
    """Halves that differ, and a factor as YaRN's: more than models have."""
    half = 0.7 * torch.rand(1, 5, turned, dtype=torch.float64)
    return 1.3 * half.cos(), 1.3 * half.sin()


def with_heads(y: Tensor) -> Tensor:
    return y.view(*y.shape[:2], -1, WIDTH).transpose(1, 2)


def block(x: Tensor, found: Sequence[Branch], cos: Tensor, sin: Tensor) -> Tensor:
    ys = low_rank_linear(x, found)
    return sum((rope(with_heads(y), cos, sin).sin().square().sum() for y in ys), torch.zeros(()))


def expected(x: Tensor, found: Sequence[Branch], cos: Tensor, sin: Tensor) -> Tensor:
    ys = [reference.rope_(with_heads(plain(x, branch)).clone(), cos, sin, False) for branch in found]
    return sum((y.sin().square().sum() for y in ys), torch.zeros(()))


@pytest.mark.parametrize("checkpointed", [None, False, True])
@pytest.mark.parametrize("turned", [WIDTH, WIDTH // 2])
def test_gradients_are_those_of_autograd(turned: int, checkpointed: bool | None) -> None:
    """``checkpointed``: reentrant or not."""
    found, (cos, sin) = made(), angles(turned)
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def loss() -> Tensor:
        if checkpointed is None:
            return block(x, found, cos, sin)
        return checkpoint(block, x, found, cos, sin, use_reentrant=checkpointed)

    wanted = [x, *trained(found)]
    for tensor in wanted:
        tensor.grad = None
    loss().backward()
    for tensor, grad in zip(wanted, torch.autograd.grad(expected(x, found, cos, sin), wanted)):
        torch.testing.assert_close(tensor.grad, grad, rtol=1e-5, atol=1e-6)


def test_turning_back_is_the_inverse() -> None:
    q, (cos, sin) = torch.randn(2, 3, 5, WIDTH, dtype=torch.float64), angles()
    for tables in ((cos, sin), (cos[..., :4], sin[..., :4])):
        torch.testing.assert_close(turned_back(elementwise.rope(q, *tables), *tables), q, rtol=1e-5, atol=1e-5)


def test_what_is_promised_back_is_not_kept() -> None:
    cos, sin = angles()
    x = torch.randn(2, 5, 5, dtype=torch.float64)

    def kept_bytes(*, comes_back: bool) -> int:
        found = made(comes_back=comes_back)
        outputs: list[Tensor] = []

        def forward() -> None:
            outputs.extend(rope(with_heads(y), cos, sin) for y in low_rank_linear(x, found))

        kept = storages(forward)
        # Attention keeps the turned ones.
        return sum(kept.values()) + sum(y.nbytes for y in outputs if y.untyped_storage().data_ptr() not in kept)

    assert kept_bytes(comes_back=False) - kept_bytes(comes_back=True) == 2 * 5 * (HEADS + 1) * WIDTH * 8


@pytest.mark.parametrize("how", ["not turned", "in part", "written to", "twice"])
def test_a_product_that_nobody_gives_back_is_made_again(how: str) -> None:
    found, (cos, sin) = made(), angles()
    x = torch.randn(2, 5, 5, dtype=torch.float64, requires_grad=True)

    def loss(first: Tensor) -> Tensor:
        if how == "not turned":
            return first.square().sum()
        if how == "in part":
            return rope(with_heads(first)[:, :1], cos, sin).square().sum()
        if how == "written to":
            return rope(with_heads(first.mul_(2)), cos, sin).square().sum()
        return (rope(with_heads(first), cos, sin) * rope(with_heads(first), sin, cos)).sum()

    found_grads = torch.autograd.grad(loss(low_rank_linear(x, found)[0]), [x, found[0].A, found[0].m])
    exact = torch.autograd.grad(loss(plain(x, found[0]) * 1), [x, found[0].A, found[0].m])
    for grad, grad0 in zip(found_grads, exact):
        torch.testing.assert_close(grad, grad0, rtol=1e-5, atol=1e-6)


def test_a_second_backward_pass_is_given_it_again() -> None:
    found, (cos, sin) = made(), angles()
    x = torch.randn(2, 5, 5, dtype=torch.float64)
    loss = block(x, found, cos, sin)
    first, second = (torch.autograd.grad(loss, [found[0].m], retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


def test_only_layers_whose_magnitude_trains_offer_their_output() -> None:
    found = made()
    assert offered_by(low_rank_linear(torch.randn(2, 5, 5, dtype=torch.float64), found)[0]) is not None
    for branch in found:
        branch.m.requires_grad_(False)  # type: ignore[union-attr]
    assert offered_by(low_rank_linear(torch.randn(2, 5, 5, dtype=torch.float64), found)[0]) is None


def test_an_output_that_nobody_used_causes_no_product(monkeypatch: pytest.MonkeyPatch) -> None:
    found, (cos, sin) = made(), angles()
    first, _ = low_rank_linear(torch.randn(2, 5, 5, dtype=torch.float64), found)
    loss = rope(with_heads(first), cos, sin).square().sum()
    monkeypatch.setattr(low_rank_steps, "forward", lambda *_: pytest.fail("a product was made again"))
    loss.backward()
    assert found[0].m.grad is not None  # type: ignore[union-attr]

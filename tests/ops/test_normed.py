"""Adapters keep of a norm's output what the norm keeps itself, and their gradients stay those of autograd."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable, Sequence

import pytest
import torch
from test_low_rank_linear import branches, plain, trained
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from marks import LEVELS, at_every_level
from rankwise.acceleration.parts import rms_norm
from rankwise.ops.branch import Branch, Dropout, Frozen
from rankwise.ops.kept import Normed, Plain, source_of
from rankwise.ops.low_rank_linear import low_rank_linear

EPS = 1e-5


def plain_norm(h: Tensor, w: Tensor, offset: int) -> Tensor:
    return (offset + w) * h * torch.rsqrt(h.square().mean(-1, keepdim=True) + EPS)


def storages(forward: Callable[[], object]) -> dict[int, int]:
    """Bytes by address of what a forward pass keeps."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        forward()
    return kept


def assert_gradients(ys: Sequence[Tensor], exact: Sequence[Tensor], wanted: Sequence[Tensor], rtol: float) -> None:
    for y, y0 in zip(ys, exact):
        torch.testing.assert_close(y, y0, rtol=rtol, atol=rtol)
    weights = [torch.randn_like(y) for y in exact]
    ours, expected = (
        torch.autograd.grad(sum((y * w).sum() for y, w in zip(outputs, weights)), wanted) for outputs in (ys, exact)
    )
    for grad, grad0 in zip(ours, expected):
        torch.testing.assert_close(grad, grad0, rtol=10 * rtol, atol=10 * rtol)


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dora", [False, True])
def test_equals_autograd(dora: bool, p: float, offset: int) -> None:
    made = branches(torch.float64, dora=dora, bias=True)
    h = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64)
    dropout = Dropout(p, 7) if p else None
    x = rms_norm(h, w, EPS, offset, False)
    assert isinstance(source_of(x), Normed)
    x0 = plain_norm(h, w, offset)
    exact = [plain(x0, branch, dropout) for branch in made]
    assert_gradients(low_rank_linear(x, made, dropout), exact, [h, *trained(made)], 1e-6)


@at_every_level
def test_equals_autograd_on_the_native_library() -> None:
    made = branches(torch.float32, dora=True, bias=False)
    h, w = torch.randn(64, 5, requires_grad=True), torch.randn(5)
    x, x0 = rms_norm(h, w, EPS, 0, True), plain_norm(h, w, 0)
    exact = [plain(x0, branch) for branch in made]
    assert_gradients(low_rank_linear(x, made), exact, [h, *trained(made)], 1e-5)


def test_the_norms_output_is_not_kept() -> None:
    made, h, w = branches(torch.float32, dora=False, bias=False), torch.randn(64, 5, requires_grad=True), torch.ones(5)
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(rms_norm(h, w, EPS, 0, True))
        low_rank_linear(outputs[0], made)

    kept = storages(forward)
    assert h.data_ptr() in kept
    assert outputs[0].data_ptr() not in kept


def test_what_was_written_to_or_is_float16_is_kept_itself() -> None:
    h, w = torch.randn(4, 5, requires_grad=True), torch.ones(5)
    x = rms_norm(h, w, EPS, 0, True)
    x.mul_(2)
    assert isinstance(source_of(x), Plain)
    assert isinstance(source_of(rms_norm(h.half(), w.half(), EPS, 0, True)), Plain)
    with torch.no_grad():
        assert isinstance(source_of(rms_norm(h, w, EPS, 0, True)), Plain)
    assert isinstance(source_of(rms_norm(h, w, EPS, 0, True) + 0), Plain)


def test_what_a_norm_does_not_keep_is_not_kept_for_it() -> None:
    """Inputs without a gradient are their owner's: to be written to, or made in inference mode."""
    made, w = branches(torch.float32, dora=False, bias=False), torch.ones(5)
    with torch.inference_mode():
        images = torch.randn(4, 5)
    for h in (images, torch.randn(4, 5)):
        loss = low_rank_linear(rms_norm(h, w, EPS, 0, True), made)[0].sum()
        if not h.is_inference():
            h.zero_()
        (dA,) = torch.autograd.grad(loss, [made[0].A])
        assert dA.abs().sum() > 0


def test_a_saved_output_holds_nothing_but_itself() -> None:
    h, file = torch.randn(4, 5, requires_grad=True), io.BytesIO()
    y = rms_norm(h, torch.ones(5), EPS, 0, True)
    assert isinstance(source_of(y), Normed)
    torch.save(y, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), y)


def test_an_output_that_gets_no_gradient() -> None:
    """torch's checkpointing gives none to an input that its block only looks at."""
    h, a = torch.randn(4, 5, requires_grad=True), torch.randn(4, 5, requires_grad=True)

    def block(a: Tensor, y: Tensor) -> Tensor:
        return a * 2 + y.detach()

    checkpoint(block, a, rms_norm(h, torch.ones(5), EPS, 0, True), use_reentrant=True).sum().backward()
    assert h.grad is None
    assert torch.equal(a.grad, torch.full_like(a, 2))


def test_autograd_notices_when_the_norms_input_changes() -> None:
    made, w = branches(torch.float32, dora=False, bias=False), torch.ones(5)
    h = torch.randn(4, 5, requires_grad=True) * 1
    loss = low_rank_linear(rms_norm(h, w, EPS, 0, True), made)[0].sum()
    with torch.no_grad():
        h.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_outputs_that_are_written_over_are_made_again_from_the_norm(checkpointed: bool) -> None:
    made: list[Branch] = branches(torch.float64, dora=True, bias=False)
    h = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, dtype=torch.float64)

    def block(h: Tensor, *, over: bool) -> Tensor:
        ys = low_rank_linear(rms_norm(h, w, EPS, 1, False), made)
        changed = [y.mul_(3).add_(1) if over else y * 3 + 1 for y in ys]
        return torch.cat(changed, dim=-1).square().sum()

    def grads(*, over: bool) -> tuple[Tensor, ...]:
        loss = checkpoint(block, h, over=over, use_reentrant=False) if checkpointed else block(h, over=over)
        return torch.autograd.grad(loss, [h, *trained(made)])

    for grad, grad0 in zip(grads(over=True), grads(over=False)):
        torch.testing.assert_close(grad, grad0, rtol=1e-6, atol=1e-6)


# Without sums of products the steps round more often: portable code errs by a fifth more.
@pytest.mark.parametrize("level", [name for name in LEVELS if name != "portable"] or [None], indirect=True)
def test_bfloat16_is_no_worse_than_with_the_norms_output(level: str | None) -> None:
    errors = torch.tensor([bfloat16_errors(seed) for seed in range(10)])
    ours, with_output = errors.mean(dim=0)
    assert ours <= 1.1 * with_output


def bfloat16_errors(seed: int) -> tuple[float, float]:
    """Of dA in bfloat16: from what the norm keeps, and from its output."""
    torch.manual_seed(seed)
    made = branches(torch.bfloat16, dora=False, bias=False, widths=(48, 32))
    h, w = (10 * torch.randn(512, 5)).bfloat16().requires_grad_(), torch.rand(5).bfloat16()
    exact = [plain(plain_norm(h.double(), w.double(), 0), widened(branch)) for branch in made]
    weights = [torch.randn_like(y) for y in exact]
    truth = torch.autograd.grad(sum((y * v).sum() for y, v in zip(exact, weights)), [branch.A for branch in made])

    def error(x: Tensor) -> float:
        loss = sum((y * v.bfloat16()).sum() for y, v in zip(low_rank_linear(x, made), weights))
        found = torch.autograd.grad(loss, [branch.A for branch in made])
        return float(sum((ours.double() - dA).norm() ** 2 for ours, dA in zip(found, truth))) ** 0.5

    x = rms_norm(h, w, EPS, 0, True)
    return error(x), error(x * 1)


def widened(branch: Branch) -> Branch:
    W = branch.frozen.weight  # type: ignore[union-attr]
    A, B = (tensor.double() for tensor in (branch.A, branch.B))
    return dataclasses.replace(branch, frozen=Frozen(W.double()), A=A, B=B)

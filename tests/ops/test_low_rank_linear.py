"""The hand-written gradients of the adapter operator, against autograd and against finite differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from marks import at_every_level
from rankwise.ops import dequantize_weight, elementwise, quantize_weight, selection
from rankwise.ops.branch import Branch, Dropout, Frozen
from rankwise.ops.low_rank_linear import low_rank_linear, low_rank_linear_of_glu
from tables import thinned

SCALE = 0.75


def branches(
    dtype: torch.dtype, *, dora: bool, bias: bool, widths: Sequence[int] = (6, 4), seed: int = 0
) -> list[Branch]:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    made = []
    for r, width in zip((3, 2, 1), widths):
        m = random(width).abs().add(0.5).requires_grad_() if dora else None
        gain = None if m is None else (m.detach() / random(width).abs().add(1)).float()
        A, B = random(r, 5).requires_grad_(), random(width, r).requires_grad_()
        made.append(
            Branch(
                frozen=Frozen(random(width, 5)),
                scale=SCALE,
                A=A,
                B=B,
                bias=random(width).requires_grad_() if bias else None,
                m=m,
                gain=gain,
            )
        )
    return made


def plain(x: Tensor, branch: Branch, dropout: Dropout | None = None) -> Tensor:
    """The formula through autograd; the gradient of m comes from g = m / norm with a constant norm."""
    W = branch.frozen.weight  # type: ignore[union-attr]
    dropped = x if dropout is None else x * (elementwise.dropout(torch.ones_like(x), dropout.p, dropout.seed))
    y = F.linear(x, W) + branch.scale * F.linear(F.linear(dropped, branch.A), branch.B)
    if branch.m is not None and branch.gain is not None:
        y = y * (branch.m / (branch.m.detach() / branch.gain.to(x.dtype)))
    return y if branch.bias is None else y + branch.bias


def trained(made: Sequence[Branch]) -> list[Tensor]:
    return [tensor for branch in made for tensor in branch.tensors if tensor is not None]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_equals_autograd(dora: bool, bias: bool, p: float) -> None:
    made = branches(torch.float64, dora=dora, bias=bias)
    dropout = Dropout(p, 7) if p else None
    x = torch.randn(2, 3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    weights = [torch.randn(2, 3, width, dtype=torch.float64) for width in (6, 4)]

    def grads(ys: Sequence[Tensor]) -> tuple[Tensor, ...]:
        total = sum((y * w).sum() for y, w in zip(ys, weights))
        return torch.autograd.grad(total, [x, *trained(made)])  # type: ignore[arg-type]

    ours, expected = low_rank_linear(x, made, dropout), [plain(x, branch, dropout) for branch in made]
    for y, y0 in zip(ours, expected):
        torch.testing.assert_close(y, y0, rtol=1e-6, atol=1e-6)
    for grad, grad0 in zip(grads(ours), grads(expected)):
        torch.testing.assert_close(grad, grad0, rtol=1e-5, atol=1e-5)


def test_gradcheck_in_float64() -> None:
    made = branches(torch.float64, dora=False, bias=True)
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        again = [
            dataclasses.replace(branch, A=A, B=B, bias=bias)
            for branch, A, B, bias in zip(made, tensors[::3], tensors[1::3], tensors[2::3])
        ]
        return low_rank_linear(x, again)

    assert torch.autograd.gradcheck(run, (x, *trained(made)))


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh"])
def test_of_glu_equals_its_parts(dora: bool, act: str) -> None:
    (branch,) = branches(torch.float64, dora=dora, bias=False, widths=(6,))
    gate, up = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    acts = {"silu": F.silu, "gelu": F.gelu, "gelu_tanh": lambda g: F.gelu(g, approximate="tanh")}
    wanted = [gate, up, *trained([branch])]
    w = torch.randn(2, 3, 6, dtype=torch.float64)
    y = low_rank_linear_of_glu(gate, up, act, branch, None)
    y0 = plain(acts[act](gate) * up, branch)
    torch.testing.assert_close(y, y0, rtol=1e-6, atol=1e-6)
    ours, expected = (torch.autograd.grad((out * w).sum(), wanted) for out in (y, y0))
    for grad, grad0 in zip(ours, expected):
        torch.testing.assert_close(grad, grad0, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("of_glu", [False, True])
def test_outputs_that_are_written_over_are_made_again_for_m(of_glu: bool, checkpointed: bool) -> None:
    """As Llama 4, Gemma 3n and RoCBert write over them; checkpointing keeps them past autograd's own check."""
    made = branches(torch.float64, dora=True, bias=True, widths=(6,) if of_glu else (6, 4))
    x, gate = (torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def block(gate: Tensor, x: Tensor, *, over: bool) -> Tensor:
        ys = (low_rank_linear_of_glu(gate, x, "silu", made[0], None),) if of_glu else low_rank_linear(x, made)
        changed = [y.mul_(3).add_(1) if over else y * 3 + 1 for y in ys]
        return torch.cat(changed, dim=-1).square().sum()

    def grads(*, over: bool) -> tuple[Tensor, ...]:
        if checkpointed:
            loss = checkpoint(lambda: block(gate, x, over=over).sin(), use_reentrant=False)
        else:
            loss = block(gate, x, over=over).sin()
        return torch.autograd.grad(loss, [x, *trained(made)])

    for grad, grad0 in zip(grads(over=True), grads(over=False)):
        torch.testing.assert_close(grad, grad0, rtol=1e-6, atol=1e-6)


@thinned(
    {
        "shape": [(5,), (1, 1, 5), (17, 5), (0, 5)],
        "dora": [False, True],
        "adapters_in": [torch.float32, torch.bfloat16],
    }
)
def test_without_gradients_the_outputs_are_the_same(dora, adapters_in, shape) -> None:
    """Of few rows, as when generating, of many, and of none."""
    made = branches(torch.float32, dora=dora, bias=True)
    made = [
        dataclasses.replace(one, A=one.A.detach().to(adapters_in), B=one.B.detach().to(adapters_in)) for one in made
    ]
    x = torch.randn(shape)
    with torch.no_grad():
        found = low_rank_linear(x, made)
    for y, branch in zip(found, made):
        exact = plain(x, dataclasses.replace(branch, A=branch.A.float(), B=branch.B.float()))
        assert y.shape == exact.shape
        assert not y.requires_grad
        torch.testing.assert_close(y, exact, rtol=1e-5, atol=1e-6)


@at_every_level
@thinned({"T": [1, 17, 80], "dora": [False, True], "graded": [False, True]})
def test_a_packed_weight_computes_as_its_dense_self(T: int, dora: bool, graded: bool) -> None:
    torch.manual_seed(0)
    packed, x = quantize_weight(torch.randn(9, 64)), torch.randn(T, 64, requires_grad=graded)
    gain = torch.rand(9) + 0.5 if dora else None
    A, B = torch.randn(3, 64, requires_grad=graded), torch.randn(9, 3, requires_grad=graded)
    found = []
    for weight in (packed, dequantize_weight(packed, torch.float32)):
        (y,) = low_rank_linear(x, [Branch(frozen=Frozen(weight), scale=SCALE, A=A, B=B, gain=gain)])
        found.append([y, *torch.autograd.grad(y.square().sum(), (x, A, B))] if graded else [y])
    for one, other in zip(*found):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


def test_an_unused_output_has_no_gradient_and_does_no_harm() -> None:
    made = branches(torch.float32, dora=True, bias=False)
    x = torch.randn(4, 5, requires_grad=True)
    first, _ = low_rank_linear(x, made)
    first.sum().backward()
    alone = torch.autograd.grad(plain(x, made[0]).sum(), [x, made[0].A, made[0].B])
    for grad, grad0 in zip((x.grad, made[0].A.grad, made[0].B.grad), alone):
        torch.testing.assert_close(grad, grad0, rtol=1e-4, atol=1e-5)
    assert made[1].B.grad is None
    assert made[1].A.grad is None or not made[1].A.grad.any()


def test_frozen_tensors_get_no_gradient() -> None:
    (branch,) = branches(torch.float32, dora=True, bias=True, widths=(6,))
    for tensor in branch.tensors:
        assert tensor is not None
        tensor.requires_grad_(False)
    branch.B.requires_grad_(True)
    x = torch.randn(4, 5)
    low_rank_linear(x, [branch])[0].sum().backward()
    assert branch.B.grad is not None
    assert all(t.grad is None for t in (x, branch.A, branch.bias, branch.m) if t is not None)


@pytest.mark.parametrize("dora", [False, True])
def test_keeps_the_input_and_things_of_rank_size(dora: bool) -> None:
    made = branches(torch.float32, dora=dora, bias=False)
    x = torch.randn(64, 5, requires_grad=True)
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        ys = low_rank_linear(x, made, Dropout(0.5, 3))
    parameters = sum(tensor.untyped_storage().nbytes() for tensor in trained(made))
    allowed = x.nbytes + 64 * 5 * 4 + parameters + (sum(y.nbytes for y in ys) if dora else 0)
    assert sum(kept.values()) <= allowed


def test_dropout_follows_from_its_seed() -> None:
    made = branches(torch.float32, dora=False, bias=False)
    x = torch.randn(32, 5)
    first, again, other = (low_rank_linear(x, made, Dropout(0.5, seed))[0] for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def on_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """The steps of a card, whose operators run in plain PyTorch here."""
    monkeypatch.setattr(selection, "takes_native", lambda _: False)
    monkeypatch.setattr(selection, "takes_triton", lambda _: True)


@at_every_level
@pytest.mark.parametrize("card", [False, True])
def test_bfloat16_is_no_worse_than_plain_bfloat16(card: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if card:
        on_card(monkeypatch)
    made = branches(torch.float64, dora=True, bias=False, widths=(48, 32), seed=3)
    x = torch.randn(256, 5, dtype=torch.float64)

    def errors(fast: bool) -> float:
        low = [
            dataclasses.replace(
                branch,
                frozen=Frozen(branch.frozen.weight.bfloat16()),  # type: ignore[union-attr]
                A=branch.A.detach().bfloat16(),
                B=branch.B.detach().bfloat16(),
                m=branch.m.detach().bfloat16(),  # type: ignore[union-attr]
            )
            for branch in made
        ]
        ys = low_rank_linear(x.bfloat16(), low) if fast else [plain(x.bfloat16(), branch) for branch in low]
        exact = [plain(x.bfloat16().double(), branch) for branch in made]
        return max(float((y.double() - y0).abs().max()) for y, y0 in zip(ys, exact))

    assert errors(fast=True) <= 1.25 * errors(fast=False)


@at_every_level
@thinned({"way": ["native", "plain", "card"], "dora": [False, True], "four_bits": [False, True]})
def test_updates_below_half_a_unit_of_the_output_count(
    dora: bool, four_bits: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bfloat16 such an update moves few outputs, each by a whole unit. On average they move by the update."""
    if way == "plain":
        monkeypatch.setattr(selection, "takes_native", lambda _: False)
    if way == "card":
        on_card(monkeypatch)
    T, K, N, r = 512, 64, 256, 4
    generator = torch.Generator().manual_seed(0)
    x, W = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((T, K), (N, K)))
    A, B = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((r, K), (N, r)))
    # At the start of training DoRA's gain is 1: another one would move every output off bfloat16's grid.
    gain = torch.ones(N) if dora else None
    # In the dtype of x, as a 4-bit layer holds it.
    frozen = Frozen(dataclasses.replace(quantize_weight(W), dtype=W.dtype) if four_bits else W)
    base, adapted = (
        low_rank_linear(x, [Branch(frozen=frozen, scale=scale, A=A, B=B, m=gain, gain=gain)])[0].double()
        for scale in (0.0, 2.0**-12)
    )
    update = 2.0**-12 * (x.double() @ A.double().T @ B.double().T)
    unit = torch.exp2(base.abs().log2().floor() - 7)
    is_small = update.abs() < unit / 4
    assert is_small.double().mean() > 0.5
    moved = ((adapted - base) * update.sign())[is_small].sum() / update.abs()[is_small].sum()
    assert float(moved) == pytest.approx(1, abs=0.06)


@thinned(
    {
        **dict.fromkeys(("of_glu", "dora", "four_bits", "bias"), (False, True)),
        "p": [0.0, 0.3],
    }
)
def test_a_card_s_steps_are_no_worse_than_separate_products(
    of_glu: bool, dora: bool, four_bits: bool, bias: bool, p: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Outputs and gradients of two layers with one input (ranks 3 and 16), by the norm of the error against float64."""
    T, K, generator = 80, 64, torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).bfloat16()

    made, dense = [], []
    for r, N in ((3, 40), (16, 24))[: 1 if of_glu else 2]:
        W = random(N, K)
        frozen = Frozen(dataclasses.replace(quantize_weight(W), dtype=W.dtype) if four_bits else W)
        m = (random(N).float().abs() + 0.5).requires_grad_() if dora else None
        gain = None if m is None else m.detach() / (random(N).float().abs() + 0.5)
        A, B = (torch.randn(shape, generator=generator).requires_grad_() for shape in ((r, K), (N, r)))
        made.append(
            Branch(
                frozen=frozen, scale=SCALE, A=A, B=B, bias=random(N).requires_grad_() if bias else None, m=m, gain=gain
            )
        )
        # What 4 bits hold, before it is rounded: with a gain it is rounded once, together with the gain.
        dense.append(frozen.dense(torch.float32))
    dropout = Dropout(p, 7) if p else None
    xs = [random(T, K).requires_grad_() for _ in range(2 if of_glu else 1)]
    dys = [random(T, branch.B.shape[0]) for branch in made]
    inputs = [*xs, *trained(made)]

    def results() -> list[Tensor]:
        if of_glu:
            ys: Sequence[Tensor] = [low_rank_linear_of_glu(*xs, "silu", made[0], dropout)]
        else:
            ys = low_rank_linear(xs[0], made, dropout)
        return [*(y.detach() for y in ys), *torch.autograd.grad(ys, inputs, dys)]

    monkeypatch.setattr(selection, "takes_native", lambda _: False)
    separate = results()
    on_card(monkeypatch)
    found = results()
    wide = iter([tensor.detach().double().requires_grad_() for tensor in inputs])
    wide_xs, ys = [next(wide) for _ in xs], []
    x = F.silu(wide_xs[0]) * wide_xs[1] if of_glu else wide_xs[0]
    leaves = list(wide_xs)
    for branch, W in zip(made, dense):
        own = [None if tensor is None else next(wide) for tensor in branch.tensors]
        leaves += [tensor for tensor in own if tensor is not None]
        A, B, of_bias, m = own
        assert A is not None
        assert B is not None
        gain = None if branch.gain is None else branch.gain.double()
        exact = dataclasses.replace(branch, frozen=Frozen(W.double()), A=A, B=B, bias=of_bias, m=m, gain=gain)
        ys.append(plain(x, exact, dropout))
    truth = [*(y.detach() for y in ys), *torch.autograd.grad(ys, leaves, [dy.double() for dy in dys])]
    for index, (ours, other, right) in enumerate(zip(found, separate, truth, strict=True)):
        assert (ours.dtype, ours.shape) == (other.dtype, other.shape)
        error, allowed = (float((one.double() - right).norm() / right.norm()) for one in (ours, other))
        assert error <= 1.5 * allowed + 1e-5, index

"""Frozen products with low-rank branches and hand-written gradients: the operator of LoRA, DoRA, QLoRA and QDoRA.

    y_i = g_i * (W_i x + s_i B_i A_i drop(x)) + b_i        for layers i that read the same x

Legend: T = rows of x, K = in features, N = out features, r = rank, R = the ranks of all layers together.
With U = drop(x) [A_1; A_2; ...]^T (T, R), one pass over x serves every layer. Saved for the backward pass are x, or the
tensors from which a norm made x (``ops.kept``), U, and the output of a layer with a gain, which mostly lives on
anyway or is returned by a later operation (``ops.kept``). An output that the model has overwritten since, as
Llama 4 and Gemma 3n do, is recomputed. In g = m / ||W + s B A|| only m is differentiated (DoRA, section 4.3).

    dz = g * dy     dU_i = s dz B     dB = s dz^T U_i     dA = dU^T drop(x)     dx = sum_i dz_i W_i + drop(dU A)
    dm = sum_T dy * (y - b) / m

The steps are implemented in ``low_rank_steps``, and for bfloat16 on most x86 CPUs in ``cpu.low_rank``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from types import ModuleType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.compat.torch import Ctx, unsafe_view, writes_to
from rankwise.ops import eight_bit, elementwise, low_rank_steps, selection
from rankwise.ops.branch import Branch, BranchGrads, Dropout, Wanted
from rankwise.ops.kept import Handback, Source, offer, source_of, tensors_of, with_tensors, without_tensors

if TYPE_CHECKING:
    from rankwise.ops.cpu import low_rank

    Steps = ModuleType | low_rank.Steps | low_rank_steps.CardSteps
    Kept = tuple[Steps, Sequence[Branch], Dropout | None, Sequence[Tensor | None]]


def low_rank_linear(x: Tensor, branches: Sequence[Branch], dropout: Dropout | None = None) -> tuple[Tensor, ...]:
    """``y_i`` (..., N_i) of every branch for one x (..., K); differentiable in x, A, B, bias and m.

    x has the dtype of the frozen weights; A, B and m may be in float32, and are rounded to x's dtype for the products.
    """
    tensors = [tensor for branch in branches for tensor in branch.tensors]
    if not torch.is_grad_enabled():
        if dropout is None and low_rank_steps.are_few(x):
            return tuple(low_rank_steps.of_few_rows(x, branch) for branch in branches)
        return _forward(x, branches, dropout).outputs(x)
    needed = _trains_m(branches)
    handbacks = [Handback(branch.comes_back) if trains else None for branch, trains in zip(branches, needed)]
    ys: tuple[Tensor, ...] = LowRankLinear.apply(tuple(branches), dropout, handbacks, x, *tensors)
    for y, handback in zip(ys, handbacks):
        if handback is not None:
            offer(y, handback)
    return ys


def low_rank_linear_of_glu(gate: Tensor, up: Tensor, act: str, branch: Branch, dropout: Dropout | None) -> Tensor:
    """``low_rank_linear(act(gate) * up)`` of one branch, without saving the product: gate, up (..., K) -> (..., N)."""
    if not torch.is_grad_enabled():
        return low_rank_linear(elementwise.glu(gate, up, act), (branch,), dropout)[0]
    return LowRankLinearOfGlu.apply(branch, act, dropout, gate, up, *branch.tensors)


class LowRankLinear(torch.autograd.Function):
    """See ``low_rank_linear``. Inputs: branches, dropout, handbacks, x, then A, B, bias and m of every branch."""

    @staticmethod
    def forward(
        ctx: Ctx[tuple[Kept, Sequence[Handback | None], Source]],
        branches: tuple[Branch, ...],
        dropout: Dropout | None,
        handbacks: Sequence[Handback | None],
        x: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        made = _forward(x, branches, dropout)
        outputs = made.outputs(x)
        kept = _kept([handback is not None and not handback.is_wanted for handback in handbacks], outputs)
        bare, source = [_without_tensors(branch) for branch in branches], source_of(x)
        handbacks = [handback if handback is not None and handback.is_wanted else None for handback in handbacks]
        ctx.kept = (made.steps, bare, dropout, kept), handbacks, without_tensors(source)
        ctx.save_for_backward(*tensors_of(source), made.U, *tensors, *_only(kept, made.ys))
        ctx.set_materialize_grads(False)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Ctx[tuple[Kept, Sequence[Handback | None], Source]], *dys: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, w, rstd, U, *rest = ctx.saved_tensors
        (steps, bare, dropout, kept), handbacks, source = ctx.kept
        source = with_tensors(source, x, w, rstd)
        branches, ys = _with_tensors(bare, rest)
        ys = [y if handback is None else handback.take() for y, handback in zip(ys, handbacks)]
        wanted, want_dx = _wanted(ctx.needs_input_grad[4:]), ctx.needs_input_grad[3]
        are_missing = any(y is None and want.m and dy is not None for y, want, dy in zip(ys, wanted, dys))
        if are_missing or _are_written_over(kept):
            ys = steps.forward(source.rows(), branches, dropout)[0]
        dU, dx, grads = steps.backward(_all_rows(dys), branches, ys, U, dropout, wanted, want_dx=want_dx)
        dA = None
        if any(want.A for want in wanted):
            dA = source.grad_A(dU, lambda dU, rows: steps.grad_A(dU, rows, dropout))
        return None, None, None, None if dx is None else dx.view(x.shape), *_flat(grads, dA, branches, wanted)


class LowRankLinearOfGlu(torch.autograd.Function):
    """See ``low_rank_linear_of_glu``. Inputs: branch, act, dropout, gate, up, then A, B, bias and m."""

    @staticmethod
    def forward(
        ctx: Ctx[tuple[Kept, str]],
        branch: Branch,
        act: str,
        dropout: Dropout | None,
        gate: Tensor,
        up: Tensor,
        *tensors: Tensor | None,
    ) -> Tensor:
        made = _forward(elementwise.glu(gate, up, act), (branch,), dropout)
        (output,) = made.outputs(gate)
        kept = _kept(_trains_m((branch,)), (output,))
        ctx.kept = (made.steps, [_without_tensors(branch)], dropout, kept), act
        ctx.save_for_backward(gate, up, made.U, *tensors, *_only(kept, made.ys))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[tuple[Kept, str]], dy: Tensor) -> tuple[Tensor | None, ...]:
        gate, up, U, *rest = ctx.saved_tensors
        (steps, bare, dropout, kept), act = ctx.kept
        branches, ys = _with_tensors(bare, rest)
        if _are_written_over(kept):
            ys = steps.forward(_rows(elementwise.glu(gate, up, act)), branches, dropout)[0]
        wanted = _wanted(ctx.needs_input_grad[5:])
        dU, dx, grads = steps.backward(_all_rows((dy,)), branches, ys, U, dropout, wanted, want_dx=True)
        assert dx is not None, "it was wanted"
        d_gate, d_up, rows = elementwise.glu_backward(dx, _rows(gate), _rows(up), act)
        dA = None if rows is None or not wanted[0].A else steps.grad_A(dU, rows, dropout)
        flat = _flat(grads, dA, branches, wanted)
        return None, None, None, d_gate.view(gate.shape), d_up.view(up.shape), *flat


@dataclasses.dataclass(frozen=True)
class _Made:
    """The results of a forward pass: the outputs ys (T, N_i), U (T, R), and the implementation that also runs the
    backward pass.
    """

    ys: Sequence[Tensor]
    U: Tensor
    steps: Steps

    def outputs(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs (..., N_i). They are no views, since autograd forbids in-place writes to views that a Function
        returns, and Falcon adds to its MLP's output in place."""
        return tuple(unsafe_view(y, (*x.shape[:-1], y.shape[-1])) for y in self.ys)


def _forward(x: Tensor, branches: Sequence[Branch], dropout: Dropout | None) -> _Made:
    rows = _rows(x)
    eight_bit.calibrate(rows, [(branch.frozen.eight_bit, branch.frozen) for branch in branches])
    steps = _steps(rows, branches)
    ys, U = steps.forward(rows, branches, dropout)
    return _Made(ys, U, steps)


def _steps(rows: Tensor, branches: Sequence[Branch]) -> Steps:
    """The implementation of the steps for these rows: the native library, Triton's kernels or separate products."""
    if selection.takes_native(rows):
        from rankwise.ops.cpu import low_rank

        return low_rank.steps_for(rows, branches) or low_rank_steps
    in_bytes = any(branch.frozen.eight_bit for branch in branches)
    if rows.dtype in low_rank_steps.HALF and selection.takes_triton(rows) and not in_bytes:
        return low_rank_steps.card_steps(rows, branches)
    return low_rank_steps


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _all_rows(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else _rows(tensor) for tensor in tensors]


# Zero-size aliases of the outputs that are kept, None for the others. They share the outputs' version counters, to
# detect in-place writes that autograd's own check would turn into an error.
KeptOutputs = Sequence[Tensor | None]


def _trains_m(branches: Sequence[Branch]) -> list[bool]:
    """Whether each branch's magnitude trains, in which case the backward pass needs the output."""
    return [branch.m is not None and branch.m.requires_grad for branch in branches]


def _kept(needed: Sequence[bool], outputs: Sequence[Tensor]) -> KeptOutputs:
    return [_counter_of(output) if is_needed else None for output, is_needed in zip(outputs, needed)]


def _counter_of(output: Tensor) -> Tensor:
    counter = output.detach()
    counter.data = output.new_empty(0)
    return counter


def _are_written_over(kept: KeptOutputs) -> bool:
    return any(counter is not None and writes_to(counter) > 0 for counter in kept)


def _only(kept: KeptOutputs, ys: Sequence[Tensor]) -> list[Tensor | None]:
    return [None if counter is None else y for counter, y in zip(kept, ys)]


def _without_tensors(branch: Branch) -> Branch:
    """The branch without its tensors. autograd saves them, and notices when they change."""
    return dataclasses.replace(branch, A=None, B=None, bias=None, m=None)  # type: ignore[arg-type]


def _with_tensors(
    branches: Sequence[Branch], saved: Sequence[Tensor | None]
) -> tuple[list[Branch], Sequence[Tensor | None]]:
    """The branches with their tensors again, and the kept outputs, as rows."""
    filled = []
    for index, branch in enumerate(branches):
        A, B, bias, m = saved[4 * index : 4 * index + 4]
        assert A is not None, "saved of every branch"
        assert B is not None, "saved of every branch"
        filled.append(dataclasses.replace(branch, A=A, B=B, bias=bias, m=m))
    return filled, _all_rows(saved[4 * len(branches) :])


def _wanted(needs: Sequence[bool]) -> list[Wanted]:
    """For each branch, whether A, B, bias and m need a gradient."""
    return [Wanted(*needs[start : start + 4]) for start in range(0, len(needs), 4)]


def _flat(
    grads: Sequence[BranchGrads], dA: Tensor | None, branches: Sequence[Branch], wanted: Sequence[Wanted]
) -> list[Tensor | None]:
    """dA, dB, d bias, dm of every branch, in the order of the inputs."""
    parts = [None] * len(branches) if dA is None else dA.split([branch.A.shape[0] for branch in branches])
    flat: list[Tensor | None] = []
    for part, branch, grad, want in zip(parts, branches, grads, wanted):
        flat += [part.to(branch.A.dtype) if want.A and part is not None else None, grad.B, grad.bias, grad.m]
    return flat

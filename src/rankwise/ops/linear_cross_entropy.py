"""Cross-entropy of a frozen output head in chunks of rows, so that the (T, V) logits are never stored as a whole.

    loss = sum_t CE(f(h_t W^T), target_t) / count        f(z) = cap * tanh(m z / cap), or m z without a cap

Legend: T = positions, D = hidden size, V = vocabulary. The gradient of h is computed in the forward pass, while a chunk
of logits exists, so the head's product runs once forward and once backward, as without chunks. The same holds for each
target's log-probability: row t of its gradient depends only on h_t, and is scaled by dL/dlog p_t in the backward pass.

Logits may be computed in 8 bits, and their gradient too: without the target's entry, which is near 1 and multiplied by
itself, and dithered, since 8 bits round thousands of small entries to zero (benchmarks/results/eight_bits.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rankwise.compat.torch import Ctx
from rankwise.constants import IGNORED, chunk_rows
from rankwise.ops import elementwise
from rankwise.ops.branch import Frozen, input_grad_out, linear_out
from rankwise.ops.checks import check_targets, sum_dtype
from rankwise.ops.eight_bit import EightBit, calibrate
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.selection import enough_chunks, is_on_card


@dataclasses.dataclass(frozen=True)
class LogitShape:
    """The model's change to its logits after the head: ``cap * tanh(multiplier * z / cap)``."""

    multiplier: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        z = logits if self.multiplier == 1.0 else logits * self.multiplier
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def at(self, temperature: float) -> LogitShape:
        """The shape of the logits divided by a temperature."""
        cap = None if self.softcap is None else self.softcap / temperature
        return LogitShape(self.multiplier / temperature, cap)


@dataclasses.dataclass(frozen=True)
class LossSums:
    """Sums over the scored positions. Only ``loss`` and ``log_probs`` are differentiable."""

    loss: Tensor
    entropy: Tensor | None
    # Number of positions whose argmax is the target.
    correct: Tensor | None
    # (T,): log p of each target, from ``linear_log_probs``. The loss is minus their sum.
    log_probs: Tensor | None = None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    shape: LogitShape | None = None,
    label_smoothing: float = 0.0,
    bias: Tensor | None = None,
    want_stats: bool = False,
    checked: bool = False,
    eight_bit: EightBit | None = None,
) -> LossSums:
    """``F.cross_entropy(f(hidden @ weight.T + bias).float(), targets, reduction="sum")``, differentiable in hidden;
    float64 stays float64.

    hidden (T, D), weight (V, D), dense or packed, and bias (V,) in one dtype, targets (T,) int64; a target of -100 is
    not scored. ``want_stats`` adds the entropy and the number of correct predictions. ``checked``: the caller has
    checked the targets; else the check (one for all chunks) waits for a GPU. ``eight_bit``: products are in 8 bits.

    Raises:
        QuantizationError: RW621, a target is neither -100 nor in [0, V).
    """
    if not checked and targets.is_cuda:
        check_targets(targets, weight.shape[0], IGNORED)
    options = (shape or LogitShape(), label_smoothing, want_stats)
    loss, entropy, correct = _ChunkedLoss.apply(hidden, Frozen(weight, eight_bit), bias, targets, *options)
    return LossSums(loss, entropy, correct)


def linear_log_probs(
    hidden: Tensor,
    weight: Tensor | PackedWeight,
    targets: Tensor,
    *,
    shape: LogitShape | None = None,
    bias: Tensor | None = None,
    want_stats: bool = False,
    checked: bool = False,
) -> LossSums:
    """``log_softmax(f(hidden @ weight.T + bias).float(), -1)`` at the targets, (T,), differentiable in hidden.

    Arguments and errors as for ``linear_cross_entropy``; no target may be -100.
    """
    if not checked:
        check_targets(targets, weight.shape[0], IGNORED)
    found = _ChunkedLogProbs.apply(hidden, Frozen(weight), bias, targets, shape or LogitShape(), want_stats)
    log_probs, entropy, correct = found
    return LossSums(-log_probs.sum(), entropy, correct, log_probs)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx[None],
        hidden: Tensor,
        head: Frozen,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
        label_smoothing: float,
        want_stats: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        calibrate(hidden, [(head.eight_bit, head)])
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        size, on_card = hidden.element_size(), is_on_card(hidden)
        wanted = chunk_rows(head.weight.shape[0], size, on_card=on_card, width=hidden.shape[1])
        sums = []
        for piece, logits in _chunks(hidden, head, bias, wanted):
            sums.append(_score_(logits, targets[piece], shape, label_smoothing, grad is not None, want_stats))
            if grad is not None:
                _input_grad_(logits, targets[piece], head, grad[piece])
        ctx.save_for_backward(grad)
        loss, entropy, correct = _totals(sums, hidden)
        loss = loss if hidden.dtype is torch.float64 else loss.float()
        if not want_stats:
            return loss, None, None
        ctx.mark_non_differentiable(entropy, correct)
        return loss, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # The factor is a float32 scalar: in bfloat16, rounding would change all gradients by up to 0.4 %.
        return grad * upstream, None, None, None, None, None, None


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx[None],
        hidden: Tensor,
        head: Frozen,
        bias: Tensor | None,
        targets: Tensor,
        shape: LogitShape,
        want_stats: bool,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        grad = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        # Small chunks on a GPU too, since the softmax is in float32.
        wanted = chunk_rows(head.weight.shape[0], 4, on_card=False)
        log_probs, sums = hidden.new_empty(len(hidden), dtype=_wide(hidden)), []
        for piece, logits in _chunks(hidden, head, bias, wanted):
            z = shape(logits.to(_wide(hidden)))
            log_probs[piece] = z.gather(1, targets[piece, None]).squeeze(1) - z.logsumexp(1)
            # Freed before the next chunk makes its own.
            del z
            if grad is not None or want_stats:
                sums.append(_score_(logits, targets[piece], shape, 0.0, grad is not None, want_stats))
            if grad is not None:
                input_grad_out(logits, head.weight, grad[piece])
        ctx.save_for_backward(grad)
        _, entropy, correct = _totals(sums, hidden)
        if not want_stats:
            return log_probs, None, None
        ctx.mark_non_differentiable(entropy, correct)
        return log_probs, entropy, correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], upstream: Tensor, *_: None) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        # The saved gradient is that of the loss, -log p. The factor stays in float32 as above.
        return (grad * -upstream[:, None]).to(grad.dtype), None, None, None, None, None


def _chunks(hidden: Tensor, head: Frozen, bias: Tensor | None, wanted: int) -> Iterator[tuple[slice, Tensor]]:
    """Yields (slice of about ``wanted`` rows, their logits); the logits are valid until the next chunk."""
    rows = max(1, min(len(hidden), wanted))
    scratch, scales = hidden.new_empty(rows, head.weight.shape[0]), head.scales
    for start in enough_chunks(range(0, len(hidden), rows), hidden):
        piece = slice(start, min(start + rows, len(hidden)))
        logits = linear_out(hidden[piece], head.weight, scratch[: piece.stop - start], scales=scales)
        if bias is not None:
            logits += bias
        yield piece, logits


def _input_grad_(dz: Tensor, targets: Tensor, head: Frozen, out: Tensor) -> None:
    """``out <- dz W``. In 8 bits the targets' entries are taken out of dz, in place, and multiplied by themselves."""
    W, scales = head.weight, head.scales
    if scales is None or not isinstance(W, Tensor):
        input_grad_out(dz, W, out)
        return
    # A position that is not scored has zeros.
    places = (torch.arange(len(targets), device=targets.device), targets.clamp(min=0))
    own = dz[places]
    # On CPUs ``scatter_`` would copy all of dz.
    dz[places] = 0.0
    input_grad_out(dz, W, out, scales)
    out.addcmul_(W[places[1]], own[:, None])


def _wide(hidden: Tensor) -> torch.dtype:
    """The dtype in which logarithms are computed."""
    return torch.promote_types(hidden.dtype, torch.float32)


def _score_(
    logits: Tensor, targets: Tensor, shape: LogitShape, label_smoothing: float, want_grad: bool, want_stats: bool
) -> tuple[Tensor | None, ...]:
    """Loss, entropy and number of correct predictions of a chunk. With ``want_grad`` the gradient overwrites logits."""
    return elementwise.cross_entropy_(
        logits,
        targets,
        label_smoothing=label_smoothing,
        softcap=shape.softcap,
        multiplier=shape.multiplier,
        want_grad=want_grad,
        want_entropy=want_stats,
        want_correct=want_stats,
        checked=True,
    )


def _totals(sums: Sequence[tuple[Tensor | None, ...]], hidden: Tensor) -> list[Tensor]:
    """The loss, entropy and number of correct predictions of all chunks."""
    return [
        sum((one for one in each if one is not None), torch.zeros((), dtype=sum_dtype(hidden), device=hidden.device))
        for each in (zip(*sums) if sums else ((), (), ()))
    ]

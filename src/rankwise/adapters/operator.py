"""Compute an adapted layer with the operator of hand-written gradients (`ops.low_rank_linear`), where it applies.

The operator applies to whole layers over a frozen dense, transposed (Conv1D) or 4-bit weight, in that weight's dtype.
All other cases (partly adapted fused projections, autocast to another dtype, compiled graphs, base weights that train)
compute the same formulas with autograd, in ``lora.py`` and ``dora.py``.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import is_own, stored_weight
from rankwise.adapters.fused import Parts
from rankwise.ops.branch import Branch, Dropout, Frozen
from rankwise.ops.selection import is_traced
from rankwise.quantization.linear import Linear4bit, is_conv1d

SEEDS = 1 << 31


class Batch:
    """The micro-batch in progress, whose rows (tokens) several processes may share."""

    # Rows in processes of lower rank. A plain attribute, so that recomputation in autograd's threads reads it too.
    rows_before = 0


BATCH = Batch()


class Adapter(Protocol):
    """An adapter of one base layer: a pair A (r, in), B (out, r) and, in DoRA, a magnitude m for each output row.

    The base is not a submodule of the adapter: methods take it as an argument.
    """

    scaling: float
    training: bool

    @property
    def lora_A(self) -> nn.Parameter: ...
    @property
    def lora_B(self) -> nn.Parameter: ...
    @property
    def parts(self) -> Parts | None: ...
    @property
    def dropout(self) -> float: ...
    @property
    def magnitude(self) -> nn.Parameter | None: ...
    def merge(self, base: nn.Module) -> Tensor: ...
    def over(self, base: nn.Module, x: Tensor, y: Tensor) -> Tensor: ...


class LinearAdapter(Adapter, Protocol):
    """An adapter of a linear layer, which the operator can compute."""

    # Whether the next operation returns the layer's output in the backward pass (`ops.handback`).
    comes_back: bool

    def fixed_gain(self, base: nn.Module) -> Tensor | None: ...
    def effective_weight(self, base: nn.Module) -> Tensor: ...


def frozen_weight(base: nn.Module, x: Tensor) -> Frozen | None:
    """The weight of ``base`` as the operator's argument, or None where the operator does not apply."""
    W = stored_weight(base)
    if is_traced() or W.requires_grad or not computes_in(x.dtype, x.device) or not is_own(base):
        return None
    if W.device != x.device:
        return None
    if type(base) is Linear4bit:
        computes_as = base.compute_dtype or x.dtype
        return Frozen(base.packed) if base.dtype is x.dtype is computes_as else None
    if W.dtype is not x.dtype:
        return None
    if type(base) is nn.Linear:
        return Frozen(W)
    return Frozen(W.T) if is_conv1d(base) else None


def computes_in(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of ``dtype`` stay in that dtype: without autocast, or with autocast to it."""
    kind = device.type
    return not torch.is_autocast_enabled(kind) or torch.get_autocast_dtype(kind) == dtype


def branch_of(adapter: LinearAdapter, base: nn.Module, x: Tensor) -> Branch | None:
    """The operator's argument for one adapted layer, or None where the operator does not apply."""
    frozen = frozen_weight(base, x) if adapter.parts is None else None
    if frozen is None:
        return None
    m = adapter.magnitude
    gain = adapter.fixed_gain(base)
    if m is not None and gain is None:
        return None
    A, B, bias = adapter.lora_A, adapter.lora_B, getattr(base, "bias", None)
    return Branch(frozen, adapter.scaling, A, B, bias, m, gain, adapter.comes_back)


def drawn_dropout(p: float, training: bool) -> Dropout | None:
    """Dropout with a seed from torch's generator, so that the run's seed fixes it and a recomputation repeats it."""
    if not training or p == 0:
        return None
    return Dropout(p, int(torch.randint(SEEDS, ())), BATCH.rows_before)

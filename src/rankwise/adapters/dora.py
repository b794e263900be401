"""DoRA (Liu et al. 2024, arXiv 2402.09353, equation 5):  y = g * (W x + s B A drop(x)) + b,  g = m / ||W + s B A||.

The norm is taken per output row and is a constant in the backward pass (section 4.3 of the paper).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import dense_weight, frozen_product, weight_key
from rankwise.adapters.lora import LowRankPair
from rankwise.adapters.low_rank import (
    Parts,
    adapted_row_norms,
    branch_of,
    drawn_dropout,
    enabled_rows,
    gain,
    init_low_rank_,
    merged_weight,
    row_norms,
    row_norms_squared,
    to_blocks,
)
from rankwise.ops.elementwise import adapted_gain
from rankwise.ops.four_bit import adapted_gain_4bit
from rankwise.ops.kept import Kept, Key, frozen_key
from rankwise.ops.low_rank_linear import low_rank_linear
from rankwise.ops.selection import is_on_card, is_traced, takes_triton
from rankwise.quantization.linear import Linear4bit, features


class Dora(LowRankPair):
    """DoRA: a low-rank pair and the magnitude of each output row.

    magnitude (out,); with ``parts`` it covers the enabled rows only, and the gain of all other rows is 1.
    """

    magnitude: nn.Parameter

    def __init__(
        self,
        base: nn.Module,
        r: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        parts: Parts | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(base, r, scaling, dropout=dropout, parts=parts, device=device)
        # Always float32: in bfloat16, rounding m would make the initial gain differ from 1.
        self.magnitude = nn.Parameter(torch.empty(self.lora_B.shape[0], dtype=torch.float32, device=device))
        self._out_features = features(base)[1]
        # Whether the next operation returns this layer's output to it in the backward pass (`ops.saved`), so that
        # the operator need not save it. Set by rankwise.acceleration.
        self.comes_back = False
        self._norms, self._squared, self._gain = Kept(), Kept(), Kept()
        # The norms that the kept gain was computed from. The reference keeps their id from being reused.
        self._gain_of: Tensor | None = None

    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        init_low_rank_(self.lora_A, self.lora_B, zero_b=zero_b)
        with torch.no_grad():
            self.magnitude.copy_(self.enabled(self.row_norms(base)))

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if self.for_merge is not None:
            return self.straight_through(base, x, self.gain(base))
        if (branch := branch_of(self, base, x)) is not None:
            return low_rank_linear(x, (branch,), drawn_dropout(self.dropout, self.training))[0]
        g, y = self.gain(base), frozen_product(base, x)
        # y + (g - 1) y instead of g y: in bfloat16 a gain close to 1 would round to 1.
        y = torch.addcmul(y, y, (g - 1).to(y.dtype))
        y = torch.addcmul(y, self.low_rank(x), (g * self.scaling).to(y.dtype))
        bias = getattr(base, "bias", None)
        return y if bias is None else y + bias

    def gain(self, base: nn.Module) -> Tensor:
        """``g = m / ||W + s B A||`` in float32: (out,); gradients reach m only."""
        return self._gain_over(self.row_norms(base))

    def _gain_over(self, norms: Tensor) -> Tensor:
        g = gain(self.magnitude, self.enabled(norms))
        if self.parts is None:
            return g
        rows = enabled_rows(self.parts, self._out_features, g.device)
        return g.new_ones(self._out_features).index_copy(0, rows, g)

    @torch.no_grad()
    def fixed_gain(self, base: nn.Module) -> Tensor | None:
        """`gain` without gradients, cached until the norms or m change; None on a CPU where one of its entries is 0."""
        if self.parts is None and not is_traced() and takes_triton(self.magnitude):
            return self._gain_on_card(base)
        norms = self.row_norms(base)
        key = frozen_key(norms)
        if norms is self._gain_of and (kept := self._gain.get((self.magnitude,), key)) is not None:
            return kept
        # An inference tensor cannot be cached, so inference mode is left unless the norms are inference tensors.
        with torch.inference_mode(norms.is_inference()), torch.no_grad():
            g = self._gain_over(norms)
        if g.is_cpu and not is_on_card(g) and not bool(g.all()):
            return None
        self._gain_of = norms
        return self._gain.keep((self.magnitude,), key, g)

    def _gain_on_card(self, base: nn.Module) -> Tensor:
        """`fixed_gain` in two kernels, without caching the row norms of the sum."""
        A, B, m = self.lora_A, self.lora_B, self.magnitude
        if (kept := self._gain.get((A, B, m), self._norms_key(base))) is not None:
            return kept
        with torch.inference_mode(A.is_inference()), torch.no_grad():
            squared = self._base_norms(base)
            if isinstance(base, Linear4bit):
                g = adapted_gain_4bit(base.packed, squared, A, B, m, self.scaling)
            else:
                g = adapted_gain(dense_weight(base), squared, A, B, m, self.scaling)
        return self._gain.keep((A, B, m), self._norms_key(base), g)

    @torch.no_grad()
    def row_norms(self, base: nn.Module) -> Tensor:
        """``||W + s B A||`` of each row of the whole layer in float32, (out,); cached until W, A, B or s changes.

        The norms are thus computed once per optimizer step, for all micro-batches, recomputations and evaluations.
        """
        A, B = self.lora_A, self.lora_B
        if is_traced():
            # A compiled graph recomputes the norms, since it cannot check whether cached ones are current.
            return self._new_row_norms(base, A, B)
        if (norms := self._norms.get((A, B), self._norms_key(base))) is not None:
            return norms
        # Inference tensors cannot be cached, and each generated token would recompute the norms.
        with torch.inference_mode(A.is_inference()), torch.no_grad():
            return self._norms.keep((A, B), self._norms_key(base), self._new_row_norms(base, A, B))

    def _new_row_norms(self, base: nn.Module, A: Tensor, B: Tensor) -> Tensor:
        squared = self._base_norms(base)
        if isinstance(base, Linear4bit):
            return row_norms(squared, base.row_cross(A, self.full_B()), A, self.full_B(), self.scaling)
        return adapted_row_norms(dense_weight(base), squared, A, self.full_B(), self.scaling)

    def _norms_key(self, base: nn.Module) -> Key:
        return *weight_key(base), self.scaling

    def _base_norms(self, base: nn.Module) -> Tensor:
        """``||W||^2`` of each row, (out,), cached while the base does not change. A 4-bit base needs no dense W."""
        if not is_traced() and (kept := self._squared.get((), weight_key(base))) is not None:
            return kept
        squared = base.row_norms().square() if isinstance(base, Linear4bit) else row_norms_squared(dense_weight(base))
        return squared if is_traced() else self._squared.keep((), weight_key(base), squared)

    def kept_tensors(self) -> list[Tensor]:
        """The cached row norms and gains, and the copies that tell whether these are current."""
        return [tensor for kept in (self._norms, self._squared, self._gain) for tensor in kept.tensors()]

    def enabled(self, rows: Tensor) -> Tensor:
        """The entries of ``rows`` (out,) that belong to adapted rows."""
        return rows if self.parts is None else rows[enabled_rows(self.parts, self._out_features, rows.device)]

    def sum(self, base: nn.Module, W: Tensor) -> Tensor:
        """``g * (W + s B A)`` as a new tensor (out, in) in W's dtype."""
        m = self.full_magnitude(base)
        rows = None if self.parts is None else enabled_rows(self.parts, self._out_features, W.device)
        return merged_weight(W, self.lora_A.detach(), self.full_B(), self.scaling, m, rows)

    def effective_weight(self, base: nn.Module) -> Tensor:
        """``g * (W + s B A)`` with gradients to A, B and m: (out, in) in the base's dtype."""
        W = dense_weight(base)
        dense = W + (self.scaling * to_blocks(self.lora_B, self.parts) @ self.lora_A).to(W.dtype)
        return self.gain(base)[:, None].to(W.dtype) * dense

    def full_magnitude(self, base: nn.Module) -> Tensor:
        """m as (out,); for rows that are not adapted, the norm of the base's row."""
        if self.parts is None:
            return self.magnitude.detach()
        m = row_norms_squared(dense_weight(base)).sqrt()
        m[enabled_rows(self.parts, self._out_features, m.device)] = self.magnitude.detach().to(m.device)
        return m

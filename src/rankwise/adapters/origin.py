"""The pair that PiSSA subtracts from a base's weight, and the rest of that weight:  W = W_rest + s B_0 A_0.

The layer then computes with W_rest, and the adapter starts at (A_0, B_0). Relative to W, the trained pair is one LoRA
of rank 2r at the same scale: s B A - s B_0 A_0 = s [B, -B_0] [A; A_0].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import dense_weight, is_quantized, with_weight
from rankwise.adapters.fused import low_rank_product
from rankwise.adapters.low_rank import merged_weight
from rankwise.quantization.linear import Linear4bit


class Origin(nn.Module):
    """The pair (A_0, B_0) of a base that holds W_rest. While no adapter is active, the pair restores W.

    A (r, in) and B (out, r) are buffers outside of the state dict, since the adapter's file holds them.
    """

    A: Tensor
    B: Tensor

    def __init__(self, A: Tensor, B: Tensor, scaling: float) -> None:
        super().__init__()
        self.scaling = scaling
        self.register_buffer("A", A, persistent=False)
        self.register_buffer("B", B, persistent=False)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        """``W x + b`` as ``W_rest x + s B_0 A_0 x + b``, equal up to rounding, since W itself is not kept."""
        return torch.add(base(x), low_rank_product(x, self.A, self.B), alpha=self.scaling)

    def restored(self, rest: nn.Module) -> nn.Module:
        """A base that holds W, made from ``rest``, which holds W_rest."""
        return with_weight(rest, merged_weight(dense_weight(rest), self.A, self.B, self.scaling))

    def taken_out_of(self, base: nn.Module, W: Tensor) -> nn.Module:
        """A base that holds ``W_rest = W - s B_0 A_0``, 4-bit if ``base`` is; W (out, in) is not quantized."""
        rest = merged_weight(W, self.A, self.B, -self.scaling).to(getattr(base, "dtype", W.dtype))
        if not is_quantized(base):
            return with_weight(base, rest)
        assert isinstance(base, Linear4bit), "the one quantized base that can be made again"
        layer = Linear4bit.from_weight(
            rest.to(base.weight.device),
            base.bias,
            quant_type=base.quant_type,
            block_size=base.block_size,
            double_quant=base.double_quant,
            compute_dtype=base.compute_dtype,
        )
        layer.was_conv1d = base.was_conv1d
        return layer.train(base.training)

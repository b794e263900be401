"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1):  y = W x + b + s B A drop(x)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.base_layer import dense_weight
from rankwise.adapters.fused import Parts, low_rank_product, to_blocks
from rankwise.adapters.low_rank import init_low_rank_, merged_weight
from rankwise.adapters.operator import branch_of, drawn_dropout
from rankwise.ops.low_rank_linear import low_rank_linear
from rankwise.quantization.linear import features


class LowRankPair(nn.Module):
    """The parameters A and B of one linear layer, which LoRA and DoRA share.

    lora_A (r, in) and lora_B (out, r); with ``parts`` as in ``adapters.fused``. The base layer is not a submodule: the
    methods that need it take it as an argument.
    """

    def __init__(
        self,
        base: nn.Module,
        r: int,
        scaling: float,
        *,
        dropout: float = 0.0,
        parts: Parts | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.r, self.scaling, self.parts = r, scaling, parts
        # A module, so that code that disables dropout (trl's for DPO and GRPO) finds it. It is never called.
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A, self.lora_B = empty_pair(base, r, parts, dtype, device)

    @property
    def dropout(self) -> float:
        return self.lora_dropout.p

    @dropout.setter
    def dropout(self, p: float) -> None:
        self.lora_dropout.p = p

    def low_rank(self, x: Tensor) -> Tensor:
        """``B A drop(x)``: (..., out)."""
        x = F.dropout(x, self.dropout, self.training) if self.dropout else x
        return low_rank_product(x, self.lora_A, self.lora_B, self.parts)

    def full_B(self) -> Tensor:
        """B as (out, rank of the whole update)."""
        return to_blocks(self.lora_B.detach(), self.parts)

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Lora(LowRankPair):
    """LoRA: a low-rank pair."""

    # LoRA has no magnitudes; the attribute is there for code that serves LoRA and DoRA.
    magnitude: None = None
    comes_back = False

    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        init_low_rank_(self.lora_A, self.lora_B, zero_b=zero_b)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if (branch := branch_of(self, base, x)) is not None:
            return low_rank_linear(x, (branch,), drawn_dropout(self.dropout, self.training))[0]
        return self.over(base, x, base(x))

    def over(self, base: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        """``y + s B A drop(x)`` for y = W x, with the bias or without."""
        return torch.add(y, self.low_rank(x), alpha=self.scaling)

    def merge(self, base: nn.Module) -> Tensor:
        """``W + s B A`` as a new tensor (out, in) in the base's dtype."""
        return merged_weight(dense_weight(base), self.lora_A.detach(), self.full_B(), self.scaling)

    def effective_weight(self, base: nn.Module) -> Tensor:
        """``W + s B A`` with gradients to A and B: (out, in) in the base's dtype."""
        W = dense_weight(base)
        return W + (self.scaling * to_blocks(self.lora_B, self.parts) @ self.lora_A).to(W.dtype)

    def fixed_gain(self, base: nn.Module) -> None:
        """None, since LoRA has no gain."""


def empty_pair(
    base: nn.Module, r: int, parts: Parts | None, dtype: torch.dtype, device: torch.device | str | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Uninitialised A (r, in) and B (out, r), or A (n r, in) and B (n out/len(parts), r) for n enabled parts."""
    in_features, out_features = features(base)
    count = 1 if parts is None else sum(parts)
    rows = out_features if parts is None else count * (out_features // len(parts))
    A = torch.empty(count * r, in_features, dtype=dtype, device=device)
    B = torch.empty(rows, r, dtype=dtype, device=device)
    return nn.Parameter(A), nn.Parameter(B)

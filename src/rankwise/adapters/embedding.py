"""LoRA and DoRA on an embedding, as a linear layer over one-hot ids x with W = E^T, so that  A x = A[:, ids].

Shapes: ids (...), E (vocabulary, dim), lora_A (r, vocabulary), lora_B (dim, r), magnitude (dim,).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.base_layer import dense_weight, scaled_rows
from rankwise.adapters.lora import empty_pair
from rankwise.adapters.low_rank import adapted_row_norms, gain, merged_weight, row_norms_squared


class EmbeddingLora(nn.Module):
    """y = g * (E[ids] + s B A[:, ids]), with g = 1 for LoRA and m / ||W + s B A|| for DoRA. No dropout, as in PEFT."""

    parts: None = None
    dropout = 0.0

    def __init__(
        self,
        base: nn.Embedding,
        r: int,
        scaling: float,
        *,
        use_dora: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.r, self.scaling = r, scaling
        self.lora_A, self.lora_B = empty_pair(base, r, None, dtype, device)
        self.magnitude: nn.Parameter | None = None
        if use_dora:
            self.magnitude = nn.Parameter(torch.empty(base.embedding_dim, dtype=torch.float32, device=device))

    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        """A = 0 and B ~ N(0, 1), as loralib and PEFT initialise an embedding; both random without ``zero_b``."""
        nn.init.zeros_(self.lora_A) if zero_b else nn.init.normal_(self.lora_A)
        nn.init.normal_(self.lora_B)
        if self.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(self.row_norms(base))

    def forward(self, base: nn.Module, ids: Tensor) -> Tensor:
        return self.over(base, ids, base(ids))

    def over(self, base: nn.Module, ids: Tensor, y: Tensor) -> Tensor:
        """``g * (y + s B A[:, ids])`` for y = E[ids]."""
        # As in the base, the padding token gets no gradient.
        columns = F.embedding(ids, self.lora_A.T.to(y.dtype), padding_idx=base.padding_idx)  # type: ignore[arg-type]
        low = scaled_rows(base, F.linear(columns, self.lora_B.to(y.dtype)))
        if self.magnitude is None:
            return torch.add(y, low, alpha=self.scaling)
        g = gain(self.magnitude, self.row_norms(base))
        y = torch.addcmul(y, y, (g - 1).to(y.dtype))
        return torch.addcmul(y, low, (g * self.scaling).to(y.dtype))

    @torch.no_grad()
    def row_norms(self, base: nn.Module) -> Tensor:
        W = dense_weight(base)
        return adapted_row_norms(W, row_norms_squared(W), self.lora_A, self.lora_B, self.scaling)

    def merge(self, base: nn.Module) -> Tensor:
        """``g * (W + s B A)`` as a new tensor (dim, vocabulary) in the base's dtype."""
        m = None if self.magnitude is None else self.magnitude.detach()
        return merged_weight(dense_weight(base), self.lora_A.detach(), self.full_B(), self.scaling, m)

    def full_B(self) -> Tensor:
        return self.lora_B.detach()

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}"

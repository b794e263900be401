"""Rows of an embedding that train alone (PEFT's ``trainable_token_indices``):  E'[i_k] = R[k], and E' = E elsewhere.

Shapes: E (vocabulary, dim), R (n, dim), i (n,) token ids. The head of the same weight has the same R; its bias stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.base_layer import stored_weight

KEY = "token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """Over an embedding, or over the linear layer of an output head. It never owns the layer."""

    scaling = 1.0
    dropout = 0.0
    parts: None = None
    magnitude: None = None
    ids: Tensor
    place: Tensor

    def __init__(self, base: nn.Module, ids: list[int], rows: nn.Parameter | None = None) -> None:
        """``rows``: those of the embedding that the head is tied to; by default the base's own, in float32."""
        super().__init__()
        E = stored_weight(base).detach()
        chosen = torch.tensor(ids, device=E.device)
        # Where a token stands among the rows, -1 for the others.
        place = torch.full((len(E),), -1, device=E.device).index_copy_(
            0, chosen, torch.arange(len(ids), device=E.device)
        )
        self.register_buffer("ids", chosen, persistent=False)
        self.register_buffer("place", place, persistent=False)
        # Saved with the embedding.
        self.is_tied = rows is not None
        self.rows = nn.Parameter(E[chosen].float()) if rows is None else rows

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)
        if not isinstance(base, nn.Embedding):
            own = F.linear(x, self.rows.to(x.dtype))
            bias = getattr(base, "bias", None)
            return y.index_copy(-1, self.ids, (own if bias is None else own + bias[self.ids]).to(y.dtype))
        place = self.place[x]
        own = F.embedding(place.clamp_min(0), self.rows).to(y.dtype)
        # Gemma's embedding multiplies what it looks up.
        scale = getattr(base, "embed_scale", None)
        own = own if scale is None else own * scale.to(own.dtype)
        return torch.where((place >= 0)[..., None], own, y)

    def effective_weight(self, base: nn.Module) -> Tensor:
        """E' with gradients to R: (vocabulary, dim) in the base's dtype."""
        E = stored_weight(base)
        return E.detach().index_copy(0, self.ids, self.rows.to(E.dtype))

    def merge(self, base: nn.Module) -> Tensor:
        """E' as a new tensor, in the form that ``dense_weight`` gives E."""
        merged = self.effective_weight(base).detach()
        return merged.T if isinstance(base, nn.Embedding) else merged

    def extra_repr(self) -> str:
        return f"{len(self.ids)} of {len(self.place)} tokens"

"""Train some rows of an embedding (PEFT's ``trainable_token_indices``):  E'[i_k] = R[k], and E' = E elsewhere.

Shapes: E (vocabulary, dim), R (n, dim), i (n,) token ids. A tied head shares R; its bias stays frozen.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.base_layer import scaled_rows, stored_weight

KEY = "token_adapter.trainable_tokens_delta"


class TokenRows(nn.Module):
    """The trained rows over an embedding or over the linear layer of an output head, which is not a submodule."""

    scaling = 1.0
    dropout = 0.0
    parts: None = None
    magnitude: None = None
    ids: Tensor
    place: Tensor

    def __init__(self, base: nn.Module, ids: list[int], rows: nn.Parameter | None = None) -> None:
        """``rows``: for a tied head, the embedding's rows; by default a float32 copy of the base's rows."""
        super().__init__()
        E = stored_weight(base).detach()
        chosen = torch.tensor(ids, device=E.device)
        # {token id: index of its trained row}, -1 for all other tokens.
        place = torch.full((len(E),), -1, device=E.device).index_copy_(
            0, chosen, torch.arange(len(ids), device=E.device)
        )
        self.register_buffer("ids", chosen, persistent=False)
        self.register_buffer("place", place, persistent=False)
        # As in the base, an embedding's row for the padding token gets no gradient.
        padding = getattr(base, "padding_idx", None)
        self.padding = ids.index(padding) if padding in ids else None
        # Rows of a tied head are saved with the embedding.
        self.is_tied = rows is not None
        self.rows = nn.Parameter(E[chosen].float()) if rows is None else rows

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        y = base(x)
        if not isinstance(base, nn.Embedding):
            own = F.linear(x, self.rows.to(x.dtype))
            bias = getattr(base, "bias", None)
            return y.index_copy(-1, self.ids, (own if bias is None else own + bias[self.ids]).to(y.dtype))
        place = self.place[x]
        own = scaled_rows(base, F.embedding(place.clamp_min(0), self.rows, padding_idx=self.padding).to(y.dtype))
        return torch.where((place >= 0)[..., None], own, y)

    def effective_weight(self, base: nn.Module) -> Tensor:
        """E' with gradients to R: (vocabulary, dim) in the base's dtype."""
        E = stored_weight(base)
        return E.detach().index_copy(0, self.ids, self.rows.to(E.dtype))

    def merge(self, base: nn.Module) -> Tensor:
        """E' as a new tensor in the layout of ``dense_weight``: (dim, vocabulary) of an embedding, else E's own."""
        merged = self.effective_weight(base).detach()
        return merged.T if isinstance(base, nn.Embedding) else merged

    def extra_repr(self) -> str:
        return f"{len(self.ids)} of {len(self.place)} tokens"

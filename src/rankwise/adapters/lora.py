"""LoRA (Hu et al. 2021, arXiv 2106.09685, section 4.1):  y = W x + b + s B A drop(x), and DoRA (Liu et al. 2024, arXiv
2402.09353, equation 5):  y = g * (W x + s B A drop(x)) + b,  g = m / ||W + s B A||.

The norm is taken per output row and is a constant in the backward pass (section 4.3 of the DoRA paper).

On an embedding, as a linear layer over one-hot ids x with W = E^T, so that  A x = A[:, ids]: ids (...),
E (vocabulary, dim), lora_A (r, vocabulary), lora_B (dim, r), magnitude (dim,).

With ``for_merge`` the products are those of the rounded weights that a merged 4-bit file holds, g = 1 for LoRA:

    y = Q x + b,  Q = W_q(g (W + s B A))
    dx = Q^T dy,  dB = s (g dy) (A x)^T,  dA = s B^T (g dy) x^T,  dm = dy Q x / m

Rounding counts as the identity in the backward pass (the straight-through estimator, Bengio et al. 2013, arXiv
1308.3432; of W_q(W + s B A) in L4Q, Jeon et al. 2024, arXiv 2402.04902). The scales of blocks are those of the sum, so
that quantizing the file again gives the same codes. A row's gain scales its blocks, so Q is g times a rounded matrix.
W of an NF4 base is `ops.four_bit.spread_weight`, since rounding would take small changes of W' itself back.

Some rows of an embedding train whole (PEFT's ``trainable_token_indices``):  E'[i_k] = R[k], and E' = E elsewhere, with
R (n, dim), i (n,) token ids. A tied head shares R; its bias stays frozen.
"""

from __future__ import annotations

import dataclasses
import functools
from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import ops
from rankwise.adapters.base_layer import (
    dense_weight,
    frozen_product,
    scaled_rows,
    stored_weight,
    weight_dtype,
    weight_key,
)
from rankwise.adapters.low_rank import (
    Parts,
    adapted_row_norms,
    drawn_dropout,
    enabled_rows,
    frozen_weight,
    gain,
    init_low_rank_,
    low_rank_product,
    merged_weight,
    row_norms,
    row_norms_squared,
    to_blocks,
)
from rankwise.lora_config import ForMerge
from rankwise.ops.branch import Branch, Frozen
from rankwise.ops.eight_bit import EightBit
from rankwise.ops.elementwise import adapted_gain
from rankwise.ops.four_bit import adapted_gain_4bit, quantize_q4_0, spread_weight
from rankwise.ops.kept import Kept, Key, frozen_key
from rankwise.ops.low_rank_linear import low_rank_linear
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.selection import is_on_card, is_traced, takes_triton
from rankwise.quantization.linear import Linear4bit, features

MAGNITUDE = "lora_magnitude_vector"


class LowRankPair(nn.Module):
    """The parameters A and B of one linear layer, which all kinds of adapters have.

    lora_A (r, in) and lora_B (out, r); with ``parts`` of a fused layer (``enable_lora``). The base layer is not a
    submodule: the methods that need it take it as an argument.
    """

    # {trained vector (out,) beside A and B: end of its key in the file, ``lora_NAME_vector``}.
    vectors: ClassVar[Mapping[str, str]] = {}
    # DoRA's; None elsewhere, for code that serves both.
    magnitude: nn.Parameter | None
    # Whether the next operation returns this layer's output to it in the backward pass (`ops.kept`), so that the
    # operator need not save it. Set by rankwise.acceleration.
    comes_back = False

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
        super().__init__()
        self.r, self.scaling, self.parts = r, scaling, parts
        # A module, so that code that disables dropout (trl's for DPO and GRPO) finds it. It is never called.
        self.lora_dropout = nn.Dropout(dropout)
        self.lora_A, self.lora_B = empty_pair(base, r, parts, device)
        self.register_parameter("magnitude", None)
        # Where the frozen products of training are in 8 bits; evaluation computes as servers do. Set by acceleration.
        self.eight_bit: EightBit | None = None
        # While a training step computes its reference, whose products are in 8 bits too: "base" leaves this pair out.
        self.as_reference: Literal["base", "pair"] | None = None
        # The 4-bit format of the file for which this layer trains.
        self.for_merge: ForMerge | None = None
        self._codes = Kept()
        self._rounded: PackedWeight | None = None

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

    @abstractmethod
    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        """Start at the base's function; without ``zero_b`` at another."""

    @abstractmethod
    def fixed_gain(self, base: nn.Module) -> Tensor | None:
        """DoRA's gain (out,) without gradients; None for LoRA."""

    def branch(self, base: nn.Module, x: Tensor) -> Branch | None:
        """The operator's argument for this layer, or None if the operator does not apply; it has no rounding."""
        frozen = frozen_weight(base, x) if self.parts is None and self.for_merge is None else None
        if frozen is None:
            return None
        if (self.training or self.as_reference) and self.eight_bit is not None:
            frozen = Frozen(frozen.weight, self.eight_bit)
        A, B, bias = self.lora_A, self.lora_B, getattr(base, "bias", None)
        if self.as_reference == "base":
            return Branch(frozen=frozen, scale=0.0, A=A, B=B, bias=bias)
        m, gain = self.magnitude, self.fixed_gain(base)
        if m is not None and gain is None:
            return None
        return Branch(
            frozen=frozen, scale=self.scaling, A=A, B=B, bias=bias, m=m, gain=gain, comes_back=self.comes_back
        )

    @abstractmethod
    def effective_weight(self, base: nn.Module) -> Tensor:
        """`sum` with gradients to what trains: (out, in) in the base's dtype."""

    @abstractmethod
    def sum(self, base: nn.Module, W: Tensor) -> Tensor:
        """``g (W + s B A)`` as a new tensor (out, in) in W's dtype."""

    def merge(self, base: nn.Module) -> Tensor:
        """``g (W + s B A)`` as a new tensor (out, in) in the base's dtype, rounded where the layer trains so."""
        if self.for_merge is not None:
            return ops.dequantize_weight(self.rounded(base))
        return self.sum(base, dense_weight(base))

    def rounded(self, base: nn.Module) -> PackedWeight:
        """Q in the format of ``for_merge``, kept until W, A, B, m or s changes."""
        trained = tuple(part for part in (self.lora_A, self.lora_B, self.magnitude) if part is not None)
        key = (*weight_key(base), self.scaling)
        if self._rounded is None or self._codes.get(trained, key) is None:
            with torch.inference_mode(self.lora_A.is_inference()), torch.no_grad():
                if self.for_merge == "nf4" and isinstance(base, Linear4bit) and base.quant_type == "nf4":
                    W = self.sum(base, spread_weight(base.packed))
                else:
                    W = self.sum(base, dense_weight(base).float())
                Q = quantize_q4_0(W) if self.for_merge == "q4_0" else ops.quantize_weight(W, double_quant=True)
                self._rounded = dataclasses.replace(Q, dtype=weight_dtype(base))
                self._codes.keep(trained, key, Q.codes)
        return self._rounded

    def straight_through(self, base: nn.Module, x: Tensor, g: Tensor | None = None) -> Tensor:
        """``Q x + b``, with gradients to A, B and, through the gain ``g``, to m as if Q were not rounded."""
        bias = getattr(base, "bias", None)
        y = ops.linear_4bit(x, self.rounded(base), bias)
        if not torch.is_grad_enabled():
            return y
        # Both terms are 0, and have the gradients.
        low = self.low_rank(x.detach()) * self.scaling
        term = low - low.detach()
        if g is not None:
            Qx = y.detach() if bias is None else y.detach() - bias.detach()
            # In a row whose gain is 0, Q x is 0, and so is the gradient to m.
            g0 = g.detach()
            of_gain = (g - g0) / torch.where(g0 == 0, 1.0, g0)
            term = term * g0.to(y.dtype) + Qx * of_gain.to(y.dtype)
        return y + term

    def extra_repr(self) -> str:
        return f"r={self.r}, scaling={self.scaling:g}, dropout={self.dropout:g}"


class Lora(LowRankPair):
    """LoRA: a low-rank pair."""

    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        init_low_rank_(self.lora_A, self.lora_B, zero_b=zero_b)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        if self.for_merge is not None:
            return self.straight_through(base, x)
        if (branch := self.branch(base, x)) is not None:
            return low_rank_linear(x, (branch,), drawn_dropout(self.dropout, self.training))[0]
        return torch.add(base(x), self.low_rank(x), alpha=self.scaling)

    def sum(self, base: nn.Module, W: Tensor) -> Tensor:
        """``W + s B A`` as a new tensor (out, in) in W's dtype."""
        return merged_weight(W, self.lora_A.detach(), self.full_B(), self.scaling)

    def effective_weight(self, base: nn.Module) -> Tensor:
        """``W + s B A`` with gradients to A and B: (out, in) in the base's dtype."""
        W = dense_weight(base)
        return W + (self.scaling * to_blocks(self.lora_B, self.parts) @ self.lora_A).to(W.dtype)

    def fixed_gain(self, base: nn.Module) -> None:
        """None, since LoRA has no gain."""


class Dora(LowRankPair):
    """DoRA: a low-rank pair and the magnitude of each output row.

    magnitude (out,); with ``parts`` it covers the enabled rows only, and the gain of all other rows is 1.
    """

    magnitude: nn.Parameter
    vectors: ClassVar[Mapping[str, str]] = {"magnitude": MAGNITUDE}

    def __init__(self, base: nn.Module, r: int, scaling: float, **options: Any) -> None:
        super().__init__(base, r, scaling, **options)
        # Always float32: in bfloat16, rounding m would make the initial gain differ from 1.
        self.magnitude = nn.Parameter(torch.empty(len(self.lora_B), dtype=torch.float32, device=self.lora_B.device))
        self._out_features = features(base)[1]
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
        if (branch := self.branch(base, x)) is not None:
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


def empty_pair(
    base: nn.Module, r: int, parts: Parts | None, device: torch.device | str | None
) -> tuple[nn.Parameter, nn.Parameter]:
    """Float32 A (r, in) and B (out, r) without values; A (n r, in) and B (n out/len(parts), r) for n enabled parts."""
    in_features, out_features = features(base)
    count = 1 if parts is None else sum(parts)
    rows = out_features if parts is None else count * (out_features // len(parts))
    empty = functools.partial(torch.empty, dtype=torch.float32, device=device)
    return nn.Parameter(empty(count * r, in_features)), nn.Parameter(empty(rows, r))


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
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.r, self.scaling = r, scaling
        self.lora_A, self.lora_B = empty_pair(base, r, None, device)
        self.magnitude: nn.Parameter | None = None
        self.vectors = {"magnitude": MAGNITUDE} if use_dora else {}
        if use_dora:
            self.magnitude = nn.Parameter(torch.empty(base.embedding_dim, dtype=torch.float32, device=device))

    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        """A = 0 and B ~ N(0, 1), as loralib and PEFT initialise an embedding; both random without ``zero_b``."""
        if zero_b:
            nn.init.zeros_(self.lora_A)
        else:
            nn.init.normal_(self.lora_A)
        nn.init.normal_(self.lora_B)
        if self.magnitude is not None:
            with torch.no_grad():
                self.magnitude.copy_(self.row_norms(base))

    def forward(self, base: nn.Module, ids: Tensor) -> Tensor:
        """``g * (y + s B A[:, ids])`` for y = E[ids]."""
        y = base(ids)
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


# {kind of `rankwise.methods`: the class of its adapters of linear layers}.
KINDS: dict[str, type[LowRankPair]] = {"lora": Lora, "dora": Dora}
# What an `AdaptedLayer` holds.
Adapter = LowRankPair | EmbeddingLora | TokenRows

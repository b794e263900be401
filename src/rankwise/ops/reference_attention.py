"""Attention over a contiguous range of keys in plain PyTorch: the specification that the native kernel must meet.

Legend: B batch, Lq queries, Lk keys, H query heads, Hkv key heads, G = H / Hkv heads that share a key head, D size of a
head; i a query, j a key. q (B, Lq, H, D); k, v (B, Lk, Hkv, D); start, end (B, Lq).

    s_ij = scale <q_i, k_j>     lse_i = ln sum_j exp(s_ij)     P_ij = exp(s_ij - lse_i)     O = P V

over start_i <= j < end_i. float16 and bfloat16 are computed in float32; float64 stays float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def visible(start: Tensor | None, end: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Whether query i sees key j, bool (B, Lq, Lk), for ``shape`` = (B, Lq, Lk)."""
    B, Lq, Lk = shape
    j = torch.arange(Lk, device=device)
    last = torch.arange(1, Lq + 1, device=device).expand(B, Lq) + (Lk - Lq) if end is None else end
    seen = j < last[..., None]
    return seen if start is None else seen & (j >= start[..., None])


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, end: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """out (B, Lq, H, D) in the dtype of q; lse float32 (B, H, Lq), -inf where a query sees no key."""
    p, lse = _weights(q, k, start, end, scale)
    out = torch.einsum("bhij,bjhd->bihd", p, _shared(v, q))
    return out.to(q.dtype).contiguous(), lse.float()


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    end: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dV = P^T dO, dS = P * (dO V^T - delta), delta = <dO, O>, dQ = scale dS K, dK = scale dS^T Q.

    ``lse`` is float32, too coarse for float64 gradients, so P is recomputed with its own.
    """
    p, _ = _weights(q, k, start, end, scale)
    g, wide = grad.to(p.dtype), out.to(p.dtype)
    delta = (g * wide).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bihd,bjhd->bhij", g, _shared(v, q)) - delta[..., None])
    dq = scale * torch.einsum("bhij,bjhd->bihd", ds, _shared(k, q))
    dk = scale * torch.einsum("bhij,bihd->bjhd", ds, q.to(p.dtype))
    dv = torch.einsum("bhij,bihd->bjhd", p, g)
    return dq.to(q.dtype).contiguous(), _summed(dk, k), _summed(dv, v)


def _weights(q: Tensor, k: Tensor, start: Tensor | None, end: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """P (B, H, Lq, Lk), zero where nothing is seen, and lse (B, H, Lq)."""
    seen = visible(start, end, (q.shape[0], q.shape[1], k.shape[1]), q.device)[:, None]
    s = scale * torch.einsum("bihd,bjhd->bhij", _wide(q), _shared(k, q))
    s = s.masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1)
    # A row without keys would be exp(-inf + inf). Any finite number in place of its lse gives zeros.
    return (s - lse.masked_fill(~seen.any(-1), 0.0)[..., None]).exp(), lse


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """A key head for each query head: (B, Lk, Hkv, D) -> (B, Lk, H, D)."""
    return _wide(x).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads of each key head: (B, Lk, H, D) -> (B, Lk, Hkv, D)."""
    B, Lk, Hkv, D = like.shape
    return x.reshape(B, Lk, Hkv, x.shape[2] // Hkv, D).sum(3).to(like.dtype)

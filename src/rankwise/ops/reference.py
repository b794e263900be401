"""The operators in plain PyTorch: the specification that every other implementation equals. 4-bit weights first.

Legend: w weight, n its elements in row-major order; b a block of ``block_size`` consecutive elements (the last may be
shorter); K = in features, N = out features, R = rank, T = rows of x.

    absmax_b = max |w_i|, i in b
    code_i   = the nearest of 16 values to w_i / absmax_b       ties to the lower value
    packed_j = code_2j << 4 | code_2j+1
    w'_i     = value[code_i] * absmax_b                          in float32, then rounded to the dtype asked for

Double quantization stores absmax itself in 8 bits: offset = mean(absmax), and per block of 256
nested_absmax = max |absmax - offset|, so that absmax' = dynamic_map[code] * nested_absmax + offset.

Equal to bitsandbytes 0.50 on CPU bit for bit, except where bitsandbytes dequantizes wrongly (last dimension not a
multiple of the block). The public functions in ``rankwise.ops`` check the arguments.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from rankwise.constants import IGNORED, MXFP4, NESTED_BLOCK
from rankwise.errors import QuantizationError
from rankwise.ops import gguf_blocks
from rankwise.ops.checks import check_targets, sum_dtype
from rankwise.ops.packed_weight import (
    DYNAMIC_BINS,
    PackedWeight,
    code_bounds,
    code_order,
    code_values,
    dynamic_bins,
    dynamic_map,
    packed_shape,
)

# Number of elements processed at once: a multiple of every block size, so that temporaries take a few MB.
_CHUNK = 1 << 20

# The least absmax that is inverted; as in bitsandbytes, a partial last block also stores it.
_TINY = 1e-38


def quantize_4bit(w: Tensor, quant_type: str = "nf4", block_size: int = 64) -> tuple[Tensor, Tensor]:
    """w, any shape -> packed uint8 (`packed_shape`), absmax float32 (blocks,)."""
    flat, n = w.detach().reshape(-1), w.numel()
    packed = torch.empty(math.ceil(n / 2), dtype=torch.uint8, device=w.device)
    absmax = torch.empty(math.ceil(n / block_size), dtype=torch.float32, device=w.device)
    for start in range(0, n, _CHUNK):
        chunk = flat[start : start + _CHUNK].float()
        codes, scales = _quantize_chunk(chunk, quant_type, block_size, start)
        packed[start // 2 : start // 2 + codes.numel() // 2] = (codes[::2] << 4) | codes[1::2]
        absmax[start // block_size : start // block_size + scales.numel()] = scales
    return packed.view(packed_shape(w.shape, block_size)), absmax


def _quantize_chunk(w: Tensor, quant_type: str, block_size: int, start: int) -> tuple[Tensor, Tensor]:
    if not w.isfinite().all():
        raise not_finite(w, start)
    full = w.numel() // block_size * block_size
    blocks, rest = w[:full].view(-1, block_size), w[full:]
    absmax = blocks.abs().amax(dim=1)
    # As in bitsandbytes, full blocks are multiplied by the reciprocal, and a partial last block is divided.
    normal = (blocks * (1.0 / absmax.clamp(min=_TINY)).unsqueeze(1)).view(-1)
    if rest.numel():
        last = rest.abs().amax().clamp(min=_TINY)
        absmax, normal = torch.cat([absmax, last.view(1)]), torch.cat([normal, rest / last])
    if normal.numel() % 2:
        normal = functional.pad(normal, (0, 1))
    below = torch.bucketize(normal, code_bounds(quant_type, w.device), out_int32=True)
    return code_order(quant_type, w.device)[below], absmax


def dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """W' = value[code] * absmax, in ``dtype``."""
    if weight.in_file_blocks:
        exponents = weight.absmax if weight.quant_type == MXFP4 else None
        kind, rows = weight.quant_type, weight.codes
        if rows.dim() == 1:
            rows = rows.unfold(0, gguf_blocks.BLOCK_TYPES[kind].row_bytes(weight.shape[1]), 1)
        return gguf_blocks.decode(rows, kind, weight.order, dtype, exponents)
    n, values = weight.elements, code_values(weight.quant_type, weight.codes.device)
    scales = _scales(weight)
    out, flat = torch.empty(n, dtype=dtype, device=weight.codes.device), weight.codes.reshape(-1)
    for start in range(0, n, _CHUNK):
        count = min(_CHUNK, n - start)
        pairs = flat[start // 2 : (start + count + 1) // 2]
        codes = torch.stack([pairs >> 4, pairs & 15], dim=1).view(-1)[:count]
        first = start // weight.block_size
        per_block = scales[first : first + math.ceil(count / weight.block_size)]
        out[start : start + count] = values[codes.int()] * per_block.repeat_interleave(weight.block_size)[:count]
    return out.view(tuple(weight.shape))


def quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """absmax float32 (blocks,) -> codes uint8 (blocks,), nested_absmax float32 (ceil(blocks / 256),), offset float32
    ().

    The nearest 8-bit value is found through 65536 equal bins of [-1, 1], as bitsandbytes does on a CPU.
    """
    offset = absmax.mean() if absmax.numel() else absmax.new_zeros(())
    if not offset.isfinite():
        # The sum of huge scales may overflow float32, their mean does not.
        offset = absmax.double().mean().float()
    count, blocks = absmax.numel(), math.ceil(absmax.numel() / NESTED_BLOCK)
    centred = functional.pad(absmax - offset, (0, blocks * NESTED_BLOCK - count)).view(blocks, NESTED_BLOCK)
    nested_absmax = centred.abs().amax(dim=1)
    normal = (centred * (1.0 / nested_absmax).unsqueeze(1)).clamp(-1, 1)
    bins = ((normal + 1.0) * 0.5 * (DYNAMIC_BINS - 1) + 0.5).nan_to_num(0.0).int()
    codes = dynamic_bins(absmax.device)[bins]
    codes[nested_absmax == 0.0] = 0
    return codes.view(-1)[:count].contiguous(), nested_absmax, offset


def dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    """absmax' = dynamic_map[codes] * nested_absmax + offset, float32 (blocks,)."""
    per_block = nested_absmax.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
    return dynamic_map(codes.device)[codes.int()] * per_block + offset


def linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """y = x W'^T + b, with W' rounded to the dtype of x. x (..., K) -> y (..., N)."""
    return functional.linear(x, dequantize_4bit(weight, x.dtype), bias)


def linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    """dL/dx = dL/dy W'. grad (..., N) -> (..., K)."""
    return grad @ dequantize_4bit(weight, grad.dtype)


def row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """||W'_n||, float32 (N,), of W' rounded to ``dtype`` and accumulated in float32."""
    return torch.linalg.vector_norm(dequantize_4bit(weight, dtype), dim=1, dtype=torch.float32)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """cross_n = <W'_n A^T, B_n>, float32 (N,), of W' rounded to ``dtype``."""
    return row_cross_in_chunks(weight, B, lambda part, B: row_cross(dequantize_4bit(part, dtype), A, B))


def row_cross_in_chunks(weight: PackedWeight, B: Tensor, cross: Callable[[PackedWeight, Tensor], Tensor]) -> Tensor:
    """The results of ``cross`` for chunks of the weight's rows and the same rows of B, concatenated."""
    if not weight.rows_are_blocks:
        return cross(weight, B)
    plain = dataclasses.replace(weight, absmax=_scales(weight), nested_absmax=None, offset=None)
    sums = [cross(plain.rows(rows), B[rows]) for rows in row_chunks(*weight.shape)]
    return torch.cat(sums) if sums else B.new_empty(0, dtype=torch.float32)


def not_finite(w: Tensor, start: int = 0) -> QuantizationError:
    """The error that names the first NaN or Inf of ``w``, whose elements begin at flat index ``start``."""
    flat = w.reshape(-1)
    index = int((~flat.isfinite()).nonzero()[0])
    return QuantizationError(
        "RW603",
        f"the weight holds {flat[index].item()} at flat index {start + index}: 4 bits have no code for NaN or Inf. "
        "The checkpoint is damaged or the training that made it diverged; use a different one.",
    )


def _scales(weight: PackedWeight) -> Tensor:
    if weight.nested_absmax is None or weight.offset is None:
        return weight.absmax
    return dequantize_absmax(weight.absmax, weight.nested_absmax, weight.offset)


# Element-wise operators of a training step. V = vocabulary, C = rows with logits; B, H, L = batch, heads, positions.
# float16 and bfloat16 are computed in float32 and rounded once at the end, unless the formula says otherwise; float64
# stays float64.

# Number of elements of a weight that are in float32 at a time.
CHUNK_ELEMENTS = 1 << 22

_WORD = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> Tensor:
    """y <- g * (y + scale * u B^T) + bias."""
    z = wide(y) + scale * (wide(u) @ wide(B).T)
    z = z if g is None else z * g
    return y.copy_(z if bias is None else z + wide(bias))


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    """dz = dy * g; dot_n = sum_t dy_tn y_tn."""
    dz = (wide(dy) * g).to(dy.dtype)
    return dz, None if y is None else (wide(dy) * wide(y)).reshape(-1, dy.shape[-1]).sum(0)


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
    """rstd = 1 / sqrt(mean(x^2) + eps); y = (offset + w) * (x rstd), with x rstd rounded first where ``cast_first``."""
    rstd = torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)
    normal = wide(x) * rstd
    normal = wide(normal.to(x.dtype)) if cast_first else normal
    return ((offset + wide(w)) * normal).to(x.dtype), rstd.reshape(-1)


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> Tensor:
    """h = dy (offset + w); dx = rstd (h - x rstd^2 mean(h x)) + residual_grad."""
    rstd = rstd.reshape(*x.shape[:-1], 1)
    h = wide(dy) * (offset + wide(w))
    dx = rstd * (h - wide(x) * (rstd.square() * (h * wide(x)).mean(-1, keepdim=True)))
    return (dx if residual_grad is None else dx + wide(residual_grad)).to(x.dtype)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up."""
    return (_activate(wide(gate), act) * wide(up)).to(gate.dtype)


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate = dout up act'(gate); dup = dout act(gate); product = act(gate) up."""
    g, d = wide(gate), wide(dout)
    dgate = (d * wide(up) * _slope(g, act)).to(gate.dtype)
    dup = (d * _activate(g, act)).to(gate.dtype)
    return dgate, dup, glu(gate, up, act) if with_product else None


def _activate(x: Tensor, act: str) -> Tensor:
    if act == "silu":
        return functional.silu(x)
    return functional.gelu(x, approximate="tanh" if act == "gelu_tanh" else "none")


def _slope(x: Tensor, act: str) -> Tensor:
    """act'(x)."""
    if act == "silu":
        s = x.sigmoid()
        return s * (1 + x * (1 - s))
    if act == "gelu_tanh":
        k = 2 * math.sqrt(2 / math.pi)
        # Beyond 1e4 the sigmoid is 0 or 1, and its factor must stay finite.
        square = x.square().clamp(max=1e4)
        s = (k * x * (1 + 0.044715 * square)).sigmoid()
        return s + x * s * (1 - s) * k * (1 + 3 * 0.044715 * square)
    return 0.5 * torch.special.erfc(-x / math.sqrt(2)) + x * torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """(q_1 cos_1 - q_2 sin_1, q_2 cos_2 + q_1 sin_2) of the halves of the first D' columns; the others stay.

    ``inverse``: the transposed map, (q_1 cos_1 + q_2 sin_2, q_2 cos_2 - q_1 sin_1).
    """
    out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
    return rope_(out.copy_(q), cos, sin, inverse)


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """`rope` in place."""
    half = cos.shape[-1] // 2
    first, second = wide(q[..., :half]), wide(q[..., half : 2 * half])
    cos, sin = wide(cos).unsqueeze(1), wide(sin).unsqueeze(1)
    cos_1, cos_2, sin_1, sin_2 = cos[..., :half], cos[..., half:], sin[..., :half], sin[..., half:]
    if inverse:
        sin_1, sin_2 = -sin_2, -sin_1
    turned = first * cos_1 - second * sin_1, second * cos_2 + first * sin_2
    q[..., :half], q[..., half : 2 * half] = turned
    return q


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    scale: float,
    label_smoothing: float,
    softcap: float | None,
    multiplier: float,
    want_grad: bool,
    want_entropy: bool,
    want_correct: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """loss = sum over rows of (1 - s) (-log p_target) + s mean_c(-log p_c), s the label smoothing;
    entropy = sum over rows of -sum_c p_c log p_c; correct = rows whose first largest logit is the target.

    z = multiplier * logits, then softcap * tanh(z / softcap); p = softmax(z).
    dloss/dlogits = (p - (1 - s) onehot - s / V) * multiplier * (1 - tanh^2).
    """
    check_targets(targets, logits.shape[1], IGNORED)
    rows = (targets != IGNORED).nonzero().squeeze(1)
    target, V = targets[rows].unsqueeze(1), logits.shape[1]
    z = multiplier * wide(logits[rows])
    slope: Tensor | float = multiplier
    if softcap is not None:
        tanh = torch.tanh(z / softcap)
        z, slope = softcap * tanh, multiplier * (1 - tanh.square())
    log_p, sums = torch.log_softmax(z, 1), sum_dtype(logits)
    p = log_p.exp()
    loss = (label_smoothing - 1) * log_p.gather(1, target).to(sums).sum()
    if label_smoothing:
        loss = loss - label_smoothing / V * log_p.to(sums).sum()
    entropy = -torch.where(p > 0, p * log_p, 0.0).to(sums).sum() if want_entropy else None
    correct = (logits[rows].argmax(1, keepdim=True) == target).sum() if want_correct else None
    if want_grad:
        p = p - label_smoothing / V
        p.scatter_add_(1, target, torch.full_like(target, label_smoothing - 1, dtype=p.dtype))
        logits.zero_()
        logits[rows] = (scale * slope * p).to(logits.dtype)
    return loss, entropy, correct


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    """y_i = x_i / (1 - p) where `keep_mask`, else 0; i is the flat index of a contiguous x."""
    return torch.where(keep_mask(x, p, seed), wide(x) * (1 / (1 - p)), 0.0).to(x.dtype)


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    """dx_i <- dx_i + z_i / (1 - p) where `keep_mask`."""
    return dx.copy_(torch.where(keep_mask(z, p, seed), wide(dx) + wide(z) * (1 / (1 - p)), wide(dx)))


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """cross_n = sum_r (W A^T)_nr B_nr, a chunk of W's rows in float32 at a time."""
    A, B = A.float(), B.float()
    chunks = [((W[rows].float() @ A.T) * B[rows]).sum(1) for rows in row_chunks(*W.shape)]
    return torch.cat(chunks) if chunks else B.new_empty(0)


def row_chunks(N: int, K: int) -> list[slice]:
    """Slices over N rows of K elements, each of at most CHUNK_ELEMENTS elements (one row at the least)."""
    rows = max(1, CHUNK_ELEMENTS // max(1, K))
    return [slice(start, min(start + rows, N)) for start in range(0, N, rows)]


def keep_mask(x: Tensor, p: float, seed: int) -> Tensor:
    """Which elements of x dropout keeps: those whose hash of (seed, flat index) is at least p 2^32.

    The hash is a 32-bit finaliser of xor-shifts and multiplications with the avalanche of Chris Wellons' lowbias32. The
    seed enters before it and again in its middle, so that the masks of two seeds are not permutations of each other.
    """
    index = torch.arange(x.numel(), device=x.device)
    before, middle = dropout_keys(seed)
    # The upper word of the index changes the keys, so elements from 2^32 on have other hashes.
    upper = (index >> 32) * _GOLDEN
    h = ((index & _WORD) + before + upper) & _WORD
    h = _multiply(h ^ (h >> 16), 0x7FEB352D)
    h = (h ^ (h >> 15)) ^ ((middle + upper) & _WORD)
    h = _multiply(h, 0x846CA68B)
    return ((h ^ (h >> 16)) >= dropout_threshold(p)).view(x.shape)


def dropout_keys(seed: int) -> tuple[int, int]:
    """The two 32-bit keys of a 64-bit seed."""
    low, high = seed & _WORD, (seed >> 32) & _WORD
    before = _mix(low + _mix(high + _GOLDEN))
    return before, _mix(before ^ low ^ 0x5BD1E995)


def dropout_threshold(p: float) -> int:
    """p 2^32, rounded, as a 32-bit word."""
    return min(round(p * 2**32), _WORD)


def _mix(word: int) -> int:
    word &= _WORD
    word = (word ^ (word >> 16)) * 0x7FEB352D & _WORD
    word = (word ^ (word >> 15)) * 0x846CA68B & _WORD
    return word ^ (word >> 16)


def _multiply(h: Tensor, factor: int) -> Tensor:
    """h * factor mod 2^32 in two steps, each of which fits 63 bits."""
    return (h * (factor & 0xFFFF) + ((h * (factor >> 16) & 0xFFFF) << 16)) & _WORD


def wide(x: Tensor) -> Tensor:
    """x in the dtype of its computation: float64 stays, all others become float32."""
    return x if x.dtype == torch.float64 else x.float()


# What Triton fuses in a step on a GPU (`rankwise.ops.triton.elementwise`).


def low_rank_grads_(
    dU: Tensor,
    dy: Tensor,
    U: Tensor,
    B: Tensor,
    scale: float,
    g: Tensor | None,
    folded: bool,
    y: Tensor | None,
    m: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """dz = g * dy; dU <- scale dz B; dB = scale dz^T U; dm_n = sum_t dy_tn y_tn / m_n, 0 where m_n is 0.

    ``folded``: B holds g B, dU = scale dy B, and dz is not needed. Without m, dm is the sum itself.
    """
    dz = dy if g is None or folded else (wide(dy) * g).to(dy.dtype)
    dU.copy_(scale * (wide(dz) @ wide(B)))
    dB = scale * (wide(dz).T @ wide(U))
    if g is not None and folded:
        dB = dB * g[:, None]
    dm = None if y is None else (wide(dy) * wide(y)).sum(0)
    if dm is not None and m is not None:
        dm = torch.where(m == 0, 0.0, dm / torch.where(m == 0, 1.0, m))
    return dB, dm, None if dz is dy else dz


def row_norms(squared: Tensor, cross: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """``||W + scale B A||`` per row from ``squared`` = ||W||^2 and ``cross`` = <W A^T, B>: float32 (N,)."""
    A32, B32 = A.float(), B.float()
    update = ((B32 @ (A32 @ A32.T)) * B32).sum(dim=1)
    # Rounding can give a value slightly below zero where the update cancels a row.
    return (squared + 2 * scale * cross + scale * scale * update).clamp_min(0).sqrt()


def gain(m: Tensor, norms: Tensor) -> Tensor:
    """``g = m / norms``, and 1 for a row of norm 0, which m cannot scale: (N,) in float32."""
    is_zero = norms == 0
    return torch.where(is_zero, 1.0, m / torch.where(is_zero, 1.0, norms))


def adapted_gain(W: Tensor, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float) -> Tensor:
    """``m / ||W + scale B A||`` per row."""
    return gain(m.float(), row_norms(squared, row_cross(W, A, B), A, B, scale))


def dequantize_gained_4bit(weight: PackedWeight, gain: Tensor, dtype: torch.dtype) -> Tensor:
    """gain * W' by rows, in ``dtype``."""
    return (gain[:, None] * dequantize_4bit(weight, torch.float32)).to(dtype)


def adapted_gain_4bit(
    weight: PackedWeight, squared: Tensor, A: Tensor, B: Tensor, m: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    """`adapted_gain` of W' rounded to ``dtype``."""
    return gain(m.float(), row_norms(squared, row_cross_4bit(weight, A, B, dtype), A, B, scale))


# Attention over a contiguous range of keys. B batch, Lq queries, Lk keys, H query heads, Hkv key heads, G = H / Hkv
# heads that share a key head, D size of a head; i a query, j a key. q (B, Lq, H, D); k, v (B, Lk, Hkv, D); start, end
# (B, Lq).
#
#     s_ij = scale <q_i, k_j>     lse_i = ln sum_j exp(s_ij)     P_ij = exp(s_ij - lse_i)     O = P V
#
# over start_i <= j < end_i.


def visible(start: Tensor | None, end: Tensor | None, shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """Whether query i sees key j, bool (B, Lq, Lk), for ``shape`` = (B, Lq, Lk): in any of R ranges (B, R, Lq)."""
    B, Lq, Lk = shape
    j = torch.arange(Lk, device=device)
    last = torch.arange(1, Lq + 1, device=device).expand(B, Lq) + (Lk - Lq) if end is None else end
    seen = j < last[..., None]
    seen = seen if start is None else seen & (j >= start[..., None])
    return seen if seen.dim() == 3 else seen.any(dim=1)


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
    g = grad.to(p.dtype)
    delta = (g * out.to(p.dtype)).sum(-1).transpose(1, 2)
    ds = p * (torch.einsum("bihd,bjhd->bhij", g, _shared(v, q)) - delta[..., None])
    dq = scale * torch.einsum("bhij,bjhd->bihd", ds, _shared(k, q))
    dk = scale * torch.einsum("bhij,bihd->bjhd", ds, q.to(p.dtype))
    dv = torch.einsum("bhij,bihd->bjhd", p, g)
    return dq.to(q.dtype).contiguous(), _summed(dk, k), _summed(dv, v)


def _weights(q: Tensor, k: Tensor, start: Tensor | None, end: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """P (B, H, Lq, Lk), zero where nothing is seen, and lse (B, H, Lq)."""
    seen = visible(start, end, (q.shape[0], q.shape[1], k.shape[1]), q.device)[:, None]
    s = scale * torch.einsum("bihd,bjhd->bhij", wide(q), _shared(k, q))
    s = s.masked_fill(~seen, float("-inf"))
    lse = s.logsumexp(-1)
    # A row without keys would be exp(-inf + inf). Any finite number in place of its lse gives zeros.
    return (s - lse.masked_fill(~seen.any(-1), 0.0)[..., None]).exp(), lse


def _shared(x: Tensor, q: Tensor) -> Tensor:
    """A key head for each query head: (B, Lk, Hkv, D) -> (B, Lk, H, D)."""
    return wide(x).repeat_interleave(q.shape[2] // x.shape[2], dim=2)


def _summed(x: Tensor, like: Tensor) -> Tensor:
    """The sum over the query heads of each key head: (B, Lk, H, D) -> (B, Lk, Hkv, D)."""
    B, Lk, Hkv, D = like.shape
    return x.reshape(B, Lk, Hkv, x.shape[2] // Hkv, D).sum(3).to(like.dtype)

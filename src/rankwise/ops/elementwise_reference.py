"""Element-wise operators of a training step in plain PyTorch: the specification of the native kernels.

Legend: T = rows (all leading dimensions together), N and D = columns, R = rank, V = vocabulary, C = rows with logits;
B, H, L = batch, heads, positions. float16 and bfloat16 are computed in float32 and rounded once at the end, unless the
formula says otherwise; float64 stays float64.

Arguments are checked by the public functions in ``rankwise.ops.elementwise``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from rankwise.constants import IGNORED
from rankwise.ops.elementwise_checks import check_targets, sum_dtype

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

"""Gated activations and their gradients. Nothing is overwritten, because other functions may have saved gate and up.

Legend: T = rows, N = columns.

The lower bound is the memory traffic: 6 T N bytes forward and 10 T N backward in bfloat16, 12 with the product, which
the next layer's backward pass may need.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from rankwise.ops.triton.tile import as_rows, launching_on, round_to

# Columns of a row per program, and its warps: 16 bytes per thread and tensor, the widest load there is.
_COLUMNS, _WARPS = 1024, 4

ROOT_HALF = tl.constexpr(math.sqrt(0.5))
ROOT_2_PI = tl.constexpr(math.sqrt(2 * math.pi))
STEEPNESS = tl.constexpr(2 * math.sqrt(2 / math.pi))
CUBIC = tl.constexpr(0.044715)


@triton.jit
def activated(x: tl.tensor, ACT: tl.constexpr) -> tl.tensor:
    """act(x) and act'(x), float32. gelu_tanh: 0.5 (1 + tanh(a / 2)) = sigmoid(a)."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        slope = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu_tanh":
        # Past 1e4 the sigmoid is 0 or 1, and the factor must not become infinite.
        square = tl.minimum(x * x, 1e4)
        s = tl.sigmoid(x * STEEPNESS * (1.0 + square * CUBIC))
        slope = s + x * s * (1.0 - s) * STEEPNESS * (1.0 + square * CUBIC * 3.0)
    else:
        s = 0.5 * (1.0 + tl.erf(x * ROOT_HALF))
        slope = s + x * tl.exp(-0.5 * x * x) / ROOT_2_PI
    return x * s, slope


@triton.jit
def glu_kernel(
    gate: tl.tensor,
    up: tl.tensor,
    out: tl.tensor,
    N: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """out = act(gate) * up, for COLUMNS elements of a row."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    a, _ = activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), ACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * N + column, round_to(a * b, out.dtype.element_ty), mask=inside)


@triton.jit
def glu_backward_kernel(
    dout: tl.tensor,
    gate: tl.tensor,
    up: tl.tensor,
    d_gate: tl.tensor,
    d_up: tl.tensor,
    product: tl.tensor,
    N: tl.tensor,
    dout_stride: tl.tensor,
    gate_stride: tl.tensor,
    up_stride: tl.tensor,
    ACT: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """d_gate = dout * up * act'(gate), d_up = dout * act(gate) and product = act(gate) * up, as `glu_kernel`."""
    row, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < N
    a, slope = activated(tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32), ACT)
    b = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(dout + row * dout_stride + column, mask=inside, other=0.0).to(tl.float32)
    place = row * N + column
    tl.store(d_gate + place, round_to(d * b * slope, d_gate.dtype.element_ty), mask=inside)
    tl.store(d_up + place, round_to(d * a, d_up.dtype.element_ty), mask=inside)
    if product is not None:
        tl.store(product + place, round_to(a * b, product.dtype.element_ty), mask=inside)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    """act(gate) * up."""
    out = gate.new_empty(gate.shape)
    if out.numel() == 0:
        return out
    gates, ups = as_rows(gate), as_rows(up)
    T, N = gates.shape
    with launching_on(gate.device):
        glu_kernel[(T, triton.cdiv(N, _COLUMNS))](
            gates, ups, out, N, gates.stride(0), ups.stride(0),
            ACT=act, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return out


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, with_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """dgate = dout up act'(gate); dup = dout act(gate); product = act(gate) up."""
    d_gate, d_up = (gate.new_empty(gate.shape) for _ in range(2))
    product = gate.new_empty(gate.shape) if with_product else None
    if gate.numel() == 0:
        return d_gate, d_up, product
    douts, gates, ups = as_rows(dout), as_rows(gate), as_rows(up)
    T, N = gates.shape
    with launching_on(gate.device):
        glu_backward_kernel[(T, triton.cdiv(N, _COLUMNS))](
            douts, gates, ups, d_gate, d_up, product, N, douts.stride(0), gates.stride(0), ups.stride(0),
            ACT=act, COLUMNS=_COLUMNS, num_warps=_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return d_gate, d_up, product

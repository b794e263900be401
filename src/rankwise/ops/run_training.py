"""The functions of `rankwise.ops.training` on real tensors: checks, then the native library or plain PyTorch."""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from rankwise.ops import checks_training as checks
from rankwise.ops import reference, reference_training, selection
from rankwise.ops.checks import DTYPES, check_dtype, check_weight
from rankwise.ops.packed_weight import PackedWeight

_NATIVE = (torch.float32, torch.bfloat16)


def low_rank_add_(y: Tensor, u: Tensor, B: Tensor, scale: float, g: Tensor | None, bias: Tensor | None) -> Tensor:
    checks.low_rank_add(y, u, B, g, bias)
    return _module(y).low_rank_add_(y, u, B, scale, g, bias)


def scaled_grad(dy: Tensor, y: Tensor | None, g: Tensor) -> tuple[Tensor, Tensor | None]:
    checks.scaled_grad(dy, y, g)
    return _module(dy).scaled_grad(dy, y, g)


def rms_norm(x: Tensor, w: Tensor, eps: float, offset: int, cast_first: bool) -> tuple[Tensor, Tensor]:
    checks.rms_norm(x, w, offset)
    return _module(x).rms_norm(x, w, eps, offset, cast_first)


def rms_norm_backward(
    dy: Tensor, x: Tensor, w: Tensor, rstd: Tensor, offset: int, residual_grad: Tensor | None
) -> Tensor:
    checks.rms_norm_backward(dy, x, w, rstd, offset, residual_grad)
    return _module(dy).rms_norm_backward(dy, x, w, rstd, offset, residual_grad)


def glu(gate: Tensor, up: Tensor, act: str) -> Tensor:
    checks.glu(gate, up, act)
    return _module(gate).glu(gate, up, act)


def glu_backward(
    dout: Tensor, gate: Tensor, up: Tensor, act: str, want_product: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    checks.glu(gate, up, act, dout)
    return _module(dout).glu_backward(dout, gate, up, act, want_product)


def rope(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    checks.rope(q, cos, sin)
    return _module(q).rope(q, cos, sin, inverse)


def rope_(q: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    checks.rope(q, cos, sin)
    return _module(q).rope_(q, cos, sin, inverse)


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
    checks.cross_entropy(logits, targets, label_smoothing, softcap, multiplier)
    return _module(logits).cross_entropy_(
        logits, targets, scale, label_smoothing, softcap, multiplier, want_grad, want_entropy, want_correct
    )


def dropout(x: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(x, x, p)
    return _module(x).dropout(x, p, seed)


def dropout_add_(dx: Tensor, z: Tensor, p: float, seed: int) -> Tensor:
    checks.dropout(dx, z, p)
    return _module(dx).dropout_add_(dx, z, p, seed)


def row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    checks.row_cross(W.shape, W.dtype, A, B, W.device)
    return _row_cross(W, A, B)


def _row_cross(W: Tensor, A: Tensor, B: Tensor) -> Tensor:
    # A transposed view, such as the weight of a Conv1D, would have to be copied whole.
    module = _module(W) if W.is_contiguous() or not W.is_cpu else reference_training
    return module.row_cross(W, A, B)


def row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    check_weight(weight)
    check_dtype(dtype, "the dtype asked for")
    codes = weight.codes
    checks.row_cross(weight.shape, dtype, A, B, codes.device)
    # Transforms wrap what is cut out of the weight here, and a kernel cannot read that.
    four_bit = reference if selection.transforms_functions() else selection.module_for(codes.device)
    if not weight.rows_are_blocks:
        return _row_cross(four_bit.dequantize_4bit(weight, dtype), A, B)
    if four_bit is not reference and selection.runs_triton(codes.device):
        from rankwise.ops.triton import row_cross

        return row_cross.row_cross_4bit(weight, A, B, dtype)
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        absmax = four_bit.dequantize_absmax(absmax, weight.nested_absmax, weight.offset)
    N, K = weight.shape
    sums, codes, absmax = [], codes.view(N, K // 2), absmax.view(N, K // weight.block_size)
    for rows in reference_training.row_chunks(N, K):
        shape = (rows.stop - rows.start, K)
        part = PackedWeight(codes[rows], absmax[rows].reshape(-1), shape, weight.quant_type, weight.block_size)
        sums.append(_row_cross(four_bit.dequantize_4bit(part, dtype), A, B[rows]))
    return torch.cat(sums) if sums else B.new_empty(0, dtype=torch.float32)


def _module(tensor: Tensor) -> ModuleType:
    """The module whose functions run on ``tensor``."""
    if selection.transforms_functions():
        return reference_training
    if tensor.is_cpu and tensor.dtype in _NATIVE and selection.native_on_cpu():
        from rankwise.ops.cpu import training

        return training
    return _triton(tensor) or reference_training


def _triton(tensor: Tensor) -> ModuleType | None:
    """The Triton kernels where they run on ``tensor``: CUDA, and for tests CPU tensors under its interpreter."""
    if tensor.dtype in DTYPES and (tensor.is_cuda or tensor.is_cpu) and selection.runs_triton(tensor.device):
        from rankwise.ops.triton import training

        return training
    return None

"""The operators as PyTorch sees them: schemas, fake implementations, gradients.

Defined through ``torch.library.Library`` rather than the ``custom_op`` decorator: a single-row product takes about
0.3 ms, and the decorator's wrapper costs a tenth of it.

Legend: T = rows of x, K = in features, N = out features.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rankwise.ops import elementwise_reference, reference, selection
from rankwise.ops.checks import (
    check_absmax,
    check_bias,
    check_codes,
    check_dtype,
    check_matrix,
    check_rows,
    check_type,
    check_weight,
)
from rankwise.ops.codes import NESTED_BLOCK
from rankwise.ops.elementwise_checks import row_cross_of
from rankwise.ops.elementwise_table import run
from rankwise.ops.packed_weight import PackedWeight, packed_shape
from rankwise.ops.selection import module_for

# `PackedWeight.parts`: a schema has no type for a value of our own.
_WEIGHT = (
    "Tensor codes, Tensor absmax, SymInt[] shape, str quant_type, int block_size, Tensor? nested_absmax, Tensor? offset"
)
_PARTS = 7

_library = torch.library.Library("rankwise", "DEF")
_library.define("quantize_4bit(Tensor w, str quant_type, int block_size) -> (Tensor, Tensor)")
_library.define(f"dequantize_4bit({_WEIGHT}, ScalarType dtype) -> Tensor")
_library.define("quantize_absmax(Tensor absmax) -> (Tensor, Tensor, Tensor)")
_library.define("dequantize_absmax(Tensor codes, Tensor nested_absmax, Tensor offset) -> Tensor")
_library.define(f"linear_4bit(Tensor x, {_WEIGHT}, Tensor? bias) -> Tensor")
_library.define(f"linear_4bit_input_grad(Tensor grad, {_WEIGHT}) -> Tensor")
_library.define(f"row_norms_4bit({_WEIGHT}, ScalarType dtype) -> Tensor")
_library.define(f"row_cross_4bit({_WEIGHT}, Tensor A, Tensor B, ScalarType dtype) -> Tensor")


def _quantize_4bit(w: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    check_type(quant_type, block_size)
    check_dtype(w.dtype, "the weight")
    return module_for(w.device).quantize_4bit(w, quant_type, block_size)


def run_dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    """`rankwise.ops.dequantize_weight` without the dispatcher."""
    check_weight(weight)
    check_dtype(dtype, "the dtype asked for")
    return module_for(weight.codes.device).dequantize_4bit(weight, dtype)


def _quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_absmax(absmax)
    return module_for(absmax.device).quantize_absmax(absmax)


def _dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    check_codes(codes, nested_absmax, offset)
    return module_for(codes.device).dequantize_absmax(codes, nested_absmax, offset)


def run_linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    """`rankwise.ops.linear_4bit` without gradients."""
    _check_linear(x, weight, bias)
    return module_for(weight.codes.device).linear_4bit(x, weight, bias)


def _linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    _check_input_grad(grad, weight)
    return module_for(weight.codes.device).linear_4bit_input_grad(grad, weight)


def _row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    _check_row_norms(weight, dtype)
    return module_for(weight.codes.device).row_norms_4bit(weight, dtype)


def run_row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    """`rankwise.ops.row_cross_4bit` without the dispatcher."""
    check_weight(weight)
    check_dtype(dtype, "the dtype asked for")
    codes = weight.codes
    row_cross_of(weight.shape, dtype, A, B, codes.device)
    # Transforms wrap what is cut out of the weight here, and a kernel cannot read that.
    four_bit = reference if selection.transforms_functions() else selection.module_for(codes.device)
    if not weight.rows_are_blocks:
        return run("row_cross", four_bit.dequantize_4bit(weight, dtype), A, B)
    if four_bit is not reference and selection.runs_triton(codes.device):
        from rankwise.ops.triton.row_cross import row_cross_4bit

        return row_cross_4bit(weight, A, B, dtype)
    absmax = weight.absmax
    if weight.nested_absmax is not None and weight.offset is not None:
        absmax = four_bit.dequantize_absmax(absmax, weight.nested_absmax, weight.offset)
    N, K = weight.shape
    sums, codes, absmax = [], codes.view(N, K // 2), absmax.view(N, K // weight.block_size)
    for rows in elementwise_reference.row_chunks(N, K):
        shape = (rows.stop - rows.start, K)
        part = PackedWeight(codes[rows], absmax[rows].reshape(-1), shape, weight.quant_type, weight.block_size)
        sums.append(run("row_cross", four_bit.dequantize_4bit(part, dtype), A, B[rows]))
    return torch.cat(sums) if sums else B.new_empty(0, dtype=torch.float32)


def _check_linear(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> None:
    check_weight(weight)
    check_rows(x, weight.shape, 1, weight.codes.device)
    check_bias(bias, x, weight.shape)


def _check_input_grad(grad: Tensor, weight: PackedWeight) -> None:
    check_weight(weight)
    check_rows(grad, weight.shape, 0, weight.codes.device)


def _check_row_norms(weight: PackedWeight, dtype: torch.dtype) -> None:
    check_matrix(weight.shape)
    check_weight(weight)
    check_dtype(dtype, "the dtype asked for")


def _fake_quantize_4bit(w: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    check_type(quant_type, block_size)
    check_dtype(w.dtype, "the weight")
    blocks = (w.numel() + block_size - 1) // block_size
    packed = w.new_empty(packed_shape(w.shape, block_size), dtype=torch.uint8)
    return packed, w.new_empty((blocks,), dtype=torch.float32)


def _fake_dequantize_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    check_weight(weight)
    check_dtype(dtype, "the dtype asked for")
    return weight.codes.new_empty(tuple(weight.shape), dtype=dtype)


def _fake_quantize_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    check_absmax(absmax)
    nested = (absmax.numel() + NESTED_BLOCK - 1) // NESTED_BLOCK
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty((nested,)), absmax.new_empty(())


def _fake_dequantize_absmax(codes: Tensor, nested_absmax: Tensor, offset: Tensor) -> Tensor:
    check_codes(codes, nested_absmax, offset)
    return codes.new_empty(codes.shape, dtype=torch.float32)


def _fake_linear_4bit(x: Tensor, weight: PackedWeight, bias: Tensor | None) -> Tensor:
    _check_linear(x, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _fake_linear_4bit_input_grad(grad: Tensor, weight: PackedWeight) -> Tensor:
    _check_input_grad(grad, weight)
    return grad.new_empty((*grad.shape[:-1], weight.shape[1]))


def _fake_row_norms_4bit(weight: PackedWeight, dtype: torch.dtype) -> Tensor:
    _check_row_norms(weight, dtype)
    return weight.codes.new_empty((weight.shape[0],), dtype=torch.float32)


def _fake_row_cross_4bit(weight: PackedWeight, A: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    return A.new_empty((weight.shape[0],), dtype=torch.float32)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, shape, quant_type, block_size, nested_absmax, offset = inputs[: 1 + _PARTS]
    ctx.save_for_backward(codes, absmax, nested_absmax, offset)
    ctx.format = (shape, quant_type, block_size)


def _saved_parts(ctx: Any) -> tuple[Any, ...]:
    codes, absmax, nested_absmax, offset = ctx.saved_tensors
    return codes, absmax, *ctx.format, nested_absmax, offset


def _linear_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.rankwise.linear_4bit_input_grad(grad, *_saved_parts(ctx))
    if ctx.needs_input_grad[-1]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return grad_x, *[None] * _PARTS, grad_bias


def _input_grad_gradient(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.rankwise.linear_4bit(grad, *_saved_parts(ctx), None), *[None] * _PARTS


def _of_parts(run: Callable[..., Any], first: int) -> Callable[..., Any]:
    """``run``, which takes a `PackedWeight`, as the operator calls it: with the weight's parts from ``first`` on."""

    def call(*inputs: Any) -> Any:
        weight = PackedWeight(*inputs[first : first + _PARTS])
        return run(*inputs[:first], weight, *inputs[first + _PARTS :])

    return call


for _name, _run, _fake in (
    ("quantize_4bit", _quantize_4bit, _fake_quantize_4bit),
    ("dequantize_4bit", _of_parts(run_dequantize_4bit, 0), _of_parts(_fake_dequantize_4bit, 0)),
    ("quantize_absmax", _quantize_absmax, _fake_quantize_absmax),
    ("dequantize_absmax", _dequantize_absmax, _fake_dequantize_absmax),
    ("linear_4bit", _of_parts(run_linear_4bit, 1), _of_parts(_fake_linear_4bit, 1)),
    ("linear_4bit_input_grad", _of_parts(_linear_4bit_input_grad, 1), _of_parts(_fake_linear_4bit_input_grad, 1)),
    ("row_norms_4bit", _of_parts(_row_norms_4bit, 0), _of_parts(_fake_row_norms_4bit, 0)),
    ("row_cross_4bit", _of_parts(run_row_cross_4bit, 0), _of_parts(_fake_row_cross_4bit, 0)),
):
    _library.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankwise::{_name}", _fake, lib=_library)

torch.library.register_autograd("rankwise::linear_4bit", _linear_gradient, setup_context=_save, lib=_library)
torch.library.register_autograd(
    "rankwise::linear_4bit_input_grad", _input_grad_gradient, setup_context=_save, lib=_library
)

"""The table of operators, one row each, and the choice of a call's implementation.

A row holds the check of the arguments, the choice of the module that runs, and the shapes of the results. The schema
follows from the annotations of the reference. The modules of the native library and of Triton have functions of the
same names.

Calls with plain tensors go directly to one of the modules, since PyTorch's dispatcher would cost more than some of the
kernels. Traced tensors (FakeTensor, ``torch.compile``) use the operators of ``torch.ops.rankwise``, which are made from
the rows. A schema has no type for a 4-bit weight and no absent result: there a `PackedWeight` is given as its parts,
and an absent result is an empty tensor. The operators are defined with ``torch.library.Library``, since the wrapper of
the ``custom_op`` decorator takes a tenth of the time of a single-row product.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from rankwise.compat.torch import Ctx
from rankwise.constants import NESTED_BLOCK
from rankwise.ops import checks, reference, selection
from rankwise.ops.cpu import attention as native_attention
from rankwise.ops.packed_weight import PackedWeight, packed_shape

PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE = (torch.float32, torch.bfloat16)
# The arguments of `PackedWeight.parts` in the notation of a schema.
_PARTS = {
    "codes": Tensor,
    "absmax": Tensor,
    "shape": list[int],
    "quant_type": str,
    "block_size": int,
    "nested_absmax": Tensor | None,
    "offset": Tensor | None,
    "order": Tensor | None,
}
# Types of an operator's results, and of its arguments.
Results = Tensor | tuple[Tensor, ...] | None
Argument = Tensor | PackedWeight | Sequence[int] | torch.dtype | str | float | bool | None
_module = functools.cache(importlib.import_module)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Operator:
    """One row of the table. Its functions take all arguments of the operator."""

    # Raises QuantizationError for invalid arguments.
    check: Callable[..., None]
    # Returns the module whose function of the operator's name runs on these arguments.
    choose: Callable[..., ModuleType]
    # Empty tensors like the results; None for an operator that writes into its first argument and gives it back.
    results: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    # Indices of the results that are None with these arguments.
    absent: Callable[..., set[int]] | None = None
    # Whether an operator with results also writes into its first argument.
    writes: bool = False
    # What autograd saves, and the gradients of the inputs. Without them the operator has none.
    gradient: tuple[Callable[..., None], Callable[..., tuple[Tensor | None, ...]]] | None = None


def call(name: str, *arguments: Argument) -> Any:
    """The operator's results for all of its arguments; an absent one is None."""
    first = arguments[0]
    if type(first) in PLAIN and not torch.compiler.is_compiling():
        return run(name, *arguments)
    operator, found = OPERATORS[name], getattr(torch.ops.rankwise, name)(*arguments)
    if operator.results is None:
        return first
    if operator.absent is None:
        return found
    absent = operator.absent(*arguments)
    return tuple(None if index in absent else result for index, result in enumerate(found))


def run(name: str, *arguments: Argument) -> Any:
    """The same on real tensors: the check, then the native library, Triton or plain PyTorch."""
    operator = OPERATORS[name]
    operator.check(*arguments)
    return getattr(operator.choose(*arguments), name)(*arguments)


def module_for(tensor: Tensor, *_: object) -> ModuleType:
    """The module of element-wise functions that runs on ``tensor``."""
    if selection.transforms_functions():
        return reference
    if tensor.is_cpu and tensor.dtype in _NATIVE and selection.native_on_cpu():
        return _module("rankwise.ops.cpu.elementwise")
    # On CUDA, and for tests on CPU tensors under Triton's interpreter.
    if tensor.dtype in checks.DTYPES and (tensor.is_cuda or tensor.is_cpu) and selection.runs_triton(tensor.device):
        return _module("rankwise.ops.triton.elementwise")
    return reference


def _of_weight(weight: PackedWeight, *_: object) -> ModuleType:
    return selection.module_for(weight.codes.device)


def _of_first(first: Tensor, *_: object) -> ModuleType:
    return selection.module_for(first.device)


def _of_second(_: Tensor, weight: PackedWeight, *__: object) -> ModuleType:
    return selection.module_for(weight.codes.device)


def _for_row_cross(weight: PackedWeight, *_: object) -> ModuleType:
    """The module for `row_cross`. A kernel cannot read slices of a weight under a transform of ``torch.func``."""
    return reference if selection.transforms_functions() else _of_weight(weight)


def _for_card(first: Tensor | PackedWeight, *_: object) -> ModuleType:
    if isinstance(first, Tensor) and first.dtype not in checks.DTYPES:
        return reference
    device = first.device if isinstance(first, Tensor) else first.codes.device
    return _module("rankwise.ops.triton.elementwise") if selection.runs_triton(device) else reference


def _for_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> ModuleType:
    why = native_attention.obstacle(q, k, v, scale)
    if why is None:
        return native_attention
    selection.say_once("RW608", f"compiled attention runs in plain PyTorch, slowly: {why}")
    return reference


def _as(x: Tensor, *_: object) -> Tensor:
    return x.new_empty(x.shape)


def _wide(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _rope(q: Tensor, *_: object) -> Tensor:
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D)).transpose(1, 2)


def _sums(logits: Tensor, *_: object) -> tuple[Tensor, ...]:
    dtypes = (checks.sum_dtype(logits), checks.sum_dtype(logits), torch.int64)
    return tuple(logits.new_empty((), dtype=dtype) for dtype in dtypes)


def _quantized(w: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    packed = w.new_empty(packed_shape(w.shape, block_size), dtype=torch.uint8)
    return packed, w.new_empty((-(-w.numel() // block_size),), dtype=torch.float32)


def _nested(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    nested = -(-absmax.numel() // NESTED_BLOCK)
    return absmax.new_empty(absmax.shape, dtype=torch.uint8), absmax.new_empty((nested,)), absmax.new_empty(())


def _per_row(weight: PackedWeight, *_: object) -> Tensor:
    return weight.codes.new_empty((weight.shape[0],), dtype=torch.float32)


def _attended(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, Lq, H, _D = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, Lq), dtype=torch.float32)


def _save_weight(ctx: Ctx[tuple[Sequence[int], str, int]], inputs: tuple[Any, ...], output: Tensor) -> None:
    _, codes, absmax, shape, quant_type, block_size, nested_absmax, offset, order = inputs[: 1 + len(_PARTS)]
    ctx.save_for_backward(codes, absmax, nested_absmax, offset, order)
    ctx.kept = (shape, quant_type, block_size)


def _saved_parts(ctx: Ctx[tuple[Sequence[int], str, int]]) -> tuple[Argument, ...]:
    codes, absmax, nested_absmax, offset, order = ctx.saved_tensors
    return codes, absmax, *ctx.kept, nested_absmax, offset, order


def _linear_gradient(ctx: Ctx[tuple[Sequence[int], str, int]], grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = torch.ops.rankwise.linear_4bit_input_grad(grad, *_saved_parts(ctx))
    if ctx.needs_input_grad[-1]:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1))) if grad.dim() > 1 else grad
    return grad_x, *[None] * len(_PARTS), grad_bias


def _input_grad_gradient(ctx: Ctx[tuple[Sequence[int], str, int]], grad: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.rankwise.linear_4bit(grad, *_saved_parts(ctx), None), *[None] * len(_PARTS)


def _save_attention(ctx: Ctx[float], inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, start, end, ctx.kept = inputs
    ctx.save_for_backward(q, k, v, *output, start, end)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _attention_gradient(ctx: Ctx[float], grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    return *torch.ops.rankwise.attention_backward(grad, *ctx.saved_tensors, ctx.kept), None, None, None


_elementwise = functools.partial(Operator, choose=module_for)
_card = functools.partial(Operator, choose=_for_card)

OPERATORS = {
    "low_rank_add_": _elementwise(check=checks.low_rank_add_),
    "scaled_grad": _elementwise(
        check=checks.scaled_grad,
        results=lambda dy, y, g: (_as(dy), _wide(dy, g.shape)),
        absent=lambda dy, y, g: {1} if y is None else set(),
    ),
    "rms_norm": _elementwise(check=checks.rms_norm, results=lambda x, *_: (_as(x), _wide(x, (x[..., 0].numel(),)))),
    "rms_norm_backward": _elementwise(check=checks.rms_norm_backward, results=_as),
    "glu": _elementwise(check=checks.glu, results=_as),
    "glu_backward": _elementwise(
        check=checks.glu_backward,
        results=lambda dout, gate, *_: (_as(gate), _as(gate), _as(gate)),
        absent=lambda dout, gate, up, act, want_product: set() if want_product else {2},
    ),
    "rope": _elementwise(check=checks.rope, results=_rope),
    "rope_": _elementwise(check=checks.rope),
    "cross_entropy_": _elementwise(
        check=checks.cross_entropy_,
        results=_sums,
        absent=lambda *arguments: {index for index, is_wanted in zip((1, 2), arguments[-2:]) if not is_wanted},
        writes=True,
    ),
    "row_cross": _elementwise(
        check=checks.row_cross, results=lambda W, *_: W.new_empty((W.shape[0],), dtype=torch.float32)
    ),
    "dropout": _elementwise(check=checks.dropout, results=_as),
    "dropout_add_": _elementwise(check=checks.dropout_add_),
    "quantize_4bit": Operator(check=checks.quantize_4bit, choose=_of_first, results=_quantized),
    "dequantize_4bit": Operator(
        check=checks.dequantize_4bit,
        choose=_of_weight,
        results=lambda weight, dtype: weight.codes.new_empty(tuple(weight.shape), dtype=dtype),
    ),
    "quantize_absmax": Operator(check=checks.check_absmax, choose=_of_first, results=_nested),
    "dequantize_absmax": Operator(
        check=checks.check_codes,
        choose=_of_first,
        results=lambda codes, *_: codes.new_empty(codes.shape, dtype=torch.float32),
    ),
    "linear_4bit": Operator(
        check=checks.linear_4bit,
        choose=_of_second,
        results=lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
        gradient=(_save_weight, _linear_gradient),
    ),
    "linear_4bit_input_grad": Operator(
        check=checks.linear_4bit_input_grad,
        choose=_of_second,
        results=lambda grad, weight: grad.new_empty((*grad.shape[:-1], weight.shape[1])),
        gradient=(_save_weight, _input_grad_gradient),
    ),
    "row_norms_4bit": Operator(check=checks.row_norms_4bit, choose=_of_weight, results=_per_row),
    "row_cross_4bit": Operator(check=checks.row_cross_4bit, choose=_for_row_cross, results=_per_row),
    "low_rank_grads_": _card(
        check=checks.low_rank_grads_,
        results=lambda dU, dy, U, B, *_: (_wide(B, B.shape), _wide(dy, dy.shape[1:]), _as(dy)),
        absent=lambda dU, dy, U, B, scale, g, folded, y, m: {
            *([] if y is not None else [1]),
            *([] if g is not None and not folded else [2]),
        },
        writes=True,
    ),
    "adapted_gain": _card(
        check=checks.adapted_gain, results=lambda W, *_: W.new_empty((W.shape[0],), dtype=torch.float32)
    ),
    "adapted_gain_4bit": _card(check=checks.adapted_gain_4bit, results=_per_row),
    "dequantize_gained_4bit": _card(
        check=checks.dequantize_gained_4bit,
        results=lambda weight, gain, dtype: weight.codes.new_empty(tuple(weight.shape), dtype=dtype),
    ),
    "attention_forward": Operator(
        check=checks.attention_forward,
        choose=lambda q, k, v, start, end, scale: _for_attention(q, k, v, scale),
        results=_attended,
        gradient=(_save_attention, _attention_gradient),
    ),
    "attention_backward": Operator(
        check=lambda grad, q, k, v, out, lse, start, end, scale: checks.attention_forward(q, k, v, start, end, scale),
        choose=lambda grad, q, k, v, out, lse, start, end, scale: _for_attention(q, k, v, scale),
        results=lambda grad, q, k, v, *_: (_as(q), _as(k), _as(v)),
    ),
}


def _parameters(name: str) -> list[inspect.Parameter]:
    """The parameters of the reference, with a 4-bit weight given as its parts."""
    found: list[inspect.Parameter] = []
    for parameter in inspect.signature(getattr(reference, name), eval_str=True).parameters.values():
        parts = _PARTS if parameter.annotation is PackedWeight else {parameter.name: parameter.annotation}
        found += [inspect.Parameter(part, parameter.kind, annotation=kind) for part, kind in parts.items()]
    return found


def _schema(name: str, operator: Operator) -> str:
    """The operator's schema, from the annotations of the reference."""
    parameters = _parameters(name)
    given = inspect.signature(getattr(reference, name), eval_str=True).return_annotation
    if operator.results is None:
        given = None
    elif get_origin(given) is tuple:
        given = tuple[(Tensor,) * len(get_args(given))]  # type: ignore[misc]

    def prototype() -> None: ...

    prototype.__signature__ = inspect.Signature(parameters, return_annotation=given)  # type: ignore[attr-defined]
    mutated = {parameters[0].name} if operator.results is None or operator.writes else ()
    return name + torch.library.infer_schema(prototype, mutates_args=mutated)


def _of_parts(name: str, run: Callable[..., Results]) -> Callable[..., Results]:
    """``run``, which takes a `PackedWeight`, as a function of its parts."""
    names = [parameter.name for parameter in _parameters(name)]
    if "absmax" not in names or "quant_type" not in names:
        return run
    first = names.index("codes")
    last = first + len(_PARTS)
    return lambda *inputs: run(*inputs[:first], PackedWeight(**dict(zip(_PARTS, inputs[first:last]))), *inputs[last:])


def _real(name: str, operator: Operator) -> Callable[..., Results]:
    def implementation(*arguments: Any) -> Results:
        found = run(name, *arguments)
        if operator.results is None:
            return None
        return _filled(found, arguments[0]) if operator.absent is not None else found

    return implementation


def _fake(operator: Operator) -> Callable[..., Results]:
    def implementation(*arguments: Any) -> Results:
        operator.check(*arguments)
        if operator.results is None:
            return None
        found, absent = operator.results(*arguments), operator.absent
        if absent is None:
            return found
        left_out = absent(*arguments)
        return _filled([None if index in left_out else one for index, one in enumerate(found)], arguments[0])

    return implementation


def _filled(results: Sequence[Tensor | None], like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty((0,)) if result is None else result for result in results)


_library = torch.library.Library("rankwise", "DEF")
for _name, _operator in OPERATORS.items():
    _library.define(_schema(_name, _operator))
    _library.impl(_name, _of_parts(_name, _real(_name, _operator)), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankwise::{_name}", _of_parts(_name, _fake(_operator)), lib=_library)
    if _operator.gradient is not None:
        _save, _backward = _operator.gradient
        torch.library.register_autograd(f"rankwise::{_name}", _backward, setup_context=_save, lib=_library)

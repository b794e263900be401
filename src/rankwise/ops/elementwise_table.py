"""The element-wise operators, one row each, and how a call finds its implementation.

A row holds what the arguments must fulfil and what the results look like. The reference gives the schema by its
annotations; `rankwise.ops.cpu.elementwise` and `rankwise.ops.triton.elementwise` have the same functions under the same
names. Plain tensors go straight to one of the three: PyTorch's dispatcher would cost more than some of the kernels.
Traced tensors (FakeTensor, ``torch.compile``) go through operators that are made from the rows here. An operator always
gives as many tensors as its schema says, so an absent result is an empty tensor there.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, get_args, get_origin

import torch
from torch import Tensor

from rankwise.ops import elementwise_checks as checks
from rankwise.ops import elementwise_reference as reference
from rankwise.ops import selection
from rankwise.ops.checks import DTYPES

_PLAIN = (Tensor, torch.nn.Parameter)
_NATIVE = (torch.float32, torch.bfloat16)


@dataclasses.dataclass(frozen=True)
class Operator:
    """The functions of a row take all arguments of the operator."""

    # Raises QuantizationError (RW620) for arguments that do not fit.
    check: Callable[..., None]
    # Empty tensors like the results; None for an operator that writes into its first argument and gives it back.
    results: Callable[..., Tensor | tuple[Tensor, ...]] | None = None
    # Of several results those that these arguments leave out, by index.
    absent: Callable[..., set[int]] | None = None


def _as(x: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape)


def _wide(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.new_empty(shape, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)


def _rope(q: Tensor, *_: Any) -> Tensor:
    B, H, L, D = q.shape
    return q.new_empty((B, L, H, D)).transpose(1, 2)


def _sums(logits: Tensor, *_: Any) -> tuple[Tensor, ...]:
    dtypes = (checks.sum_dtype(logits), checks.sum_dtype(logits), torch.int64)
    return tuple(logits.new_empty((), dtype=dtype) for dtype in dtypes)


OPERATORS = {
    "low_rank_add_": Operator(checks.low_rank_add_),
    "scaled_grad": Operator(
        checks.scaled_grad,
        lambda dy, y, g: (_as(dy), _wide(dy, g.shape)),
        lambda dy, y, g: {1} if y is None else set(),
    ),
    "rms_norm": Operator(checks.rms_norm, lambda x, *_: (_as(x), _wide(x, (x[..., 0].numel(),)))),
    "rms_norm_backward": Operator(checks.rms_norm_backward, _as),
    "glu": Operator(checks.glu, _as),
    "glu_backward": Operator(
        checks.glu_backward,
        lambda dout, gate, *_: (_as(gate), _as(gate), _as(gate)),
        lambda dout, gate, up, act, want_product: set() if want_product else {2},
    ),
    "rope": Operator(checks.rope, _rope),
    "rope_": Operator(checks.rope),
    "cross_entropy_": Operator(
        checks.cross_entropy_,
        _sums,
        lambda *arguments: {index for index, is_wanted in zip((1, 2), arguments[-2:]) if not is_wanted},
    ),
    "row_cross": Operator(checks.row_cross, lambda W, *_: W.new_empty((W.shape[0],), dtype=torch.float32)),
    "dropout": Operator(checks.dropout, _as),
    "dropout_add_": Operator(checks.dropout_add_),
}
# Operators that write into their first argument besides what they give.
_ALSO_WRITE = ("cross_entropy_",)


def call(name: str, *arguments: Any) -> Any:
    """The operator's results for all of its arguments; an absent one is None."""
    first = arguments[0]
    if type(first) in _PLAIN and not torch.compiler.is_compiling():
        return run(name, *arguments)
    operator, found = OPERATORS[name], getattr(torch.ops.rankwise, name)(*arguments)
    if operator.results is None:
        return first
    if operator.absent is None:
        return found
    absent = operator.absent(*arguments)
    return tuple(None if index in absent else result for index, result in enumerate(found))


def run(name: str, *arguments: Any) -> Any:
    """The same on real tensors: the check, then the native library, Triton or plain PyTorch."""
    OPERATORS[name].check(*arguments)
    return getattr(module_for(arguments[0]), name)(*arguments)


def module_for(tensor: Tensor) -> ModuleType:
    """The module whose functions run on ``tensor``."""
    if selection.transforms_functions():
        return reference
    if tensor.is_cpu and tensor.dtype in _NATIVE and selection.native_on_cpu():
        return importlib.import_module("rankwise.ops.cpu.elementwise")
    # On CUDA, and for tests on CPU tensors under Triton's interpreter.
    if tensor.dtype in DTYPES and (tensor.is_cuda or tensor.is_cpu) and selection.runs_triton(tensor.device):
        return importlib.import_module("rankwise.ops.triton.elementwise")
    return reference


def _schema(name: str, operator: Operator) -> str:
    """From the annotations of the reference."""
    signature = inspect.signature(getattr(reference, name), eval_str=True)
    given = signature.return_annotation
    if operator.results is None:
        given = None
    elif get_origin(given) is tuple:
        given = tuple[(Tensor,) * len(get_args(given))]  # type: ignore[misc]

    def prototype() -> None: ...

    prototype.__signature__ = signature.replace(return_annotation=given)  # type: ignore[attr-defined]
    writes = operator.results is None or name in _ALSO_WRITE
    mutated = {next(iter(signature.parameters))} if writes else ()
    return name + torch.library.infer_schema(prototype, mutates_args=mutated)


def _real(name: str, operator: Operator) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        found = run(name, *arguments)
        if operator.results is None:
            return None
        return _filled(found, arguments[0]) if isinstance(found, tuple) else found

    return implementation


def _fake(operator: Operator) -> Callable[..., Any]:
    def implementation(*arguments: Any) -> Any:
        operator.check(*arguments)
        if operator.results is None:
            return None
        found, absent = operator.results(*arguments), operator.absent
        if absent is None:
            return found
        left_out = absent(*arguments)
        return _filled([None if index in left_out else one for index, one in enumerate(found)], arguments[0])

    return implementation


def _filled(results: Any, like: Tensor) -> tuple[Tensor, ...]:
    return tuple(like.new_empty((0,)) if result is None else result for result in results)


_library = torch.library.Library("rankwise", "FRAGMENT")
for _name, _operator in OPERATORS.items():
    _library.define(_schema(_name, _operator))
    _library.impl(_name, _real(_name, _operator), "CompositeExplicitAutograd")
    torch.library.register_fake(f"rankwise::{_name}", _fake(_operator), lib=_library)

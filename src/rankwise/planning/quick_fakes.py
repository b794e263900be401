"""Operations on fake tensors without the fake mode's overhead.

The fake mode looks up each operation in its cache, under a key of everything that a compiler may need of the arguments,
and runs custom operators in Python without a cache. Both take most of a dry run's time. Here results are cached under a
smaller key, with the same shapes and storages.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from rankwise.compat.torch import (
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    fake_mode,
    foreach_norm,
    foreach_sqrt,
    in_kernel_invocation_manager,
    storage_address,
    to_copy,
    unsafe_view,
)

_aten = torch.ops.aten
_CPU = torch.device("cpu")
# Positional arguments of an operation.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Operations whose results share the storage of the first argument; their meta kernels are fast.
VIEWS = frozenset(
    {
        _aten.alias.default,
        _aten.detach.default,
        _aten.expand.default,
        _aten.permute.default,
        _aten.slice.Tensor,
        _aten.split.Tensor,
        _aten.split_with_sizes.default,
        _aten.t.default,
        _aten.transpose.int,
        _aten.unsqueeze.default,
        _aten.view.default,
        unsafe_view.default,
    }
)
# Operations that return their first argument.
IN_PLACE = frozenset(
    {_aten.add_.Tensor, _aten.addmm_.default, _aten.copy_.default, _aten.mul_.Tensor, _aten.zero_.default}
)
# Operations whose results have storages of their own, as those of all rankwise operators have.
NEW = frozenset(
    {
        to_copy.default,
        _aten.add.Tensor,
        _aten.cat.default,
        _aten.clamp_min.default,
        _aten.clone.default,
        _aten.div.Tensor,
        _aten.empty.memory_format,
        _aten.empty_like.default,
        _aten.eq.Scalar,
        _aten.linalg_vector_norm.default,
        _aten.mm.default,
        _aten.mul.Tensor,
        _aten.new_empty.default,
        _aten.ones.default,
        _aten.pow.Tensor_Scalar,
        _aten.scalar_tensor.default,
        _aten.sqrt.default,
        _aten.sum.dim_IntList,
        _aten.where.self,
        _aten.zeros.default,
        _aten.zeros_like.default,
    }
)
# {operation on a list of tensors: the operation on one tensor}.
EACH = {foreach_norm.Scalar: _aten.linalg_vector_norm.default, foreach_sqrt.default: _aten.sqrt.default}


@dataclasses.dataclass(frozen=True)
class _Made:
    """A function that creates a result; ``is_tuple``: the result is several tensors."""

    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    is_tuple: bool


class QuickFakes:
    """Caches results (shapes, strides, dtypes) under a key of their arguments (the same facts, and numbers)."""

    def __init__(self) -> None:
        self._seen: dict[tuple[object, ...], _Made | None] = {}

    def __call__(self, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        """The result, or NotImplemented where the fake mode must compute it."""
        mode = fake_mode()
        if mode is None:
            return NotImplemented
        if func in IN_PLACE and _is_fake_on_cpu(args[0]):
            return args[0]
        if func in VIEWS and _is_fake_on_cpu(args[0]):
            with in_kernel_invocation_manager(mode):
                made = func(*args, **kwargs)
            return _fake(made, mode) if isinstance(made, Tensor) else [_fake(item, mode) for item in made]
        if func in EACH:
            return self._of_each(EACH[func], args, kwargs)
        if _changes_a_list(func) and all(map(_is_fake_on_cpu, args[0])):
            return None
        if func not in NEW and func.namespace != "rankwise":
            return NotImplemented
        return self._remembered(mode, func, args, kwargs)

    def _of_each(self, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        made = []
        for tensor in args[0]:
            result = self(func, (tensor, *args[1:]), kwargs)
            if result is NotImplemented:
                return NotImplemented
            made.append(result)
        return made

    def _remembered(self, mode: FakeTensorMode, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        try:
            key = (func, _described(args), _described(kwargs.items()))
            is_known = key in self._seen
        except TypeError:
            return NotImplemented
        if not is_known:
            result = func(*args, **kwargs)
            made = _made_from(result, args)
            if made is not NotImplemented:
                self._seen[key] = made
            return result
        made = self._seen[key]
        if made is None:
            return None
        with in_kernel_invocation_manager(mode):
            tensors = [
                torch.empty_strided(shape, stride, dtype=dtype, device="meta") for shape, stride, dtype in made.tensors
            ]
        fakes = tuple(_fake(tensor, mode) for tensor in tensors)
        return fakes if made.is_tuple else fakes[0]


def _changes_a_list(func: OpOverload) -> bool:
    return func.namespace == "aten" and re.fullmatch(r"_foreach_\w+_", func.overloadpacket.__name__) is not None


def _described(values: Iterable[object]) -> tuple[object, ...]:
    """A key for the arguments. Raises TypeError for a tensor that has values or is on another device."""
    return tuple(map(_description, values))


def _description(value: object) -> object:
    if isinstance(value, Tensor):
        if not _is_fake_on_cpu(value):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return _described(value)
    # The type is part of the key, since 1, 1.0 and True are equal but give different results.
    return type(value), value


def _made_from(result: Any, args: Args) -> Any:
    """How to create such a result again; None where the result is None, NotImplemented for any other type."""
    if result is None:
        return None
    tensors = result if isinstance(result, tuple) else (result,)
    given = {storage_address(item.untyped_storage()) for item in args if isinstance(item, Tensor)}
    if not all(
        _is_fake_on_cpu(tensor) and storage_address(tensor.untyped_storage()) not in given for tensor in tensors
    ):
        return NotImplemented
    return _Made(tuple((item.shape, item.stride(), item.dtype) for item in tensors), isinstance(result, tuple))


def _is_fake_on_cpu(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device == _CPU


def _fake(made: Tensor, mode: FakeTensorMode) -> Tensor:
    return FakeTensor(mode, made, _CPU)

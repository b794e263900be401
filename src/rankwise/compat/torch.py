"""The private parts of torch that rankwise uses.

Functions that run before every operation are torch's builtins under other names, since with cold caches a wrapper or a
module lookup takes microseconds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch._ops import OpOverload as OpOverload
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode
from torch._subclasses.fake_tensor import in_kernel_invocation_manager as in_kernel_invocation_manager
from torch.multiprocessing.reductions import StorageWeakRef as StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_iter as tree_iter
from torch.utils.weak import WeakTensorKeyDictionary as WeakTensorKeyDictionary

Kept = TypeVar("Kept")

# --- fake and functional tensors ---

# `FakeTensor`, `FakeTensorMode`: shapes without values, for the dry run. `DispatchMode`: the dry run sees every
# operation, an `OpOverload`. `in_kernel_invocation_manager`: a kernel sees a fake tensor as the meta tensor that it
# wraps. `tree_iter`: the tensors in nested arguments. `StorageWeakRef`: a storage's identity that does not keep its
# memory. `WeakTensorKeyDictionary`: notes on a tensor that are not saved with it and go with it.


class DispatchMode(TorchDispatchMode):
    """A mode that torch calls directly. It wraps others to keep its compiler away, in two calls for each operation."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


def is_fake(value: object) -> bool:
    return isinstance(value, FakeTensor)


def mode_of(tensor: Tensor) -> FakeTensorMode | None:
    """The fake mode of the tensor, or None for a real one."""
    return tensor.fake_mode if isinstance(tensor, FakeTensor) else None


# --- sharded models ---

# A sharded tensor is a DTensor, and a module whose weights FSDP2 gathers gets a new class. Both are recognised by their
# attributes, since importing torch.distributed.tensor takes seconds.


def is_sharded(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def own_part(tensor: Tensor) -> Tensor:
    """This process's rows of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def shard_of(tensor: Tensor) -> Tensor:
    """As `own_part`, without an operation that autograd or a dispatch mode would see."""
    return tensor._local_tensor if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def own_rows(tensor: Tensor, like: Any) -> Tensor:
    """A copy of the rows that this process holds of a tensor that is sharded like ``like``."""
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, like.device_mesh, like.placements, src_data_rank=None).to_local().clone()


def rows_of_all(rows: Tensor, like: Any) -> Tensor:
    """The whole of a tensor that is sharded like ``like``; this process has ``rows``. Every process must call this."""
    from torch.distributed.tensor import DTensor

    shape = torch.Size((like.shape[0], *rows.shape[1:]))
    stride = torch.empty(shape, device="meta").stride()
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(rows, mesh, placements, run_check=False, shape=shape, stride=stride).full_tensor()


@contextmanager
def fake_processes(count: int) -> Iterator[Any]:
    """A context in which this process is the first of ``count``, whose collectives return tensors without values.
    Yields the mesh of all of them."""
    import torch.distributed as dist

    # They register what collectives make of fake tensors, and the backend.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield dist.device_mesh.init_device_mesh("cpu", (count,))
    finally:
        dist.destroy_process_group()


@contextmanager
def shards_seen(
    resized: Callable[[torch.UntypedStorage], None], apart: Callable[[], AbstractContextManager[None]]
) -> Iterator[None]:
    """A context in which ``resized`` is called with each resized storage, as when FSDP2 frees and fills weights. The
    whole tensors from which DTensor derives shapes, and which no process holds, are made within ``apart()``."""
    from torch.distributed.tensor._sharding_prop import ShardingPropagator

    resize, learn = torch.UntypedStorage.resize_, ShardingPropagator._propagate_tensor_meta_non_cached

    def resize_and_tell(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        result = resize(storage, size)
        resized(storage)
        return result

    def learn_apart(*given: Any) -> Any:
        with apart():
            return learn(*given)

    torch.UntypedStorage.resize_ = resize_and_tell  # type: ignore[method-assign, assignment]
    ShardingPropagator._propagate_tensor_meta_non_cached = learn_apart  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign]
        ShardingPropagator._propagate_tensor_meta_non_cached = learn  # type: ignore[method-assign]


def begin_sharded(model: Any) -> None:
    """Make ``model`` the root of its FSDP2 units; otherwise the unit that is called first becomes the root."""
    model._get_fsdp_state()._lazy_init()


def is_unit(module: nn.Module) -> bool:
    """Whether the module is an FSDP2 unit, whose weights are gathered together."""
    return hasattr(type(module), "unshard")


@contextmanager
def gathered(model: Any, path: str) -> Iterator[None]:
    """Context manager: gather the weights of the FSDP2 unit that holds the module at ``path``, in every process."""
    if not is_unit(model):
        yield
        return
    begin_sharded(model)
    unit = part = model
    for name in path.split("."):
        part = getattr(part, name)
        unit = part if is_unit(part) else unit
    unit.unshard()
    try:
        yield
    finally:
        unit.reshard()


def class_of(model: nn.Module) -> type[nn.Module]:
    """The model's original class; ``fully_shard`` replaces it by one of the same name behind ``FSDP``."""
    return next(kind for kind in type(model).__mro__ if not hasattr(kind, "unshard"))


# --- modes that must see an operation ---

# The innermost transform of torch.func, whose tensors the kernels do not support.
transform_interpreter = torch._C._functorch.peek_interpreter_stack

_is_compiling = torch.compiler.is_compiling
_tracing_state, _dispatch_modes = torch._C._get_tracing_state, torch._C._len_torch_dispatch_stack
_forward_ad = torch.autograd.forward_ad


def is_watched() -> bool:
    """Whether a compiler, a tracer, a dispatch mode, a transform of ``torch.func`` or forward-mode differentiation must
    see each operation, so that no kernel may bypass the dispatcher."""
    return (
        _is_compiling()
        or _tracing_state() is not None
        or _dispatch_modes() != 0
        or transform_interpreter() is not None
        or has_tangents()
    )


def has_tangents() -> bool:
    """Whether forward-mode differentiation is active, which the hand-written gradients do not support."""
    return _forward_ad._current_level >= 0


@contextmanager
def plain_tensors() -> Iterator[None]:
    """A context in which tensors are created outside of any transform, dispatch mode or inference mode, so that every
    later caller can use a cached table.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch(), _disable_current_modes():
        yield


def fake_mode() -> FakeTensorMode | None:
    """The active fake mode or None. The dry run creates fake tensors itself, without the mode's overhead."""
    return torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE)


def in_backward_pass() -> bool:
    """Whether autograd is running a backward pass, in which checkpointing recomputes layers."""
    return torch._C._current_graph_task_id() != -1


# --- storages and versions ---


def storage_address(storage: torch.UntypedStorage) -> int:
    """Identity of a storage, also of one without memory, whose ``data_ptr()`` is 0."""
    return storage._cdata


def storage_users(storage: torch.UntypedStorage) -> int:
    """The number of tensors and storage objects that share the storage. Cached memory is reused only where no other
    object uses it.
    """
    return torch._C._storage_Use_Count(storage._cdata)


def writes_to(tensor: Tensor) -> int:
    """The version counter of the tensor (number of in-place writes); 0 for inference tensors, which have none."""
    return 0 if tensor.is_inference() else tensor._version


def copy_each(targets: list[Tensor], sources: list[Tensor]) -> None:
    """``target.copy_(source)`` for each pair, in as few launches as torch can."""
    torch._foreach_copy_(targets, sources)


def viewed(tensor: Tensor) -> Tensor | None:
    """The tensor of which ``tensor`` is a view, or None."""
    return tensor._base


# --- operators ---

# Reshapes without autograd treating the result as a view, so that it may be written in place.
unsafe_view = torch.ops.aten._unsafe_view
# ``.item()`` and a product of experts, for the dry run.
local_scalar = torch.ops.aten._local_scalar_dense
grouped_mm = torch.ops.aten._grouped_mm
# The product of int8 matrices in int32.
int_mm = torch._int_mm


@functools.cache
def returned_by(func: OpOverload) -> Literal["new", "views", "first", "nothing", "other"]:
    """What an operation returns by its schema: new tensors, views of its first argument, this argument after changing
    it, nothing after changing it, or something else."""
    schema = func._schema
    first = schema.arguments[0].alias_info if schema.arguments else None
    shared = [item.alias_info for item in schema.returns]
    if func is unsafe_view.default:
        return "views"
    if first is None:
        return "other" if any(shared) else "new"
    if not first.is_write:
        return "views"
    if not shared:
        return "nothing"
    return "first" if len(shared) == 1 and all(shared) and torch.Tag.inplace_view not in func.tags else "other"


class Ctx(Protocol[Kept]):
    """The ``ctx`` of an autograd function, as torch's own class does not describe it; ``kept``: what is no tensor."""

    kept: Kept
    saved_tensors: tuple[Any, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None: ...
    def mark_non_differentiable(self, *outputs: Tensor) -> None: ...
    def set_materialize_grads(self, value: bool) -> None: ...


# --- modules ---


def own_parameters(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The writable dictionary of a module's own parameters. ``named_parameters`` omits None and duplicates, and is
    read-only.
    """
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Tensor | None]:
    return module._buffers


def own_modules(module: nn.Module) -> dict[str, nn.Module | None]:
    return module._modules


def with_own_parts(copied: nn.Module) -> None:
    """Give a shallow copy of a module its own dictionaries of parameters and modules, so that the original does not
    change.
    """
    copied._parameters, copied._modules = dict(copied._parameters), dict(copied._modules)


def hooks_around(module: nn.Module) -> tuple[Mapping[int, Callable[..., object]], ...]:
    """The hooks on a module's call: after its forward pass; before it, after and before its backward pass."""
    return module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks


_HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def share_hooks(new: nn.Module, old: nn.Module) -> None:
    """Share the hook dictionaries of ``old`` with ``new``, so that the hooks' handles still remove them."""
    for name in _HOOKS:
        setattr(new, name, getattr(old, name))

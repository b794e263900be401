"""Memory of a training process: freed blocks are kept, blocks of a model are recomputed without holes in the heap,
and activations can wait in CPU memory.

glibc returns large blocks at every free, and each new block costs page faults. The thresholds apply to the whole
process and cannot be read back, so they are set once and stay. `limit_generated_kernels`, `share_one_heap` and
`give_back_freed_memory` bound the memory that is kept.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rankwise.acceleration.parts import Undo, class_forward, replace_forward
from rankwise.compat.system import anonymous_memory_bytes as anonymous_memory_bytes
from rankwise.compat.system import glibc
from rankwise.compat.torch import Ctx, hooks_around, own_part, storage_address, tree_iter, writes_to
from rankwise.compat.transformers import checkpointing_by, checkpointing_of, collects_outputs, is_collecting_hook
from rankwise.ops.selection import is_traced

# mallopt's parameters, from glibc's malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
# Smaller blocks come from the heap, which reuses them. With rows of varying lengths, larger blocks would fragment the
# heap (2.1 GB at the peak of a run instead of 1.8 GB), and old versions of glibc accept no larger threshold.
MMAP_BYTES = 32 << 20
# Bytes of free memory at the end of the heap that are kept.
TRIM_BYTES = 1 << 30
TOP_PAD_BYTES = 64 << 20

# oneDNN generates code for every new number of tokens. It and torch each keep that of their last 1024 products, each of
# a quarter of a MB, in small blocks that fragment the heap. A micro-batch has up to 20 shapes of products.
KERNEL_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "32", "LRU_CACHE_CAPACITY": "32"}

# Environment variables of torch's CUDA allocator; the second is the newer name.
SEGMENT_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def limit_generated_kernels() -> None:
    """Let oneDNN keep fewer generated kernels. Effective before the first product of the process; a user's setting is
    kept.
    """
    for name, value in KERNEL_CACHES.items():
        os.environ.setdefault(name, value)


def grow_segments() -> str:
    """Enable expandable segments on a GPU, so that batches of varying lengths do not fragment its memory. Returns
    torch's settings.

    Effective before the process's first tensor on a GPU; a user's setting is kept.
    """
    name = next((name for name in SEGMENT_SETTINGS if name in os.environ), SEGMENT_SETTINGS[0])
    if sys.platform.startswith("linux"):
        os.environ.setdefault(name, "expandable_segments:True")
    return os.environ.get(name, "")


@functools.cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds. Returns False under a different allocator."""
    library = glibc()
    if library is None:
        return False
    wanted = ((M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, TRIM_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    # All are set, even if one is refused.
    taken = [library.mallopt(parameter, value) == 1 for parameter, value in wanted]
    return all(taken)


def share_one_heap() -> None:
    """Let threads that start later allocate from the main heap. Does nothing without glibc.

    gloo copies each tensor that it gathers, in threads of its own. glibc would give each thread a heap, which keeps
    freed memory: 85 of 480 MB in a process of FSDP2 (demo model, LoRA, 2 processes).
    """
    if library := glibc():
        library.mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return the heap's free pages to the system, also those between blocks in use. Does nothing without glibc."""
    if library := glibc():
        library.malloc_trim(0)


# Gradient checkpointing that does not fragment a CPU's heap. torch's checkpointing records the graph of a block that
# will be recomputed. The graph's nodes, hundreds of small objects, lie between the large tensors that the block frees.
# For an aligned allocation, glibc needs a few bytes more than a hole of the same size, so the next block takes new
# memory: each block enlarges the heap by several times what is kept. Here a block first runs without a graph. Its
# output is copied into memory that was allocated before the first block ran: B L h elements, read and written once for
# each block.

# The supported options of torch's checkpointing.
UNDERSTOOD = {"use_reentrant", "preserve_rng_state"}


class Places:
    """Memory for the outputs of the blocks of one model."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._waiting: dict[int, Tensor] = {}

    def take(self, index: int, hidden: Tensor) -> Tensor:
        """The place for the output of block ``index``, which has its input's shape. Where needed, places for all
        later blocks are made.
        """
        place = self._waiting.pop(index, None)
        if place is not None and (place.shape, place.dtype) == (hidden.shape, hidden.dtype):
            return place
        later = range(index + 1, self._blocks)
        place = torch.empty_like(hidden, requires_grad=False)
        self._waiting = {number: torch.empty_like(hidden, requires_grad=False) for number in later}
        return place


def replace_checkpointing(model: nn.Module, undo: Undo) -> None:
    """Use this module's checkpointing for every block that transformers may checkpoint."""
    stacks: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and "forward" not in module.__dict__:
            stacks[name.rpartition(".")[0]].append(module)
    for blocks in stacks.values():
        places = Places(len(blocks))
        for index, block in enumerate(blocks):
            replace_forward(block, _block_forward, undo, rankwise_place=(places, index))


def _block_forward(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    plain = class_forward(self)
    if not _can_run_again(self, args, kwargs):
        return plain(*args, **kwargs)
    # transformers passes the block's function and has already handled caches.
    with checkpointing_by(self, functools.partial(_run, self, checkpointing_of(self))):
        return plain(*args, **kwargs)


def _can_run_again(block: GradientCheckpointingLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block's gradients depend only on its hidden states and own parameters, and no hook sees the block.

    In a container, such as Gemma 3n's ``shared_kv_states``, a block may leave keys and values for later blocks.
    """
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()) or is_traced():
        return False
    if "rankwise_place" not in block.__dict__:
        return False
    if not args or not isinstance(args[0], Tensor) or args[0].device.type != "cpu":
        return False
    torchs = checkpointing_of(block)
    if getattr(torchs, "func", torchs) is not checkpoint or not set(getattr(torchs, "keywords", ())) <= UNDERSTOOD:
        return False
    others = tree_iter((args[1:], kwargs))
    if any(isinstance(other, Tensor) and other.requires_grad for other in others):
        return False
    if any(isinstance(given, MutableMapping) for given in (*args, *kwargs.values())):
        return False
    return not any(_is_watched(module) for module in block.modules() if module is not block)


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook sees the module's call.

    transformers leaves its hooks, which collect outputs, on the modules. Such a hook counts only while outputs are
    collected.
    """
    after_forward, *others = hooks_around(module)
    if any(others):
        return True
    if after_forward and collects_outputs():
        return True
    return not all(map(is_collecting_hook, after_forward.values()))


def _run(block: Any, torchs: Callable[..., Any], function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    """Called in place of torch's ``checkpoint(function, hidden, *args)``."""
    places, index = block.rankwise_place
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    keeps_rng = getattr(torchs, "keywords", {}).get("preserve_rng_state", True)
    state = _State(keeps_rng)
    place = places.take(index, hidden)
    out = _RunAgain.apply(lambda x: function(x, *args), [place], state, hidden, *trained)
    if out is not None:
        return out
    # The block returns more than one tensor, or one of a different shape.
    del block.__dict__["rankwise_place"]
    with state.restored():
        return torchs(function, hidden, *args)


class _State:
    """The state other than its inputs on which a block's results depend, at the time of its first run."""

    def __init__(self, keeps_rng: bool) -> None:
        self.rng = torch.get_rng_state() if keeps_rng else None
        self.autocast: dict[str, Any] = {
            "enabled": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_autocast_dtype("cpu"),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[], enabled=self.rng is not None), torch.autocast("cpu", **self.autocast):
            if self.rng is not None:
                torch.set_rng_state(self.rng)
            yield


Block = Callable[[Tensor], Tensor]
# What runs again, in which state, and its trained parameters.
Kept = tuple[Block, _State, tuple[Tensor, ...]]


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx[Kept], block: Block, place: list[Tensor], state: _State, hidden: Tensor, *trained: Tensor
    ) -> Tensor | None:
        out = block(hidden)
        if not isinstance(out, Tensor) or (out.shape, out.dtype) != (hidden.shape, hidden.dtype):
            return None
        ctx.kept = block, state, trained
        ctx.save_for_backward(hidden)
        return place.pop().copy_(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[Kept], grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), (block, state, trained) = ctx.saved_tensors, ctx.kept
        again = hidden.detach().requires_grad_()
        with state.restored(), torch.enable_grad():
            out = block(again)
        grads = torch.autograd.grad(out, (again, *trained), grad, allow_unused=True)
        return None, None, None, *grads


# Activations in CPU memory from the forward to the backward pass, each moved once, however often it is saved. Norms and
# adapters save the same hidden states, attention and the next adapter the same output, DoRA and the gated product the
# same factors: for Llama 8B 0.8 MB per token with LoRA, 2.9 MB with DoRA.

# Smaller tensors stay on the device. After this many further saves, a copy counts as finished.
LEAST_BYTES, KEPT_SAVES = 1024, 5


@dataclasses.dataclass(eq=False)
class _Moved:
    """One offloaded tensor: the result of the inner hook, and the number of unpacks still to come."""

    packed: Any
    storage: weakref.ref[torch.UntypedStorage]
    uses: int = 0
    back: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class _Save:
    moved: _Moved
    size: torch.Size
    stride: tuple[int, ...]
    # Whether the whole storage was moved, of which this is a view.
    of_whole: bool


class MovedOnce:
    """Hooks around two inner hooks, ``pack`` and ``unpack``, which see each tensor once, also through views. The first
    unpack brings the tensor back, and it stays until the last one."""

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self._pack, self._unpack = pack, unpack
        # An entry lives as long as autograd's graph holds a save of it.
        self._moved: weakref.WeakValueDictionary[tuple[Any, ...], _Moved] = weakref.WeakValueDictionary()

    def pack(self, tensor: Tensor) -> _Save:
        storage, size, stride = tensor.untyped_storage(), tensor.size(), tensor.stride()
        of_whole = storage.nbytes() == tensor.nbytes and 0 not in stride
        view = () if of_whole else (tensor.storage_offset(), size, stride)
        key = storage_address(storage), tensor.dtype, writes_to(tensor), view
        moved = self._moved.get(key)
        if moved is None or moved.storage() is not storage:
            given = tensor.detach().as_strided((tensor.numel(),), (1,)) if of_whole else tensor
            self._moved[key] = moved = _Moved(self._pack(given), weakref.ref(storage))
        moved.uses += 1
        return _Save(moved, size, stride, of_whole)

    def unpack(self, save: _Save) -> Tensor:
        moved = save.moved
        tensor = self._unpack(moved.packed) if moved.back is None else moved.back
        moved.uses -= 1
        moved.back = tensor if moved.uses else None
        if tensor.is_cuda:
            # Another stream copied the tensor back, and must not reuse its memory before this stream has read it.
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor.as_strided(save.size, save.stride) if save.of_whole else tensor


class Offloaded:
    """Hooks that copy tensors to pinned CPU memory and back on a stream of their own, beside the computation.

    ``elsewhere``: a context in which a plan's fake tensors count as CPU memory."""

    def __init__(self, model: nn.Module, elsewhere: Callable[[], AbstractContextManager[None]]) -> None:
        self.elsewhere = elsewhere
        parameters = [own_part(parameter) for parameter in model.parameters()]
        self.device = parameters[0].device
        self.parameters = {storage_address(parameter.untyped_storage()) for parameter in parameters}
        self.module: Any = torch.get_device_module(self.device)
        self.stream = self.module.Stream()
        self.saves = itertools.count(1)
        # {number of a save: the tensor and the event of its copy}. A tensor must live until it is copied.
        self.waiting: dict[int, tuple[Tensor, Any]] = {}

    def pack(self, tensor: Tensor) -> tuple[int, Tensor]:
        """(0, a tensor that stays), or the number of the save and the copy in CPU memory."""
        is_parameter = storage_address(tensor.untyped_storage()) in self.parameters
        # An expanded tensor would become larger.
        if is_parameter or tensor.device != self.device or tensor.nbytes < LEAST_BYTES or 0 in tensor.stride():
            return 0, tensor
        number, now = next(self.saves), self.module.current_stream()
        for save in [save for save in self.waiting if save <= number - KEPT_SAVES]:
            now.wait_event(self.waiting.pop(save)[1])
        tensor = tensor.contiguous()
        self.stream.wait_stream(now)
        with self.module.stream(self.stream), self.elsewhere():
            host = torch.empty_like(tensor, device="cpu", pin_memory=self.device.type == "cuda")
            host.copy_(tensor, non_blocking=True)
        self.waiting[number] = tensor, self.stream.record_event()
        return number, host

    def unpack(self, packed: tuple[int, Tensor]) -> Tensor:
        number, tensor = packed
        if not number:
            return tensor
        if number in self.waiting:
            return self.waiting[number][0]
        self.finish()
        with self.module.stream(self.stream):
            back = torch.empty_like(tensor, device=self.device).copy_(tensor, non_blocking=True)
        self.module.current_stream().wait_stream(self.stream)
        return back

    def finish(self) -> None:
        """Let the computation wait for the copies to CPU memory, and free what was copied."""
        self.module.current_stream().wait_stream(self.stream)
        self.waiting.clear()


@contextmanager
def offloaded(model: nn.Module, elsewhere: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
    """A context in which activations that autograd saves are in CPU memory until the backward pass needs them."""
    hooks = Offloaded(model, elsewhere)
    once = MovedOnce(hooks.pack, hooks.unpack)
    try:
        with saved_tensors_hooks(once.pack, once.unpack):
            yield
    finally:
        hooks.finish()

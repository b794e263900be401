"""Memory of a training process: freed blocks are kept, and activations can wait in CPU memory.

glibc returns large blocks at every free, and each new block costs page faults. The thresholds apply to the whole
process and cannot be read back, so they are set once and stay. `limit_generated_kernels`, `share_one_heap` and
`give_back_freed_memory` bound the memory that is kept.
"""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import os
import platform
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from rankwise.compat.torch import own_part, storage_address, writes_to

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


@cache
def keep_freed_memory() -> bool:
    """Raise glibc's thresholds. Returns False under a different allocator."""
    if not _has_glibc():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    wanted = ((M_MMAP_THRESHOLD, MMAP_BYTES), (M_TRIM_THRESHOLD, TRIM_BYTES), (M_TOP_PAD, TOP_PAD_BYTES))
    # All are set, even if one is refused.
    taken = [mallopt(parameter, value) == 1 for parameter, value in wanted]
    return all(taken)


def share_one_heap() -> None:
    """Let threads that start later allocate from the main heap. Does nothing without glibc.

    gloo copies each tensor that it gathers, in threads of its own. glibc would give each thread a heap, which keeps
    freed memory: 85 of 480 MB in a process of FSDP2 (demo model, LoRA, 2 processes).
    """
    if _has_glibc():
        ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


def give_back_freed_memory() -> None:
    """Return the heap's free pages to the system, also those between blocks in use. Does nothing without glibc."""
    if _has_glibc():
        ctypes.CDLL(None).malloc_trim(0)


def anonymous_memory_bytes() -> int:
    """The anonymous resident memory of this process in bytes; on systems other than Linux, all resident memory."""
    try:
        status = Path(f"/proc/{os.getpid()}/status").read_text()
    except OSError:
        return int(psutil.Process().memory_info().rss)
    for line in status.splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    return int(psutil.Process().memory_info().rss)


def _has_glibc() -> bool:
    return sys.platform.startswith("linux") and platform.libc_ver()[0] == "glibc"


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

"""Count live storages, on fake and on real tensors alike, to a peak in bytes that is split into terms.

Every operation passes a dispatch mode. A storage is alive from the operation that first returns it until Python and
autograd have both let it go, which a weak reference tells. The clock is a counter of such events: what was alive at the
moment of the peak is known afterwards, when it is also known what became of each storage.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

NEVER = 1 << 62


@dataclasses.dataclass(slots=True)
class Storage:
    """One storage: size in bytes, life in events, and what it is for once that is known."""

    size_bytes: int
    born: int
    phase: str
    recomputing: bool
    # Made in a backward pass while gradients are recorded: checkpointing runs a block again.
    as_logits: bool
    died: int = NEVER
    term: str | None = None


class StorageTracker(TorchDispatchMode):
    """Sum of live storages. ``rounding``: of each storage, as the device's allocator does. ``vocabulary``: its size,
    by which logits are known. ``scratch``: bytes that an operation takes while it runs, by its name.
    """

    def __init__(
        self,
        *,
        rounding: Callable[[int], int] = int,
        vocabulary: int | None = None,
        scratch: dict[str, Callable[..., int]] | None = None,
    ) -> None:
        super().__init__()
        self.rounding, self.vocabulary, self.scratch = rounding, vocabulary, scratch or {}
        self.phase = "setup"
        self.live_bytes = self.peak_bytes = 0
        self.clock = self.peak_clock = 0
        self.peak_phase = "forward"
        self.peak_scratch_bytes = 0
        self.phase_ends: dict[str, int] = {}
        self.storages: list[Storage] = []
        self.hosted = False
        # Storages that live in another memory, while this is set.
        self._known: dict[int, tuple[Any, Storage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = answer_of_values(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor):
                self.see(tensor)
        if self.scratch and (size := self.scratch.get(func.name().partition(".")[0])) is not None:
            self._look(size(args, kwargs))
        return result

    def see(self, tensor: Tensor, term: str | None = None) -> None:
        """Count the tensor's storage, unless it is known; with ``term``, say what it is for."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        known = self._known.get(key)
        if known is None or known[0]() is None:
            if self.hosted or tensor.device.type == "meta":
                return
            known = self._start(tensor, storage, key)
        if term is not None:
            known[1].term = term

    def _start(self, tensor: Tensor, storage: Any, key: int) -> tuple[Any, Storage]:
        size = self.rounding(storage.nbytes())
        recomputing = self.phase == "backward" and torch.is_grad_enabled()
        is_logits = self.vocabulary is not None and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
        record = Storage(size, self.clock, self.phase, recomputing, is_logits)
        reference = weakref.ref(storage, lambda _: self._end(key, record))
        self._known[key] = entry = (reference, record)
        self.storages.append(record)
        self.clock += 1
        self.live_bytes += size
        self._look(0)
        return entry

    def _end(self, key: int, record: Storage) -> None:
        record.died = self.clock
        self.clock += 1
        self.live_bytes -= record.size_bytes
        known = self._known.get(key)
        if known is not None and known[1] is record:
            del self._known[key]

    def _look(self, scratch_bytes: int) -> None:
        if self.phase != "setup" and self.live_bytes + scratch_bytes > self.peak_bytes:
            self.peak_bytes, self.peak_scratch_bytes = self.live_bytes + scratch_bytes, scratch_bytes
            self.peak_clock, self.peak_phase = self.clock, self.phase

    def enter(self, phase: str) -> None:
        """Begin a phase: forward, backward or optimizer. The peak is looked for from the first one on."""
        self.phase_ends[self.phase] = self.clock
        self.phase = phase
        self._look(0)

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """What is made here lives in another memory."""
        before, self.hosted = self.hosted, True
        try:
            yield
        finally:
            self.hosted = before

    def see_all(self, tensors: Iterable[Tensor], term: str) -> None:
        for tensor in tensors:
            self.see(tensor, term)

    def breakdown(self) -> dict[str, int]:
        """{term: bytes} at the moment of the peak; they sum to ``peak_bytes``."""
        totals: dict[str, int] = {"transient": self.peak_scratch_bytes}
        for storage in self.storages:
            if storage.born < self.peak_clock <= storage.died:
                term = self._term(storage)
                totals[term] = totals.get(term, 0) + storage.size_bytes
        return totals

    def _term(self, storage: Storage) -> str:
        if storage.term is not None:
            return storage.term
        if storage.as_logits:
            return "logits"
        saved = storage.phase == "forward" and storage.died >= self.phase_ends.get("forward", self.clock)
        return "activations" if saved or storage.recomputing else "transient"


def answer_of_values(func: Any, args: Any, kwargs: Any) -> Any:
    """An answer where an operation asks for a value, which fake tensors do not have; else NotImplemented.

    A number is 1 and a truth is False. Both are asked for in bookkeeping alone: step counts, checks of masks.
    """
    if func is not torch.ops.aten._local_scalar_dense.default or not _is_fake(args[0]):
        return NotImplemented
    dtype = args[0].dtype
    return False if dtype is torch.bool else (1.0 if dtype.is_floating_point else 1)


def _is_fake(tensor: Tensor) -> bool:
    from torch._subclasses.fake_tensor import FakeTensor

    return isinstance(tensor, FakeTensor)

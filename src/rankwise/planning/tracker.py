"""Count live storages, fake or real, and split their peak in bytes into terms.

A dispatch mode sees every operation. A storage lives from the operation that first returns it until Python and autograd
have both released it, which a weak reference reports. The clock counts these events. After the step, the storages alive
at the peak are known, and the purpose of each.
"""

from __future__ import annotations

import bisect
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple, TypeGuard

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from rankwise.compat.torch import (
    DispatchMode,
    FakeTensor,
    FakeTensorMode,
    OpOverload,
    fake_mode,
    grouped_mm,
    in_kernel_invocation_manager,
    is_fake,
    local_scalar,
    returned_by,
    shard_of,
    storage_address,
    tree_iter,
)

NEVER = 1 << 62
# Half of all calls on fake tensors, which can answer without dispatch.
DEVICE_OF = torch.ops.prim.device.default
Reference = weakref.ref[torch.UntypedStorage]
# Positional arguments of an operation.
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
Terms = dict[str, int]


class Place(NamedTuple):
    """A part of a step: its phase, the number of the layer that it starts with, or -1 before the first layer, and how
    often such a part was there before: of a backward pass -1 is the head's part, and later the embedding's."""

    phase: str
    layer: int = -1
    turn: int = 0


@dataclasses.dataclass(slots=True, kw_only=True)
class Storage:
    """One storage: size in bytes, lifetime in events, and its term once that is known."""

    size_bytes: int
    born: int
    phase: str
    # Whether it was made in a backward pass with gradients enabled: checkpointing recomputes a block.
    recomputing: bool
    as_logits: bool
    died: int = NEVER
    term: str | None = None


class StorageTracker(DispatchMode):
    """Counts live storages.

    ``rounding``: rounds each size as the device's allocator does. ``vocabulary``: the size by which logits are
    recognised. ``scratch``: {operation: bytes that it takes while it runs}. ``answers``: results of operations that
    read values. ``counted_before``: whether the result of a named operation lies in memory that is already counted.
    """

    def __init__(
        self,
        *,
        rounding: Callable[[int], int] = int,
        vocabulary: int | None = None,
        scratch: dict[str, Callable[..., int]] | None = None,
        answers: ReadValues | None = None,
        counted_before: Callable[[str, Tensor], bool] | None = None,
    ) -> None:
        super().__init__()
        self.counted_before = counted_before
        self.answers = answers or ReadValues()
        self.quick = QuickFakes()
        self.rounding, self.vocabulary, self.scratch = rounding, vocabulary, scratch or {}
        self.phase = "setup"
        self.clock = 0
        self.forward_ends: list[int] = []
        # (clock, place) at the start of each part of the step.
        self.entered: list[tuple[int, Place]] = []
        self._turns: Counter[tuple[str, int]] = Counter()
        # {clock: the largest scratch memory of an operation then}.
        self.scratches: dict[int, int] = {}
        self.storages: list[Storage] = []
        # While this is set, new storages are in host memory and do not count.
        self.hosted = False
        self._known: dict[int, tuple[Reference, Storage]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Iterable[type], args: Args = (), kwargs: Kwargs | None = None
    ) -> object:
        if any(issubclass(kind, DTensor) for kind in types):
            # A sharded tensor then runs the same operation on the part of this process.
            return NotImplemented
        if func is DEVICE_OF:
            return args[0].fake_device if is_fake(args[0]) else func(*args)
        kwargs = kwargs or {}
        result = self.answers(func, args, kwargs)
        if result is NotImplemented:
            result = self.quick(func, args, kwargs)
        if result is NotImplemented:
            result = func(*args, **kwargs)
        name = func.name().partition(".")[0]
        for tensor in tree_iter(result):
            if isinstance(tensor, Tensor) and not (self.counted_before and self.counted_before(name, tensor)):
                self.see(tensor)
        if name in self.scratch:
            scratch_bytes = self.scratch[name](args, kwargs)
            self.scratches[self.clock] = max(scratch_bytes, self.scratches.get(self.clock, 0))
        return result

    def see(self, tensor: Tensor, term: str | None = None) -> None:
        """Count the tensor's storage, unless it is counted already; ``term`` is its purpose."""
        tensor = shard_of(tensor)
        storage = tensor.untyped_storage()
        key = storage_address(storage)
        known = self._known.get(key)
        if known is None or known[0]() is None:
            if self.hosted or tensor.device.type == "meta":
                return
            is_logits = self.vocabulary is not None and tensor.dim() > 1 and tensor.shape[-1] == self.vocabulary
            known = self._start(storage, is_logits=is_logits)
        if term is not None:
            known[1].term = term

    def resized(self, storage: torch.UntypedStorage) -> None:
        """Record the new size of a known storage, which holds weights that are gathered and freed again."""
        known = self._known.get(storage_address(storage))
        if known is None or known[0]() is not storage:
            return
        known[1].term = "transient"
        self._end(storage_address(storage), known[1])
        self._start(storage)[1].term = "transient"

    def _start(self, storage: torch.UntypedStorage, *, is_logits: bool = False) -> tuple[Reference, Storage]:
        size, key = self.rounding(storage.nbytes()), storage_address(storage)
        recomputing = self.phase == "backward" and torch.is_grad_enabled()
        record = Storage(
            size_bytes=size, born=self.clock, phase=self.phase, recomputing=recomputing, as_logits=is_logits
        )
        reference = weakref.ref(storage, lambda _: self._end(key, record))
        self._known[key] = entry = (reference, record)
        self.storages.append(record)
        self.clock += 1
        return entry

    def _end(self, key: int, record: Storage) -> None:
        if record.died != NEVER:
            return
        record.died = self.clock
        self.clock += 1
        known = self._known.get(key)
        if known is not None and known[1] is record:
            del self._known[key]

    def enter(self, phase: str) -> None:
        """Start a phase: forward, backward or optimizer. Peaks count from the first phase on."""
        if self.phase == "forward":
            self.forward_ends.append(self.clock)
        self.phase = phase
        self.mark()

    def mark(self, layer: int = -1) -> None:
        """Start a part of the phase."""
        turn = self._turns[self.phase, layer]
        self._turns[self.phase, layer] += 1
        self.entered.append((self.clock, Place(self.phase, layer, turn)))

    def restart(self) -> None:
        """Forget what happened; what is still alive was there before the next step."""
        self.storages = [storage for storage in self.storages if storage.died == NEVER]
        self.clock, self.phase = len(self.storages), "setup"
        for clock, storage in enumerate(self.storages):
            storage.born, storage.phase, storage.recomputing = clock, "setup", False
        self.entered, self.forward_ends, self.scratches = [], [], {}
        self._turns.clear()

    @contextmanager
    def elsewhere(self) -> Iterator[None]:
        """A context in which new storages belong to host memory."""
        before, self.hosted = self.hosted, True
        try:
            yield
        finally:
            self.hosted = before

    def see_all(self, tensors: Iterable[Tensor], term: str) -> None:
        for tensor in tensors:
            self.see(tensor, term)

    def peaks(self) -> dict[Place, Terms]:
        """{place: {term: bytes}} at the peak of each part of the step."""
        changes = [0] * self.clock
        for storage in self.storages:
            changes[storage.born] += storage.size_bytes
            if storage.died != NEVER:
                changes[storage.died] -= storage.size_bytes
        # held[c]: after every event before c, with the memory inside of the operation then.
        held = [0, *accumulate(changes)]
        for clock, size in self.scratches.items():
            held[clock] += size
        ends = [clock for clock, _ in self.entered[1:]] + [self.clock]
        parts = zip(self.entered, ends, strict=True)
        return {
            place: self._terms_at(max(range(begin, end + 1), key=held.__getitem__)) for (begin, place), end in parts
        }

    def _terms_at(self, clock: int) -> Terms:
        totals: Terms = {"transient": self.scratches.get(clock, 0)}
        for storage in self.storages:
            if storage.born < clock <= storage.died:
                term = self._term(storage)
                totals[term] = totals.get(term, 0) + storage.size_bytes
        return totals

    def _term(self, storage: Storage) -> str:
        if storage.term is not None:
            return storage.term
        if storage.as_logits:
            return "logits"
        return "activations" if self._is_saved(storage) or storage.recomputing else "transient"

    def _is_saved(self, storage: Storage) -> bool:
        """Whether the storage was made in a forward pass and was alive at its end."""
        if storage.phase != "forward":
            return False
        pass_number = bisect.bisect_right(self.forward_ends, storage.born)
        end = self.forward_ends[pass_number] if pass_number < len(self.forward_ends) else self.clock
        return storage.died >= end


class ReadValues:
    """The results of operations that read values, which fake tensors do not have.

    A number is 1 and a boolean is True, since only bookkeeping reads them (step counts, whether a gain has a zero,
    whether a mask consists of ranges). ``true_counts``: {shape of a boolean tensor: number of True}, else all are.
    """

    def __init__(self, true_counts: dict[tuple[int, ...], int] | None = None) -> None:
        self.true_counts = true_counts or {}

    def __call__(self, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        """The result, or NotImplemented for an operation that reads no value."""
        aten = torch.ops.aten
        if func is aten.index.Tensor and any(_is_flags(index) for index in args[1]):
            return func(args[0], self._as_indices(args[1]), **kwargs)
        if not args or not is_fake(args[0]):
            return NotImplemented
        if func is local_scalar.default:
            dtype = args[0].dtype
            return True if dtype is torch.bool else (1.0 if dtype.is_floating_point else 1)
        if func is aten.equal.default:
            return True
        if func is aten.nonzero.default:
            return args[0].new_empty((self._count(args[0]), args[0].dim()), dtype=torch.long)
        if func is grouped_mm.default and args[0].dtype is not torch.bfloat16:
            # The operation's meta kernel accepts bfloat16 only, its real kernels accept more.
            return _grouped_product(*args, **kwargs)
        return NotImplemented

    def _count(self, flags: Tensor) -> int:
        return self.true_counts.get(tuple(flags.shape), flags.numel())

    def _as_indices(self, given: Iterable[Tensor | None]) -> list[Tensor | None]:
        """The indices of the flags that are set."""
        indices: list[Tensor | None] = []
        for index in given:
            if _is_flags(index):
                indices += [index.new_empty((self._count(index),), dtype=torch.long) for _ in range(index.dim())]
            else:
                indices.append(index)
        return indices


def _grouped_product(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: object, **__: object) -> Tensor:
    """The product of rows by expert (T, K) x (E, K, N) -> (T, N), or of both (K, T) x (T, N) -> (E, K, N)."""
    shape = (a.shape[0], b.shape[-1]) if b.dim() == 3 else (len(offs), a.shape[0], b.shape[1])  # type: ignore[arg-type]
    return a.new_empty(shape)


def _is_flags(index: object) -> TypeGuard[Tensor]:
    return isinstance(index, Tensor) and index.dtype is torch.bool and is_fake(index)


# --- operations without the fake mode's overhead ---
#
# The fake mode looks up each operation in its cache, under a key of everything that a compiler may need of the
# arguments, and runs custom operators in Python without a cache. Both take most of a trace's time. Here results are
# cached under a smaller key, with the same shapes and storages.

_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True)
class _Made:
    """How a result is created; ``is_tuple``: it is several tensors."""

    tensors: tuple[tuple[torch.Size, tuple[int, ...], torch.dtype], ...]
    is_tuple: bool


class QuickFakes:
    """Caches results (shapes, strides, dtypes) under a key of their arguments (the same facts, and numbers), for all
    traces of the process. By its schema an operation returns its first argument, views of it, or new tensors."""

    _seen: ClassVar[dict[tuple[object, ...], _Made | None]] = {}

    def __call__(self, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        """The result, or NotImplemented where the fake mode must compute it."""
        mode = fake_mode()
        if mode is None or func.namespace not in ("aten", "rankwise"):
            return NotImplemented
        returns = returned_by(func)
        if returns == "new":
            return self._remembered(mode, func, args, kwargs)
        changed = args[0] if isinstance(args[0], list) else [args[0]]
        if returns == "other" or not all(map(_is_fake_on_cpu, changed)):
            return NotImplemented
        if returns == "views":
            with in_kernel_invocation_manager(mode):
                made = func(*args, **kwargs)
            return _fake(made, mode) if isinstance(made, Tensor) else [_fake(item, mode) for item in made]
        return args[0] if returns == "first" else None

    def _remembered(self, mode: FakeTensorMode, func: OpOverload, args: Args, kwargs: Kwargs) -> object:
        try:
            key = (func, _description(args), _description(tuple(kwargs.items())))
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


def _description(value: object) -> object:
    """A key for an argument. Raises TypeError for a tensor that has values or is on another device."""
    if isinstance(value, Tensor):
        if not _is_fake_on_cpu(value):
            raise TypeError
        return value.shape, value.stride(), value.dtype
    if isinstance(value, list | tuple):
        return tuple(map(_description, value))
    # The type is part of the key, since 1, 1.0 and True are equal but give different results.
    return type(value), value


def _made_from(result: Any, args: Args) -> Any:
    """How to create such a result again; None where the result is None, NotImplemented for any other type."""
    if result is None:
        return None
    tensors = result if isinstance(result, tuple) else (result,)
    given = {storage_address(item.untyped_storage()) for item in tree_iter(args) if isinstance(item, Tensor)}
    if not all(
        _is_fake_on_cpu(tensor) and storage_address(tensor.untyped_storage()) not in given for tensor in tensors
    ):
        return NotImplemented
    return _Made(tuple((item.shape, item.stride(), item.dtype) for item in tensors), isinstance(result, tuple))


def _is_fake_on_cpu(value: object) -> bool:
    return isinstance(value, FakeTensor) and value.fake_device == _CPU


def _fake(made: Tensor, mode: FakeTensorMode) -> Tensor:
    return FakeTensor(mode, made, _CPU)

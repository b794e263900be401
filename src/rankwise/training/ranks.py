"""Processes: several that train one model, with their communication, and the signals that stop one.

torchrun, or ``rankwise train --devices N``, starts several and describes them in environment variables. In a single
process every function for several returns at once. torch is imported at the first call that needs it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from rankwise.compat import system
from rankwise.config import TrainSettings
from rankwise.conflicts import check_conflicts
from rankwise.errors import ConfigError, RunError

T = TypeVar("T")

# Timeout of communication, longer than the writer needs for a checkpoint.
PATIENCE_SECONDS = 600
# Time within which other machines must see a new file: NFS caches a missing file for 30 seconds.
FILE_SECONDS = 35
# Environment variables of torchrun, all integers.
NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


@dataclasses.dataclass(frozen=True)
class Place:
    """The rank of one of several processes; ``local`` is the rank on its machine."""

    rank: int
    count: int
    local_rank: int
    local_count: int

    def __str__(self) -> str:
        return f"process {self.rank} of {self.count}"


def place() -> Place | None:
    """The rank of this process among those of its launcher; None for a process without a launcher.

    Raises ConfigError (RW136) if the environment variables are not those of torchrun.
    """
    given = {name: os.environ.get(name, "").strip() for name in (*NUMBERS, "MASTER_ADDR")}
    if given["WORLD_SIZE"] in ("", "0", "1"):
        return None
    wrong = [name for name, value in given.items() if not (value.isdecimal() if name in NUMBERS else value)]
    if not wrong and int(given["RANK"]) >= int(given["WORLD_SIZE"]):
        wrong = ["RANK", "WORLD_SIZE"]
    if wrong:
        raise ConfigError(
            "RW136",
            f"the environment holds {', '.join(f'{name}={given[name]}' for name in wrong)}, which torchrun would not "
            "write; start with torchrun, or with --devices N, or unset WORLD_SIZE.",
        )
    return Place(*(int(given[name]) for name in NUMBERS[:4]))


def is_writer() -> bool:
    """Whether this is the one process that writes files and prints messages."""
    where = place()
    return where is None or where.rank == 0


def count() -> int:
    """The number of processes that communicate; 1 outside of ``joined``."""
    group = _group()
    return 1 if group is None else int(group.get_world_size())


def rank() -> int:
    group = _group()
    return 0 if group is None else int(group.get_rank())


@contextmanager
def joined(device_type: str) -> Iterator[None]:
    """A context in which the processes can communicate. No process leaves it before all have reached its end.

    Raises ConfigError (RW139) if the device does not support several processes; RunError (RW702) if another
    process has ended, or has not answered for PATIENCE_SECONDS.
    """
    where = place()
    if where is None or _group() is not None:
        yield
        return
    import torch.distributed as dist

    from rankwise.acceleration import share_one_heap

    check_cards(device_type, where.local_count)
    share_one_heap()
    if device_type == "cuda":
        import torch

        torch.cuda.set_device(where.local_rank)
    with _naming_lost_processes(where):
        # Messages between processes are CPU tensors; gradients are on the model's device.
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=PATIENCE_SECONDS))
        # gloo would print lines of its own if a process ended while others still connect to it.
        barrier()
        yield
        barrier()
        dist.destroy_process_group()


def check_processes(settings: TrainSettings, processes: int) -> None:
    """Raise ConfigError: RW137 if there are more or fewer processes than --devices, RW112 for other conflicts."""
    where = place()
    if settings.devices is not None and settings.devices != processes:
        why = "this is one process; start them with the program `rankwise train`"
        if where:
            why = f"the launcher has started {processes} processes, which it counts itself; leave --devices out"
        raise ConfigError("RW137", f"--devices is {settings.devices}, and {why}.")
    check_conflicts(settings, processes)


def check_cards(device_type: str, processes: int) -> None:
    """Raise ConfigError (RW139) if this machine does not have a device for each process."""
    if system.WINDOWS and processes > 1:
        raise ConfigError("RW139", "several processes (--devices) were never tried on Windows; start one, or use WSL.")
    if device_type == "cuda":
        import torch

        cards = torch.cuda.device_count()
        if processes > cards:
            raise ConfigError(
                "RW139",
                f"{processes} processes need a GPU each, and this machine has {cards}; start as many processes as "
                "there are GPUs, or give --device cpu.",
            )
    elif device_type != "cpu":
        raise ConfigError("RW139", f"several processes cannot share the device {device_type}; give --device cpu.")


def end_alone() -> None:
    """Ignore SIGTERM from now on.

    Once one process has ended, a launcher sends SIGTERM to the others, which would interrupt a process that still
    records why it failed.
    """
    if place() is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


@contextmanager
def _naming_lost_processes(where: Place) -> Iterator[None]:
    import torch.distributed as dist

    try:
        yield
    except BaseException as error:
        end_alone()
        # gloo raises RuntimeErrors whose messages name its source files.
        if not isinstance(error, dist.DistError) and not (isinstance(error, RuntimeError) and "gloo" in str(error)):
            raise
        raise RunError(
            "RW702",
            f"{where} has lost the others: one has ended (killed, or its machine is down), or has not answered for "
            f"{PATIENCE_SECONDS // 60} minutes; continue from the last checkpoint with --resume.",
        ) from error


def share(rows: list[int]) -> list[int]:
    """This process's part of ``rows``, split as evenly as possible, longer parts first."""
    size, longer = divmod(len(rows), count())
    start = rank() * size + min(rank(), longer)
    return rows[start : start + size + (rank() < longer)]


def gathered(value: T) -> list[T]:
    """The ``value`` of every process, by rank."""
    group = _group()
    if group is None:
        return [value]
    found: list[T] = [value] * count()
    group.all_gather_object(found, value)
    return found


def summed(values: Sequence[float]) -> list[float]:
    """The sums of ``values`` over all processes."""
    group = _group()
    if group is None:
        return list(values)
    import torch

    total = torch.tensor(values, dtype=torch.float64)
    group.all_reduce(total)
    return total.tolist()


def agreed(wish: bool) -> bool:
    """Whether ``wish`` is true in any process."""
    return summed([float(wish)])[0] > 0


def same_values(tensors: Iterable[Any]) -> None:
    """Give every process the values of ``tensors`` in process 0, if they were made on its own device."""
    group = _group()
    for tensor in tensors if group is not None else ():
        group.broadcast(tensor.detach(), 0)


def barrier() -> None:
    """Wait until every process has reached this call."""
    summed([0.0])


def check_alike(values: Mapping[str, object]) -> None:
    """Raise RunError (RW700) with each of ``values`` that differs between the processes."""
    everyone = gathered(dict(values))
    wrong = [
        f"{name} is {other.get(name)!r} in process {number} and {everyone[0].get(name)!r} in process 0"
        for name in everyone[0]
        for number, other in enumerate(everyone)
        if other.get(name) != everyone[0].get(name)
    ]
    if wrong:
        raise RunError(
            "RW700", f"the processes of this run do not agree: {'; '.join(wrong)}; give all of them the same values."
        )


def check_same_file(path: Path) -> None:
    """Raise RunError (RW701) if a process cannot see a file that the writer has just written."""
    barrier()
    for _ in range(FILE_SECONDS):
        seen = gathered(hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        if len(set(seen)) == 1:
            return
        time.sleep(1)
    others = ", ".join(str(number) for number, digest in enumerate(seen) if digest != seen[0])
    raise RunError(
        "RW701",
        f"process {others} does not see {path}, which process 0 has written; give an --output that all machines share.",
    )


def claim_the_report() -> bool:
    """Claim to report why the processes failed; whether this process is the first to. The others fail because of it."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    import torch.distributed as dist

    try:
        # The launcher's store, which outlives its processes.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=10))  # type: ignore[attr-defined]
        return bool(store.add(f"rankwise/told/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", 1) == 1)
    except dist.DistError:
        # The launcher is gone. An error reported twice is better than none.
        return True


def _group() -> Any:
    """torch.distributed, once the processes have joined."""
    import torch.distributed as dist

    return dist if dist.is_available() and dist.is_initialized() else None


# --- signals ---


class Interrupt:
    """Whether the user has asked to stop. ``say`` confirms the first signal."""

    def __init__(self, say: Callable[[str], None] = lambda text: None) -> None:
        self.requested = False
        self.say = say

    def handle(self, signal_number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        # A signal may come while a line is being printed, when Python refuses to print a second one.
        with suppress(RuntimeError):
            self.say("Stopping after this step (a second time: at once)")


def terminable() -> AbstractContextManager[None]:
    """A context in which any of these raises KeyboardInterrupt, as Ctrl-C does: temporary files are removed."""
    return _handled(signal.default_int_handler, *system.STOPPING[1:])


def interrupts(interrupt: Interrupt) -> AbstractContextManager[None]:
    """A context in which these signals are passed to ``interrupt``."""
    return _handled(interrupt.handle, *system.STOPPING)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None], *numbers: int) -> Iterator[None]:
    # Only the main thread receives signals.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, earlier in before.items():
            # A handler that was set meanwhile stays.
            if signal.getsignal(number) is handler:
                signal.signal(number, earlier)

"""The measurements of training: seconds of the steps, tokens, examples, bytes of memory."""

from __future__ import annotations

import dataclasses
import math
import os
import threading
import time
from pathlib import Path

import psutil
import torch
from torch import nn

from rankwise.compat.torch import own_part


@dataclasses.dataclass
class Progress:
    """The progress of a run, over all its resumptions; part of every checkpoint."""

    # Seconds inside training steps, without reading data, evaluating and saving.
    train_seconds: float = 0.0
    # Non-padding tokens.
    tokens: int = 0
    examples: int = 0
    peak_memory_bytes: int = 0
    wall_seconds: float = 0.0
    steps: int = 0
    # Sum of the losses of these steps.
    loss_sum: float = 0.0
    # The adapter tensors that have not yet passed the check of gradients; None before the first step.
    unchecked: list[str] | None = None
    # The run's length, and the steps between its evaluations, when this was saved.
    total_steps: int = 0
    eval_steps: int | None = None
    # The evaluation with the lowest loss after a step; the lowest loss of all, that before training among them, and the
    # number of evaluations since.
    best_step: int | None = None
    best_loss: float | None = None
    lowest_loss: float | None = None
    evaluations_since_lowest: int = 0

    def take(self, loss: float, tokens: int, examples: int) -> None:
        """Count a finished step."""
        self.steps += 1
        self.loss_sum += loss
        self.tokens += tokens
        self.examples += examples

    def evaluated(self, loss: float) -> bool:
        """Note an evaluation. Returns whether it is the best after a step."""
        self.evaluations_since_lowest += 1
        if math.isnan(loss):
            return False
        if self.lowest_loss is None or loss < self.lowest_loss:
            self.lowest_loss, self.evaluations_since_lowest = loss, 0
        if not self.steps or (self.best_loss is not None and loss >= self.best_loss):
            return False
        self.best_step, self.best_loss = self.steps, loss
        return True

    @property
    def mean_loss(self) -> float | None:
        return self.loss_sum / self.steps if self.steps else None

    @property
    def tokens_per_second(self) -> float | None:
        return self.tokens / self.train_seconds if self.train_seconds > 0 else None

    @property
    def examples_per_second(self) -> float | None:
        return self.examples / self.train_seconds if self.train_seconds > 0 else None


class StepClock:
    """Adds the seconds between ``start`` and ``stop`` to a total, and gives the speed since the clock was made."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started: float | None = None
        self.steps = 0
        self.seconds = 0.0
        self._tokens_before = progress.tokens

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        if self.started is None:
            return
        seconds = time.perf_counter() - self.started
        self.started = None
        self.steps += 1
        self.seconds += seconds
        self.progress.train_seconds += seconds

    @property
    def tokens_per_second(self) -> float:
        return (self.progress.tokens - self._tokens_before) / self.seconds if self.seconds > 0 else 0.0

    def seconds_left(self, steps: int) -> float:
        return steps * self.seconds / self.steps if self.steps else 0.0


class MemoryMeter:
    """Memory in use and its peak, in bytes, on the training device.

    CUDA counts its own allocations. On a CPU, a thread reads the process's anonymous memory (on Linux; else its
    resident memory) every 20 ms, since the peak lies inside a step. ``mapped`` bytes are added, since weights in a
    mapped file need memory too.
    """

    def __init__(self, device_type: str, peak_bytes: int = 0, mapped: int = 0) -> None:
        self.device_type = device_type
        self.earlier_peak = peak_bytes
        self.mapped = mapped
        self.seen = 0
        self._done = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> MemoryMeter:
        if self.device_type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        else:
            self._thread = threading.Thread(target=self._watch, name="memory-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        if self._thread is not None:
            self._thread.join()

    def now(self) -> int:
        if self.device_type == "cuda":
            return torch.cuda.memory_allocated()
        if self.device_type == "mps":
            return torch.mps.driver_allocated_memory()
        return anonymous_memory_bytes() + self.mapped

    def peak(self) -> int:
        current = torch.cuda.max_memory_allocated() if self.device_type == "cuda" else max(self.seen, self.now())
        return max(self.earlier_peak, current)

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.seen = max(self.seen, self.now())


def frozen_bytes(model: nn.Module) -> int:
    """The bytes of frozen parameters and buffers in this process."""
    tensors = (*model.parameters(), *model.buffers())
    return sum(own_part(tensor).nbytes for tensor in tensors if not tensor.requires_grad)


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

"""Data small enough to train on in a second, exactly, and what tests of whole runs share."""

from __future__ import annotations

import gc
import json
import os
import random
import signal
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from rankwise.training.checkpoints import Checkpoint
from rankwise.training.loop import Loop
from rankwise.training.step import mixed
from rankwise.training.watch import MemoryMeter, Progress, StepInfo, Watch

WORDS = [f"w{index}" for index in range(90)]


def encoded_rows(count: int, seed: int = 0) -> Dataset:
    """Rows of 4 to 12 ids whose first two are the prompt and whose last is the stop token 2."""
    draw = random.Random(seed)
    ids = [[1, *(draw.randrange(4, 94) for _ in range(draw.randrange(3, 10))), 2] for _ in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [[-100, -100, *row[2:]] for row in ids]})


def write_rows(path: Path, count: int, seed: int = 0) -> Path:
    """Prompt: two words; completion: the same two words, the other way round."""
    rows = []
    for index in range(count):
        first, second = WORDS[(7 * index + seed) % 90], WORDS[(11 * index + 3 * seed) % 90]
        rows.append({"prompt": f"{first} {second} ", "completion": f"{second} {first}"})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Recorder:
    """An observer that keeps what it is told, and can send a signal at a step."""

    def __init__(self, stop_at: int | None = None, number: int = signal.SIGINT) -> None:
        self.phases: list[str] = []
        self.notes: list[str] = []
        self.steps: list[StepInfo] = []
        self.evaluations: list[tuple[int, float, bool]] = []
        self.warnings: list[str] = []
        self.stop_at, self.number = stop_at, number

    def phase(self, text: str) -> None:
        self.phases.append(text)

    def note(self, text: str) -> None:
        self.notes.append(text)

    def step(self, info: StepInfo) -> None:
        self.steps.append(info)
        if info.step == self.stop_at:
            os.kill(os.getpid(), self.number)

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        self.evaluations.append((step, loss, best))

    def warning(self, code: str, text: str) -> None:
        self.warnings.append(code)


def fit(loop: Loop, checkpoint: Checkpoint | None = None, **parts: Any) -> Loop:
    loop.fit(Watch(model=loop.model, progress=loop.progress, memory=MemoryMeter("cpu"), **parts), checkpoint)
    return loop


def evaluate(loop: Loop, rows: Dataset | None = None) -> dict[str, float]:
    loop.objective.eval_rows = loop.objective.eval_rows if rows is None else rows
    loop.model.eval()
    with torch.no_grad(), mixed(loop.model, loop.autocast):
        return loop.objective.evaluate(loop.model, lambda: None)


class StopAfter:
    """An interrupt that comes during a step."""

    def __init__(self, progress: Progress, step: int) -> None:
        self.progress, self.step = progress, step

    @property
    def requested(self) -> bool:
        return self.progress.steps >= self.step


def storage_bytes() -> int:
    """Of all parameters alive, each storage once; those of the memory plan's fake model take none."""
    # What others left behind.
    gc.collect()
    # Asking a million objects whether they are parameters takes a second; whether they are tensors, a tenth of that.
    tensors = [thing for thing in gc.get_objects() if isinstance(thing, torch.Tensor)]
    found = {
        parameter.untyped_storage().data_ptr(): parameter.untyped_storage().nbytes()
        for parameter in tensors
        if isinstance(parameter, nn.Parameter) and not isinstance(parameter, FakeTensor) and not parameter.is_meta
    }
    return sum(found.values())


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

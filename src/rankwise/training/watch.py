"""What a run tells while it trains: figures of each step, ``metrics.jsonl``, the observer, trackers."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from rankwise.acceleration import give_back_freed_memory
from rankwise.adapters import adapter_parameters, has_adapter
from rankwise.models.mapped import MappedFiles
from rankwise.training import ranks
from rankwise.training.interrupt import Interrupt
from rankwise.training.meters import MemoryMeter, Progress, StepClock
from rankwise.training.metrics import MetricsFile
from rankwise.training.observer import Observer, SilentObserver, StepInfo
from rankwise.training.preflight import GradientCheck

if TYPE_CHECKING:
    from rankwise.training.loop import Counted, Figures

HOLES_GROWTH = 1.05


class EvaluationStopped(Exception):
    """The user asked to stop while an evaluation was running."""


class Tracker(Protocol):
    def log(self, values: Mapping[str, float], step: int) -> None: ...


class Step:
    """Sums over the micro-batches of one step, or over several steps; those on the device until they are read."""

    def __init__(self) -> None:
        self.steps = 0
        self.loss = self.norm = self.rate = 0.0
        self.tokens = self.examples = 0
        # {name: [sum, weight]}.
        self.figures: dict[str, list[Any]] = {}
        self._losses: list[Tensor] = []

    def add(self, loss: Tensor, counted: Counted, figures: Figures) -> None:
        self._losses.append(loss)
        self.tokens += counted.tokens
        self.examples += counted.examples
        for name, values in figures.items():
            sums = self.figures.setdefault(name, [0.0, 0.0])
            # A process without rows takes part with those of another.
            sums[:] = [before + value for before, value in zip(sums, values)] if counted.targets else sums

    def read(self, norm: Tensor) -> None:
        """Get all values from the device at once, summed over the processes; the loss is the mean of theirs."""
        names = sorted(self.figures)
        values: list[Any] = [*self._losses, norm, *(value for name in names for value in self.figures[name])]
        on_device = [value for value in values if isinstance(value, Tensor)]
        found = iter(torch.stack([value.detach().float().reshape(()).to(norm.device) for value in on_device]).tolist())
        values = [next(found) if isinstance(value, Tensor) else float(value) for value in values]
        count = len(self._losses)
        self.norm = values[count]
        losses = math.fsum(values[:count])
        loss, tokens, examples, *sums = ranks.summed([losses, self.tokens, self.examples, *values[count + 1 :]])
        self.loss, self.tokens, self.examples = loss / ranks.count(), int(tokens), int(examples)
        self.figures = {name: sums[2 * place : 2 * place + 2] for place, name in enumerate(names)}
        self.steps, self._losses = 1, []

    def take(self, step: Step) -> None:
        """Add a step that was read; the loss becomes the mean over steps."""
        self.steps += 1
        self.loss += (step.loss - self.loss) / self.steps
        for name, values in step.figures.items():
            sums = self.figures.get(name, [0.0, 0.0])
            self.figures[name] = [before + value for before, value in zip(sums, values)]


@dataclasses.dataclass
class Watch:
    """Measures every step, writes ``metrics.jsonl``, calls the observer, and says when the user has asked to stop."""

    model: nn.Module
    progress: Progress
    memory: MemoryMeter
    total_steps: int
    eval_steps: int | None = None
    # {name in metrics.jsonl: words} of the figures that the observer gets.
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    observer: Observer = dataclasses.field(default_factory=SilentObserver)
    # None in processes that do not write.
    metrics: MetricsFile | None = None
    tracker: Tracker | None = None
    # Called at every step; updates the wall time in the progress.
    tick: Callable[[], None] = lambda: None
    interrupt: Interrupt = dataclasses.field(default_factory=Interrupt)
    check: GradientCheck | None = None
    # Returns the model's answer to a fixed prompt.
    answer: Callable[[], str] | None = None
    # The files from which frozen weights are mapped.
    files: MappedFiles | None = None

    def __post_init__(self) -> None:
        self.clock = StepClock(self.progress)
        # ``b_norm`` at the last logged step.
        self.b_norm: float | None = None
        # Seconds of each evaluation so far.
        self.evaluations: list[float] = []
        self.holes = Holes(self.memory.now) if self.memory.device_type == "cpu" else None

    def begin_step(self) -> None:
        self.clock.start()

    def check_gradients(self) -> None:
        """Check each adapter tensor until it has passed (a resumed run: those that have not), and the mapped files."""
        if self.files is not None:
            self.files.check()
        if self.check is not None and not self.check.done:
            self.check.look(self.progress.steps + 1)
            self.progress.unchecked = list(self.check.waiting)

    def end_step(self, step: Step, means: Mapping[str, float], *, is_logged: bool) -> bool:
        """Tell the observer of a step. Returns whether the user has asked any process to stop."""
        self.clock.stop()
        self.tick()
        self.progress.peak_memory_bytes = self.memory.peak()
        if is_logged:
            self.b_norm = b_norm(self.model)
        self.observer.step(
            StepInfo(
                step=self.progress.steps,
                total=self.total_steps,
                loss=step.loss,
                tokens_per_second=self.clock.tokens_per_second,
                memory_bytes=self.memory.now(),
                peak_memory_bytes=self.memory.peak(),
                grad_norm=step.norm,
                learning_rate=step.rate,
                b_norm=self.b_norm,
                seconds_left=self.clock.seconds_left(self.total_steps - self.progress.steps) + self._evaluating_left(),
                figures={words: means[name] for name, words in self.shown.items() if name in means},
            )
        )
        asked = ranks.agreed(self.interrupt.requested)
        if self.holes is not None:
            self.holes.end_step()
        return asked

    def log(self, line: Mapping[str, float]) -> None:
        progress = self.progress
        values = {
            **line,
            "tokens_per_second": round(self.clock.tokens_per_second, 1),
            "tokens": progress.tokens,
            "train_seconds": round(progress.train_seconds, 3),
            "peak_memory_bytes": progress.peak_memory_bytes,
        }
        self._append(values if self.b_norm is None else {**values, "b_norm": self.b_norm})

    def pause(self) -> None:
        """Raise EvaluationStopped in all processes where the user has asked one of them to stop."""
        if ranks.agreed(self.interrupt.requested):
            raise EvaluationStopped

    def evaluation(self, line: Mapping[str, float], seconds: float) -> None:
        """Tell of an evaluation, before the progress takes its loss."""
        step, loss, lowest = self.progress.steps, line["eval_loss"], self.progress.lowest_loss
        self.evaluations.append(seconds)
        self._append(line)
        self.observer.evaluation(step, loss, lowest is None or loss < lowest)
        if self.answer is not None:
            text = self.answer()
            if self.metrics is not None:
                self.metrics.append({"step": step, "sample": text})
            self.observer.sample(step, text)

    def end(self) -> None:
        if self.check is not None:
            self.check.end(self.progress.steps)

    def _append(self, line: Mapping[str, float]) -> None:
        if self.metrics is not None:
            self.metrics.append({"step": self.progress.steps, **line})
        if self.tracker is not None:
            self.tracker.log(line, self.progress.steps)

    def _evaluating_left(self) -> float:
        """The seconds of the evaluations to come, the one of this step among them where it is due."""
        if not self.evaluations or not self.eval_steps:
            return 0.0
        due = math.ceil(self.total_steps / self.eval_steps) - (self.progress.steps - 1) // self.eval_steps
        return due * statistics.fmean(self.evaluations)


class Holes:
    """On a CPU, returns free heap pages to the operating system when steps have made the process larger.

    Batches of varying size leave holes between used blocks, and the next step allocates new memory beside them. Since
    returning pages costs page faults in the next step, it is done only where the size at the end of a step exceeds the
    largest size right after an earlier return: holes raise the former, larger batches also the latter.
    """

    def __init__(self, now: Callable[[], int]) -> None:
        self.now = now
        self.usual_bytes = 0
        # No step has ended yet.
        self.is_new = True

    def end_step(self) -> None:
        size = self.now()
        if self.is_new:
            self.usual_bytes, self.is_new = max(self.usual_bytes, size), False
        elif size > HOLES_GROWTH * self.usual_bytes:
            give_back_freed_memory()
            self.is_new = True


@torch.no_grad()
def b_norm(model: nn.Module) -> float | None:
    """The 2-norm of all B matrices of the active adapter together; None without an adapter."""
    if not has_adapter(model):
        return None
    parameters = adapter_parameters(model).items()
    found = [value.float() for key, value in parameters if key.endswith((".lora_B.weight", ".lora_embedding_B"))]
    return torch.nn.utils.get_total_norm(found).item() if found else None

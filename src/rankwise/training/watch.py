"""What a run measures, checks and tells: seconds, bytes, gradients; its observer and ``metrics.jsonl``."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankwise.acceleration import anonymous_memory_bytes, give_back_freed_memory
from rankwise.adapters import adapter_parameters, has_adapter
from rankwise.adapters.lora import KEY as TOKENS
from rankwise.adapters.lora import MAGNITUDE
from rankwise.compat.torch import own_part
from rankwise.disk import appending
from rankwise.errors import ConfigError, RunError, some_of
from rankwise.foreign import Fields
from rankwise.labels import MEASURES
from rankwise.models.prepared import MappedFiles
from rankwise.records import METRICS_FILE, read_metrics, write_text
from rankwise.training import ranks
from rankwise.training.batches import Counted, Figures
from rankwise.training.states import undisturbed_random_states
from rankwise.training.trackers import Trackers

# Growth of the memory after a step, beyond its usual amount, from which freed memory goes back to the system.
HOLES_GROWTH = 1.05


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepInfo:
    """One finished optimizer step."""

    step: int
    total: int
    # Mean over the trained tokens of this step.
    loss: float
    # Non-padding tokens divided by the seconds of the training steps, since the run started or was resumed.
    tokens_per_second: float
    # Memory in use now; peak_memory_bytes is the most so far.
    memory_bytes: int
    peak_memory_bytes: int
    # 2-norm of the gradients before clipping.
    grad_norm: float | None
    learning_rate: float
    # 2-norm of all B matrices together at the last logged step, a measure of the update; None without an adapter.
    b_norm: float | None
    seconds_left: float
    # {name: figure} of the objective, such as the mean reward of the step's answers.
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)


class Observer(Protocol):
    """Receives the events of a run. Every call comes from the training thread, so calls must be short."""

    def phase(self, text: str) -> None:
        """A new phase begins: ``Reading data``, ``Training``, ..."""

    def note(self, text: str) -> None:
        """A line to keep, such as a default that was chosen."""

    def step(self, info: StepInfo) -> None:
        """An optimizer step is done."""

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        """The evaluation loss (mean over tokens) after ``step``, and whether it is the lowest so far."""

    def warning(self, code: str, text: str) -> None:
        """A problem that does not stop the run."""


class SilentObserver:
    """Shows nothing."""

    def phase(self, text: str) -> None: ...

    def note(self, text: str) -> None: ...

    def step(self, info: StepInfo) -> None: ...

    def evaluation(self, step: int, loss: float, best: bool) -> None: ...

    def warning(self, code: str, text: str) -> None: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationInfo:
    """One finished evaluation."""

    step: int
    # Mean over the trained tokens of the evaluation data.
    loss: float
    # Whether it is the lowest so far.
    best: bool
    # In evaluation mode.
    model: Any
    tokenizer: Any


@dataclasses.dataclass(kw_only=True)
class Callbacks:
    """Functions of the user that a run calls, in every process and without gradients. What they draw at random does not
    change the training.

    StopIteration in one of them ends the run, as early stopping does. Any other exception stops it with its checkpoint,
    and reaches the caller of the run.
    """

    on_step: Callable[[StepInfo], object] | None = None
    # The numbers that it returns, by name, are logged with the evaluation.
    on_evaluation: Callable[[EvaluationInfo], Mapping[str, float] | None] | None = None
    # Gets the folder of each checkpoint.
    on_save: Callable[[Path], object] | None = None
    ended: bool = dataclasses.field(default=False, init=False)
    raised: Exception | None = dataclasses.field(default=None, init=False)

    def __post_init__(self) -> None:
        for name in ("on_step", "on_evaluation", "on_save"):
            if not callable(given := getattr(self, name)) and given is not None:
                raise ConfigError("RW103", f"{name} is {given!r}; give a function.")

    def call(self, function: Callable[[Any], object] | None, given: object) -> dict[str, float]:
        """The numbers that ``on_evaluation`` returns, by name. Nothing is called any more after an error."""
        if function is None or self.raised is not None:
            return {}
        try:
            with torch.no_grad(), undisturbed_random_states():
                found = function(given)
            if function is self.on_evaluation and found is not None:
                return _named(found)
        except StopIteration:
            self.ended = True
        except Exception as error:  # noqa: BLE001  it is raised again once the step is saved
            self.raised = error
        return {}


def _named(found: object) -> dict[str, float]:
    """What ``on_evaluation`` returned. Raises ConfigError (RW103) for anything but numbers with names of their own."""
    numbers = found if isinstance(found, Mapping) else {}
    taken = [name for name in numbers if str(name).startswith("eval_") or name in ("step", "loss")]
    if not isinstance(found, Mapping) or taken or not all(hasattr(x, "__float__") for x in numbers.values()):
        wrong = f"{', '.join(taken)}, which the run logs" if taken else repr(found)
        raise ConfigError("RW103", f"on_evaluation returned {wrong}; return numbers by names of your own.")
    return {str(name): float(x) for name, x in numbers.items()}


class EvaluationStopped(Exception):
    """The user asked to stop while an evaluation was running."""


class Diverged(RunError):
    """The loss or the gradients are not finite (RW530)."""


class StepSums:
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
            # A process without rows takes part with a row of a different one.
            sums[:] = [before + value for before, value in zip(sums, values)] if counted.targets else sums

    def read(self, norm: Tensor) -> None:
        """Get all values from the device at once, summed over the processes; the loss is their mean."""
        names = sorted(self.figures)
        figures = [value for name in names for value in self.figures[name]]
        self.norm, *values = _read([norm, *self._losses, *figures], norm.device)
        losses, figures = values[: len(self._losses)], values[len(self._losses) :]
        loss, tokens, examples, *figures = ranks.summed([math.fsum(losses), self.tokens, self.examples, *figures])
        self.loss, self.tokens, self.examples = loss / ranks.count(), int(tokens), int(examples)
        sums, weights = figures[::2], figures[1::2]
        self.figures = {name: [total, weight] for name, total, weight in zip(names, sums, weights)}
        self.steps, self._losses = 1, []

    def take(self, step: StepSums) -> None:
        """Add a step that was read; the loss becomes the mean over steps."""
        self.steps += 1
        self.loss += (step.loss - self.loss) / self.steps
        for name, values in step.figures.items():
            sums = self.figures.get(name, [0.0, 0.0])
            self.figures[name] = [before + value for before, value in zip(sums, values)]


def _read(values: Sequence[Tensor | float], device: torch.device) -> list[float]:
    """``values`` as numbers, those of the device copied at once."""
    tensors = [value.detach().float().reshape(()).to(device) for value in values if isinstance(value, Tensor)]
    copied = iter(torch.stack(tensors).tolist())
    return [next(copied) if isinstance(value, Tensor) else float(value) for value in values]


class GradientCheck:
    """Checks that each adapter tensor gets a finite, nonzero gradient as soon as its method implies one.

    This is the first step for B and m. For A and other vectors it is the first step after B has changed; with warm-up,
    one step later, since the first learning rate is 0. The tensors of an expert to which no token was routed may wait.
    """

    def __init__(self, model: nn.Module, *, overflow_is_normal: bool = False, silence_is_normal: bool = False) -> None:
        self.parameters = dict(adapter_parameters(model)) if has_adapter(model) else {}
        # The tensors that have not passed yet.
        self.waiting = self.parameters
        self.overflow_is_normal = overflow_is_normal
        # If so, steps in which no tensor has a gradient are ignored.
        self.silence_is_normal = silence_is_normal

    def look(self, step: int) -> None:
        """Check the gradients of step ``step``, before the optimizer uses them.

        Raises RunError: RW530 for a gradient that is not finite, RW523 with the tensors that got no gradient.
        """
        if any(value.grad is not None and not value.grad.isfinite().all() for value in self.waiting.values()):
            if self.overflow_is_normal:
                return
            raise Diverged("RW530", f"a gradient is not finite at step {step}; lower --learning-rate.")
        silent = [key for key, value in self.waiting.items() if value.grad is None or not value.grad.any()]
        if self.silence_is_normal and len(silent) == len(self.waiting):
            return
        wrong = [key for key in silent if not self._may_wait(key)]
        if wrong:
            raise RunError(
                "RW523",
                f"{len(wrong)} of {len(self.parameters)} adapter tensors received no gradient at step {step}: "
                f"{some_of(wrong)}; choose --target-modules that the model's forward uses.",
            )
        self.waiting = {key: self.waiting[key] for key in silent}

    def _may_wait(self, key: str) -> bool:
        # A batch may hold none of the new tokens, or no token whose column of A has changed.
        if ".experts." in key or key.endswith(TOKENS) or "lora_embedding_B" in key:
            return True
        if key.endswith("_vector") and not key.endswith(MAGNITUDE):
            # It may scale B A, and waits as A does.
            key = f"{key.rpartition('.')[0]}.lora_A.weight"
        for ours, other in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            partner = key.replace(ours, other) if ours in key else key.replace(other, ours)
            if partner != key:
                return partner in self.parameters and not self.parameters[partner].any()
        return False


@dataclasses.dataclass(kw_only=True)
class Watch:
    """Measures every step, writes ``metrics.jsonl``, calls the observer, and says when the user has asked to stop."""

    model: nn.Module
    progress: Progress
    memory: MemoryMeter
    # {name in metrics.jsonl: words} of the figures that the observer gets.
    shown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    observer: Observer = dataclasses.field(default_factory=SilentObserver)
    # The folder of ``metrics.jsonl``; None in processes that do not write.
    folder: Path | None = None
    tracker: Trackers | None = None
    # Called at every step; updates the wall time in the progress.
    tick: Callable[[], None] = lambda: None
    interrupt: ranks.Interrupt = dataclasses.field(default_factory=ranks.Interrupt)
    check: GradientCheck | None = None
    # The files from which frozen weights are mapped.
    files: MappedFiles | None = None
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)
    tokenizer: Any = None

    def __post_init__(self) -> None:
        self.clock = StepClock(self.progress)
        # ``b_norm`` at the last logged step.
        self.b_norm: float | None = None
        # Seconds of each evaluation so far.
        self.evaluations: list[float] = []
        self.holes = Holes(self.memory.now) if self.memory.device_type == "cpu" else None

    def check_gradients(self) -> None:
        """Check each adapter tensor until it has passed, and the mapped files."""
        if self.files is not None:
            self.files.check()
        if self.check is not None and self.check.waiting:
            self.check.look(self.progress.steps + 1)

    def end_step(self, step: StepSums, means: Mapping[str, float], *, is_logged: bool) -> tuple[bool, bool]:
        """Tell of a step. Returns ``wishes``."""
        self.clock.stop()
        self.tick()
        self.progress.peak_memory_bytes = self.memory.peak()
        if is_logged:
            self.b_norm = b_norm(self.model)
        info = StepInfo(
            step=self.progress.steps,
            total=self.progress.total_steps,
            loss=step.loss,
            tokens_per_second=self.clock.tokens_per_second,
            memory_bytes=self.memory.now(),
            peak_memory_bytes=self.memory.peak(),
            grad_norm=step.norm,
            learning_rate=step.rate,
            b_norm=self.b_norm,
            seconds_left=self._seconds_left(),
            figures={words: means[name] for name, words in self.shown.items() if name in means},
        )
        self.observer.step(info)
        self.callbacks.call(self.callbacks.on_step, info)
        if self.holes is not None:
            self.holes.end_step()
        return self.wishes()

    def wishes(self) -> tuple[bool, bool]:
        """Whether the user, or an error in a callback, asks any process to stop; whether a callback ends the run."""
        stop = self.interrupt.requested or self.callbacks.raised is not None
        stops, ends = ranks.summed([float(stop), float(self.callbacks.ended)])
        return stops > 0, ends > 0

    def saved(self, checkpoint: Path) -> bool:
        """Tell of a checkpoint. Returns whether one of ``wishes`` is true."""
        self.callbacks.call(self.callbacks.on_save, checkpoint)
        return any(self.wishes())

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
        """Raise EvaluationStopped in all processes if the user has asked one of them to stop."""
        if ranks.agreed(self.interrupt.requested):
            raise EvaluationStopped

    def evaluation(self, line: Mapping[str, float], seconds: float) -> bool:
        """Tell of an evaluation, before the progress takes its loss. Returns whether one of ``wishes`` is true."""
        step, loss, lowest = self.progress.steps, line["eval_loss"], self.progress.lowest_loss
        best = lowest is None or loss < lowest
        self.evaluations.append(seconds)
        info = EvaluationInfo(step=step, loss=loss, best=best, model=self.model, tokenizer=self.tokenizer)
        self._append({**self.callbacks.call(self.callbacks.on_evaluation, info), **line})
        self.observer.evaluation(step, loss, best)
        return any(self.wishes())

    def _append(self, line: Mapping[str, float]) -> None:
        if self.folder is not None:
            append_metrics(self.folder, {"step": self.progress.steps, **line})
        if self.tracker is not None:
            self.tracker.log(line, self.progress.steps)

    def _seconds_left(self) -> float:
        """The seconds of the steps and the evaluations to come, the one of this step among them if it is due."""
        progress = self.progress
        left = self.clock.seconds_left(progress.total_steps - progress.steps)
        if not self.evaluations or not progress.eval_steps:
            return left
        due = math.ceil(progress.total_steps / progress.eval_steps) - (progress.steps - 1) // progress.eval_steps
        return left + due * statistics.fmean(self.evaluations)


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


@dataclasses.dataclass(kw_only=True)
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
    # Steps whose gradients overflowed float16, which the schedule does not count.
    skipped: int = 0
    # Sum of the losses of these steps.
    loss_sum: float = 0.0
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

    def per_second(self, count: int) -> float | None:
        return count / self.train_seconds if self.train_seconds > 0 else None


class StepClock:
    """Adds the seconds between ``start`` and ``stop`` to a total, and gives the speed since the clock was made."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.started = 0.0
        self.steps = 0
        self.seconds = 0.0
        self._tokens_before = progress.tokens

    def start(self) -> None:
        self.started = time.perf_counter()

    def stop(self) -> None:
        seconds = time.perf_counter() - self.started
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


# --- metrics.jsonl ---


def begin_metrics(folder: Path, step: int | None) -> None:
    """Write the file of a new run, without lines, or cut it to those up to the ``step`` of a resumed one."""
    lines = [] if step is None else [line for line in read_metrics(folder) if line.get("step", 0) <= step]
    write_text(folder / METRICS_FILE, "".join(map(_line, lines)))


def append_metrics(folder: Path, values: Fields) -> None:
    """Append a line and flush it, so that a killed run leaves at most its last line incomplete."""
    with appending(folder / METRICS_FILE) as file:
        file.write(_line(values).encode())


def evaluations(folder: Path) -> dict[int, float]:
    """{step: evaluation loss} of a run folder."""
    return {line["step"]: line["eval_loss"] for line in read_metrics(folder) if line.get("eval_loss") is not None}


def evaluated_rewards(folder: Path, step: int) -> dict[str, float | None]:
    """The rewards of the evaluation after ``step``, or its measures of labels, under their names without ``eval_``."""
    lines = (line for line in read_metrics(folder) if line["step"] == step and "eval_loss" in line)
    last = max(lines, key=len, default={})
    found = {key.removeprefix("eval_"): value for key, value in last.items() if key.startswith("eval_")}
    return {name: value for name, value in found.items() if name.startswith(("reward", "log_prob", "kl", *MEASURES))}


def _line(values: Fields) -> str:
    # JSON has no NaN and no infinity; they become null.
    clean = {key: None if isinstance(item, float) and not math.isfinite(item) else item for key, item in values.items()}
    return json.dumps(clean) + "\n"

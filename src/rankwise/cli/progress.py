"""Progress displays of a run: redrawn on a terminal, plain lines elsewhere. Both are observers of a run.

A loss curve is one line of text.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import statistics
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rankwise.cli.output import Output, duration, one_line, print_message
from rankwise.config import logging_steps_of
from rankwise.reports.numbers import byte_size

if TYPE_CHECKING:
    from rankwise.training.observer import Observer, StepInfo


@dataclasses.dataclass
class History:
    """The curve so far."""

    steps: list[int] = dataclasses.field(default_factory=list)
    losses: list[float] = dataclasses.field(default_factory=list)
    evaluations: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    # Whether the loss of an evaluation is the negative of a mean reward.
    of_rewards: bool = False
    latest: StepInfo | None = None

    def add(self, info: StepInfo) -> None:
        self.steps.append(info.step)
        self.losses.append(info.loss)
        self.latest = info

    @property
    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the lowest evaluation that is a number."""
        finite = [item for item in self.evaluations if math.isfinite(item[1])]
        return min(finite, key=lambda item: item[1]) if finite else None


class _Warnings:
    """Prints each warning once."""

    def __init__(self) -> None:
        self.seen: set[tuple[str, str]] = set()

    def warning(self, code: str, text: str) -> None:
        if (code, text) not in self.seen:
            self.seen.add((code, text))
            print_message("warning", code, text)


class PlainProgress(_Warnings):
    """A line for each phase, for each ``every`` steps (None: as often as is logged by default) and for each
    evaluation.
    """

    def __init__(self, output: Output, every: int | None, *, of_rewards: bool = False) -> None:
        super().__init__()
        self.output = output
        self.every = every
        self.of_rewards = of_rewards
        # Losses of the steps since the last printed line.
        self.unsaid: list[float] = []

    def phase(self, text: str) -> None:
        self.output.line(f"{text} ...")

    def note(self, text: str) -> None:
        self.output.line(text)

    def step(self, info: StepInfo) -> None:
        """Print a line. Its loss is that of the same step in ``metrics.jsonl``."""
        self.unsaid.append(info.loss)
        every = self.every or logging_steps_of(info.total)
        if info.step % every == 0 or info.step in (1, info.total):
            mean = f"{statistics.fmean(self.unsaid):.4f} (mean of {len(self.unsaid)} steps)"
            loss = mean if len(self.unsaid) > 1 else f"{info.loss:.4f}"
            self.output.line(f"step {info.step}/{info.total}  loss {loss}  {figures(info)}")
            self.unsaid = []

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        found = f"reward {0 - loss:.4f}" if self.of_rewards else f"loss {loss:.4f}"
        self.output.line(f"evaluation at step {step}: {found}{' (best so far)' if best else ''}")

    def sample(self, step: int, text: str) -> None:
        self.output.line(f"sample: {one_line(text)}")


class LiveProgress(_Warnings):
    """A redrawn display of a few lines; samples and warnings are printed above it."""

    def __init__(self, output: Output, *, of_rewards: bool = False) -> None:
        super().__init__()
        self.output = output
        self.history = History(of_rewards=of_rewards)
        self.phase_name = "Starting"
        self.running = True

    def phase(self, text: str) -> None:
        self.phase_name = text

    def note(self, text: str) -> None:
        self.output.line(text)

    def step(self, info: StepInfo) -> None:
        self.history.add(info)

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        self.history.evaluations.append((step, loss))

    def sample(self, step: int, text: str) -> None:
        self.output.line(f"sample at step {step}: {one_line(text)}", style="dim")

    def __rich__(self) -> RenderableType:
        if self.history.latest is None:
            # Nothing to leave behind when it ends before the first step.
            return Text("") if not self.running else Spinner("dots", Text(self.phase_name))
        width = min(60, max(10, self.output.console.width - 28))
        return Group(
            _bar(self.phase_name, self.history.latest),
            *curve_lines(self.history, width),
            _figures_line(self.history.latest),
        )


@contextlib.contextmanager
def watching(output: Output, *, every: int | None, of_rewards: bool) -> Iterator[Observer]:
    """An observer for one run: live on a terminal, plain elsewhere."""
    if not output.is_terminal:
        yield PlainProgress(output, every, of_rewards=of_rewards)
        return
    live = LiveProgress(output, of_rewards=of_rewards)
    with Live(live, console=output.console, refresh_per_second=4):
        try:
            yield live
            live.phase("Done")
        finally:
            live.running = False


def figures(info: StepInfo) -> str:
    """Speed, memory, norms and time left in one line."""
    parts = [f"{name} {value:.3g}" for name, value in info.figures.items()]
    parts += [f"{info.tokens_per_second:,.0f} tokens/s", byte_size(info.memory_bytes)]
    if info.grad_norm is not None:
        parts.append(f"gradient {info.grad_norm:.3g}")
    if info.b_norm is not None:
        parts.append(f"B {info.b_norm:.3g}")
    return "  ".join([*parts, f"{duration(info.seconds_left)} left"])


def curve_lines(history: History, width: int) -> list[Text]:
    """The loss of each step as a sparkline, and below it where the best evaluation was."""
    lines = [Text.assemble(f"step loss {history.losses[-1]:<9.4f}", (sparkline(history.losses, width), "cyan"))]
    if history.best is not None:
        sign = -1 if history.of_rewards else 1
        step, best = history.best[0], sign * history.best[1]
        index = sum(1 for seen in history.steps if seen < step)
        column = position(min(index, len(history.steps) - 1), len(history.steps), width)
        last = sign * history.evaluations[-1][1]
        label = f"▲ best {best:.4f} at step {step}"
        # The label goes left of the mark where the line has no room to its right.
        if column + len(label) > width:
            label, column = f"best {best:.4f} at step {step} ▲", max(0, column + 1 - len(label))
        name = "reward   " if history.of_rewards else "eval loss"
        lines.append(Text.assemble(f"{name} {last:<9.4f}", " " * column, (label, "green")))
    return lines


def _bar(phase: str, info: StepInfo) -> Table:
    row = Table.grid(padding=(0, 2, 0, 0), expand=True)
    for ratio in (None, None, 1, None):
        row.add_column(ratio=ratio, no_wrap=True)
    bar = ProgressBar(total=info.total, completed=info.step)
    row.add_row(Text(phase, style="bold"), f"step {info.step}/{info.total}", bar, f"{duration(info.seconds_left)} left")
    return row


def _figures_line(info: StepInfo) -> Text:
    parts = [f"{name} {value:.3g}" for name, value in info.figures.items()]
    parts.append(f"{info.tokens_per_second:,.0f} tokens/s")
    parts.append(f"memory {byte_size(info.memory_bytes)} (peak {byte_size(info.peak_memory_bytes)})")
    if info.grad_norm is not None:
        parts.append(f"gradient {info.grad_norm:.3g}")
    if info.b_norm is not None:
        parts.append(f"norm of B {info.b_norm:.3g}")
    return Text("  ".join(parts), style="dim", no_wrap=True, overflow="ellipsis")


BARS = "▁▂▃▄▅▆▇█"


def sparkline(values: Sequence[float], width: int) -> str:
    """``values`` as at most ``width`` bars; several values that share a bar are averaged, NaN is a gap."""
    bins = [sum(chunk) / len(chunk) for chunk in _chunks(values, width)]
    finite = [value for value in bins if math.isfinite(value)]
    if not finite:
        return ""
    low, high = min(finite), max(finite)
    span = (high - low) or 1.0
    last = len(BARS) - 1
    return "".join(BARS[round((value - low) / span * last)] if math.isfinite(value) else " " for value in bins)


def position(index: int, count: int, width: int) -> int:
    """The column of the sparkline in which value ``index`` of ``count`` stands."""
    return index if count <= width else min(width - 1, index * width // count)


def _chunks(values: Sequence[float], width: int) -> list[Sequence[float]]:
    if len(values) <= width:
        return [[value] for value in values]
    groups: list[list[float]] = [[] for _ in range(width)]
    for index, value in enumerate(values):
        groups[position(index, len(values), width)].append(value)
    return list(groups)

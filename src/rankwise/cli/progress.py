"""Progress displays of a run: redrawn on a terminal, plain lines elsewhere. Both are observers of a run."""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rankwise.cli.output import Output, print_message
from rankwise.config import logging_steps_of
from rankwise.reports.numbers import byte_size, duration

if TYPE_CHECKING:
    from rankwise.training.observer import Observer, StepInfo


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
        self.output.line(evaluation_line(step, loss, best, of_rewards=self.of_rewards))


class LiveProgress(_Warnings):
    """A redrawn display of a few lines; warnings are printed above it."""

    def __init__(self, output: Output, *, of_rewards: bool = False) -> None:
        super().__init__()
        self.output = output
        self.of_rewards = of_rewards
        self.phase_name = "Starting"
        self.running = True
        self.latest: StepInfo | None = None
        self.evaluations: list[str] = []

    def phase(self, text: str) -> None:
        self.phase_name = text

    def note(self, text: str) -> None:
        self.output.line(text)

    def step(self, info: StepInfo) -> None:
        self.latest = info

    def evaluation(self, step: int, loss: float, best: bool) -> None:
        """Keep the best evaluation and the last one."""
        said = evaluation_line(step, loss, best, of_rewards=self.of_rewards)
        self.evaluations = [said] if best else [*self.evaluations[:1], said]

    def __rich__(self) -> RenderableType:
        if (info := self.latest) is None:
            # Nothing to leave behind when it ends before the first step.
            return Text("") if not self.running else Spinner("dots", Text(self.phase_name))
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for ratio in (None, None, 1, None):
            row.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=info.total, completed=info.step)
        row.add_row(Text(self.phase_name, style="bold"), f"step {info.step}/{info.total}", bar, f"loss {info.loss:.4f}")
        return Group(row, *map(Text, self.evaluations), Text(figures(info), "dim", no_wrap=True, overflow="ellipsis"))


def evaluation_line(step: int, loss: float, best: bool, *, of_rewards: bool) -> str:
    """``of_rewards``: the loss of an evaluation is the negative of a mean reward."""
    found = f"reward {0 - loss:.4f}" if of_rewards else f"loss {loss:.4f}"
    return f"evaluation at step {step}: {found}{' (best so far)' if best else ''}"


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

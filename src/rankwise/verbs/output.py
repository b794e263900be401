"""The output of a command: text for people on the console, or the one document of ``--json`` for programs.

Numbers are written as people read them. Tables have no lines, a dim head, and the title above. The displays of progress
are observers of a run.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import re
import statistics
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rankwise.config import logging_steps_of
from rankwise.errors import RankwiseWarning, heard
from rankwise.foreign import Fields, Json
from rankwise.reports.numbers import byte_size, duration

if TYPE_CHECKING:
    from rankwise.training.watch import Observer, StepInfo

# The result of a command, which --json prints.
Document = Fields

DEBUG_VARIABLE = "RANKWISE_DEBUG"

# Read when the libraries are imported, which is after the command line has been parsed.
QUIET_ENVIRONMENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "DATASETS_VERBOSITY": "error",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}

# Characters of a printed message.
LONGEST_MESSAGE = 4000
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

# Width of output into a file or another program, in which every table fits.
PLAIN_WIDTH = 120
# That of a notebook's cell, and the HTML in it: the font of code also where the page sets another one.
CELL_WIDTH = 96
PRE = '<pre style="font-family:monospace;line-height:1.3;white-space:pre-wrap;word-break:normal">{code}</pre>'


class Output:
    """Where a command prints: to stdout, or with ``--json`` to stderr, so that stdout holds only the document."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.as_json = as_json
        # In a notebook, rich would make a block of HTML of each line.
        self.console = Console(stderr=as_json, highlight=False, force_jupyter=False)
        if not self.console.is_terminal and "COLUMNS" not in os.environ:
            self.console.width = PLAIN_WIDTH

    @property
    def is_terminal(self) -> bool:
        """Whether the console is a terminal that can be redrawn."""
        return self.console.is_terminal and not self.console.is_dumb_terminal

    @property
    def is_notebook(self) -> bool:
        """Whether a notebook's kernel runs this program; one that runs notebooks has ipykernel's modules, too."""
        ipython = sys.modules.get("IPython")
        return ipython is not None and hasattr(ipython.get_ipython(), "kernel")

    def waiting(self, text: str) -> contextlib.AbstractContextManager[object]:
        """A spinner on a terminal, nothing elsewhere."""
        return self.console.status(text) if self.is_terminal else contextlib.nullcontext()

    def line(self, text: str = "", style: str | None = None) -> None:
        """Print a line as it is: no markup, no wrapping that would break a path."""
        self.console.print(text, style=style, markup=False, soft_wrap=True)

    def note(self, text: str) -> None:
        """Print a line on stderr, so that stdout holds what a model says and nothing about it."""
        Console(stderr=True, highlight=False, force_jupyter=False).print(
            text, style="dim", markup=False, soft_wrap=True
        )


def debugging() -> bool:
    return os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")


def print_document(document: Document) -> None:
    """Print the JSON document of ``--json``. NaN and infinity become null, since JSON has neither."""
    text = json.dumps(_without_nan(document), indent=2, ensure_ascii=False, allow_nan=False, default=str)
    # A lone surrogate, which file names can hold, becomes a JSON escape.
    print(text.encode("utf-8", "backslashreplace").decode(), flush=True)


def shortened(message: str) -> str:
    """Both ends of a message that would not fit on a screen."""
    if len(message) <= LONGEST_MESSAGE:
        return message
    half = LONGEST_MESSAGE // 2
    return f"{message[:half]}...({len(message) - 2 * half:,} more characters)...{message[-half:]}"


def _without_nan(value: Json) -> Json:
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(item) for item in value]
    return value


def print_message(kind: str, code: str, text: str) -> None:
    """Print ``error RW103: ...`` as one line on stderr."""
    colour = {"error": "bold red", "warning": "bold yellow"}.get(kind, "bold")
    # Names in untrusted files may hold control characters, which would act on the terminal.
    line = _CONTROL.sub("?", " ".join(part.strip() for part in shortened(text).splitlines()))
    Console(stderr=True, highlight=False, force_jupyter=False).print(
        f"[{colour}]{kind} {code}[/]: {escape(line)}", soft_wrap=True
    )


@contextlib.contextmanager
def only_our_messages() -> Iterator[None]:
    """Print each RankwiseWarning once; keep other libraries' logs, warnings and progress bars silent."""
    seen: set[str] = set()

    def tell(warning: RankwiseWarning) -> bool:
        if str(warning) not in seen:
            seen.add(str(warning))
            print_message("warning", warning.code, warning.message)
        return False

    with heard(tell), _silence() if not debugging() else contextlib.nullcontext():
        if not debugging():
            warnings.simplefilter("ignore")
        warnings.simplefilter("always", RankwiseWarning)
        yield


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Silence other libraries. The level of logging is restored; the environment is not, since each library reads it
    once.
    """
    for name, value in QUIET_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def light_table(*, gap: int = 2, expand: bool = False) -> Table:
    """An empty table with ``gap`` blanks between its columns, as wide as its content unless ``expand``."""
    return Table(box=None, padding=(0, gap, 0, 0), pad_edge=False, header_style="dim", expand=expand)


def titled(title: str, table: Table) -> Group:
    """A table with its title above: rich would wrap a title at the width of the table."""
    return Group(Text(title, style="bold"), table)


# --- the progress of a run: redrawn on a terminal, plain lines elsewhere ---


class PlainProgress:
    """A line for each phase, for each ``every`` steps (None: as often as is logged by default) and for each
    evaluation.
    """

    def __init__(self, output: Output, every: int | None, *, of_rewards: bool = False) -> None:
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

    def warning(self, code: str, text: str) -> None:
        print_message("warning", code, text)


class Shown:
    """A result that shows itself as its command prints it, in a terminal and in a notebook."""

    def show(self, output: Output) -> None:
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._console().export_text().rstrip()

    def _repr_html_(self) -> str:
        return self._console().export_html(inline_styles=True, code_format=PRE)

    def _console(self) -> Console:
        output = Output()
        output.console = Console(
            file=io.StringIO(), record=True, width=CELL_WIDTH, highlight=False, force_jupyter=False
        )
        self.show(output)
        return output.console


class LiveProgress:
    """A redrawn display of a few lines; warnings are printed above it."""

    def __init__(self, output: Output, *, of_rewards: bool = False) -> None:
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

    def warning(self, code: str, text: str) -> None:
        print_message("warning", code, text)

    def __rich__(self) -> RenderableType:
        if (info := self.latest) is None:
            # Nothing to leave behind when it ends before the first step.
            return Text("") if not self.running else Spinner("dots", Text(self.phase_name))
        row = Table.grid(padding=(0, 2, 0, 0), expand=True)
        for ratio in (None, None, 1, None):
            row.add_column(ratio=ratio, no_wrap=True)
        bar = ProgressBar(total=info.total, completed=info.step)
        row.add_row(Text(self.phase_name, style="bold"), f"step {info.step}/{info.total}", bar, f"loss {info.loss:.4f}")
        said = figures(info)
        if self.phase_name == "Done":
            # An evaluation that was due at the last step was counted as time left.
            said = said.rpartition("  ")[0]
        return Group(row, *map(Text, self.evaluations), Text(said, "dim", no_wrap=True, overflow="ellipsis"))


class NotebookProgress(LiveProgress, Shown):
    """The same display in a cell, redrawn four times a second at most."""

    def __init__(self, output: Output, *, of_rewards: bool = False) -> None:
        from IPython.display import display

        super().__init__(output, of_rewards=of_rewards)
        self.drawn, self.handle = time.monotonic(), display(self, display_id=True)

    def step(self, info: StepInfo) -> None:
        super().step(info)
        if time.monotonic() - self.drawn > 0.25 or info.step == info.total:
            self.drawn = time.monotonic()
            self.handle.update(self)

    def show(self, output: Output) -> None:
        output.console.print(self)


def evaluation_line(step: int, loss: float, best: bool, *, of_rewards: bool) -> str:
    """``of_rewards``: the loss of an evaluation is the negative of a mean reward."""
    found = f"reward {0 - loss:.4f}" if of_rewards else f"loss {loss:.4f}"
    return f"evaluation at step {step}: {found}{' (best so far)' if best else ''}"


@contextlib.contextmanager
def watching(output: Output, *, every: int | None, of_rewards: bool) -> Iterator[Observer]:
    """An observer for one run: live on a terminal and in a notebook, plain elsewhere."""
    if output.is_notebook and not output.console.quiet:
        shown = NotebookProgress(output, of_rewards=of_rewards)
        yield shown
        shown.phase("Done")
        shown.handle.update(shown)
        return
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
    parts = [f"{name} {value:{'.0%' if name == 'accuracy' else '.3g'}}" for name, value in info.figures.items()]
    parts += [f"{info.tokens_per_second:,.0f} tokens/s", byte_size(info.memory_bytes)]
    if info.grad_norm is not None:
        parts.append(f"gradient {info.grad_norm:.3g}")
    if info.b_norm is not None:
        parts.append(f"B {info.b_norm:.3g}")
    return "  ".join([*parts, f"{duration(info.seconds_left)} left"])

"""``rankwise plan``: what fits, how fast, which method, and the command to run."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rankwise.cli.options import Command
from rankwise.planning.workload import TRACING, PlanSettings
from rankwise.verbs.output import Document, Output
from rankwise.verbs.plan import carry_out


def run(settings: PlanSettings, output: Output) -> Document:
    with _progress(output) as say:
        planned = carry_out(settings, say, output.waiting)
    planned.show(output)
    return planned.document


@contextmanager
def _progress(output: Output) -> Iterator[Callable[[str], None]]:
    """Shows what is traced: on a terminal in one line that changes, elsewhere only the first that takes long."""
    if output.is_terminal:
        with output.console.status("planning") as status:
            yield status.update
        return
    told: list[str] = []

    def say(line: str) -> None:
        if not told or not line.startswith(TRACING):
            print(line, file=sys.stderr, flush=True)
        told.append(line)

    yield say


COMMAND = Command(
    name="plan",
    settings=PlanSettings,
    run=run,
    summary="Say what fits the memory, how long training takes and which method to take. Reads no weights.",
    examples=(
        'rankwise plan --model meta-llama/Llama-3.1-8B --gpu "RTX 4090"',
        "rankwise plan --model demo --memory 24GB --max-length 2048 --save plan.yaml",
    ),
)

"""``metrics.jsonl``: one line per logged step and one per evaluation. Imports no torch."""

from __future__ import annotations

import json
import math
from pathlib import Path

from rankwise.disk import appending
from rankwise.foreign import Fields
from rankwise.labels import MEASURES
from rankwise.records import METRICS_FILE, read_metrics, write_text


class MetricsFile:
    """Appends lines to the file and flushes each, so that a killed run leaves at most its last line incomplete."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        self.path = folder / METRICS_FILE
        kept = list(read_metrics(folder)) if resume_step is not None else []
        kept = [line for line in kept if line.get("step", 0) <= (resume_step or 0)]
        write_text(self.path, "".join(_line(item) for item in kept))

    def append(self, values: Fields) -> None:
        with appending(self.path) as file:
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

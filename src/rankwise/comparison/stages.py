"""The runs of a comparison and the stages of each, with the files from which a restart learns what is done."""

from __future__ import annotations

import dataclasses
import math
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rankwise.config import idle_options, variant_of
from rankwise.errors import Interrupted, RunError, one_line
from rankwise.foreign import Fields, JsonObject, checked, read_json
from rankwise.records import RUN_FILE, read_metrics, record_of, write_json, write_text
from rankwise.reports.comparison import RUNS_FOLDER


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run: a method, with its variants, at a learning rate with a seed. A run without a rate first searches for its
    rate (``--learning-rate auto``).
    """

    method: str
    learning_rate: float | None
    seed: int

    @property
    def id(self) -> str:
        rate = "auto" if self.learning_rate is None else f"lr{self.learning_rate:g}"
        return f"{self.method}-{rate}-seed{self.seed}"

    def folder(self, output: Path) -> Path:
        return output / RUNS_FOLDER / self.id


def planned_runs(methods: int, rates: int, seeds: int) -> int:
    """The number of runs of the whole comparison."""
    return methods * (rates + seeds - 1)


def choose_rate(losses: Mapping[float, float | None]) -> tuple[float | None, bool]:
    """(rate with the lowest loss, whether it is the lowest or highest of those tried).

    A failed run (None, or a loss that is not finite) is never chosen but counts as tried: a best rate next to a
    diverged one is not at the edge.
    """
    finite = {rate: loss for rate, loss in losses.items() if loss is not None and math.isfinite(loss)}
    if not finite:
        return None, False
    best = min(sorted(finite), key=lambda rate: finite[rate])
    return best, len(losses) > 1 and best in (min(losses), max(losses))


def cell_settings(cell: Cell, output: Path, shared: Fields, inputs: Fields) -> JsonObject:
    """The settings file of ``rankwise train`` for a cell. ``inputs``: model, data and eval_data.

    Options without effect on the cell's method are left out.
    """
    method, options = variant_of(cell.method)
    idle: set[str] = set().union(*idle_options(method).values())
    used = {name: value for name, value in shared.items() if name not in idle}
    of_cell = {"method": method, "learning_rate": cell.learning_rate, "seed": cell.seed}
    return {**used, **inputs, **options, **of_cell, "output": str(cell.folder(output))}


Stage = Literal["prepare", "train", "measure"]
CLI = "rankwise.cli.main"
STEPS = "rankwise.comparison.steps"
# The tasks on the evaluation data: for demonstrations, preferences and labels.
PERPLEXITY, PREFERENCE, LABELS = OWN_TASKS = ("perplexity", "preference", "labels")
# In place of a cell's name in jobs that prepare the base or evaluate the unadapted model.
BASE = "base"
KILLED, INTERRUPTED = "RW583", "RW597"
# Error code of a run that does not fit according to the memory plan.
TOO_LARGE = "RW562"
# Errors that, before the first step, every seed of a method would raise.
OF_METHOD = ("ConfigError", "ModelError", "AdapterError", "QuantizationError")
# Error codes of a full or failed disk, which are no property of the run.
OF_DISK = ("RW513", "RW514", "RW551")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a stage ended."""

    status: Literal["finished", "failed"]
    seconds: float
    error: dict[str, str] | None = None
    # Whether the stage was stopped from outside, so that the next call starts it again.
    again: bool = False
    # Whether training could not start: the method cannot run here, and its other seeds are skipped.
    cannot_run: bool = False
    # Whether training could not start because of the data, which all runs share.
    of_data: bool = False
    # Whether no other step could run beside it; not known after a kill.
    alone: bool = False

    @property
    def is_interrupted(self) -> bool:
        """Whether the stage was asked to stop, and is neither done nor failed."""
        return self.error is not None and self.error["code"] == INTERRUPTED


@dataclasses.dataclass(frozen=True)
class Job:
    """A stage of a cell, or of the base model."""

    stage: Stage
    cell: Cell | None

    @property
    def id(self) -> str:
        return self.cell.id if self.cell else BASE

    def folder(self, output: Path) -> Path:
        return self.cell.folder(output) if self.cell else output / BASE

    def name(self, output: Path) -> Path:
        """The path of the job's files in ``DIR/cells``, without extension."""
        return output / "cells" / f"{self.id}.{self.stage}"


def outcome_of(job: Job, output: Path) -> Outcome | None:
    """How the job ended; None if it has not. A finished record counts even if a kill came before the outcome."""
    path = beside(job.name(output), ".json")
    try:
        return checked(Outcome, read_json(path))
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise RunError(
            "RW581", f"cannot read {path}: {one_line(error)}; remove the file, so that the step runs again."
        ) from None
    record = record_of(job.folder(output)) if job.stage == "train" else None
    if record is not None and record.status == "finished":
        return Outcome("finished", record.wall_seconds or 0.0)
    return None


def keep_outcome(job: Job, output: Path, outcome: Outcome) -> None:
    write_json(beside(job.name(output), ".json"), dataclasses.asdict(outcome))


def forget_outcome(job: Job, output: Path) -> None:
    beside(job.name(output), ".json").unlink(missing_ok=True)


def beside(name: Path, ending: str) -> Path:
    """``NAME`` with an extension. Names contain dots, at which ``with_suffix`` would cut."""
    return name.with_name(name.name + ending)


def train_arguments(job: Job, output: Path, settings: Fields) -> list[str]:
    """The arguments of ``rankwise train`` for a cell; it resumes from its last checkpoint if there is one."""
    import yaml

    folder, config = job.folder(output), beside(job.name(output), ".yaml")
    there = (folder / RUN_FILE).is_file()
    config.parent.mkdir(parents=True, exist_ok=True)
    write_text(config, yaml.safe_dump({key.replace("_", "-"): value for key, value in settings.items()}))
    return ["train", "--config", str(config), "--json", *(["--resume"] if there else [])]


def outcome_from(job: Job, output: Path, code: int, document: Fields, seconds: float) -> Outcome:
    """The outcome of a stage, from its exit code and the document that it printed."""
    if code == 0:
        return Outcome("finished", seconds)
    found = document.get("error")
    if -code in (signal.SIGINT, signal.SIGTERM) or code == Interrupted.exit_code:
        message = f"{job.stage} of {job.id} was interrupted before it ended; the same command continues it."
        return Outcome("failed", seconds, {"code": INTERRUPTED, "message": message}, again=True)
    if code < 0 or not isinstance(found, Mapping):
        return Outcome("failed", seconds, _cut_off(job, output, code), again=code < 0)
    error = {"code": str(found.get("code")), "message": str(found.get("message"))}
    if error["code"] in OF_DISK or found.get("of_device") is True:
        return Outcome("failed", seconds, error, again=True)
    stepped = job.stage == "measure" or any("loss" in line for line in read_metrics(job.folder(output)))
    is_of_method = job.stage == "train" and (found.get("kind") in OF_METHOD or error["code"] == TOO_LARGE)
    is_of_data = found.get("kind") == "DataError"
    return Outcome(
        "failed", seconds, error, cannot_run=is_of_method and not stepped, of_data=is_of_data and not stepped
    )


def _cut_off(job: Job, output: Path, code: int) -> dict[str, str]:
    log = beside(job.name(output), ".log")
    if code < 0:
        reason = f"a signal ({-code}) ended it" + (", as the system does when memory is full" if code == -9 else "")
    else:
        reason = f"it ended with code {code}"
    return {"code": KILLED, "message": f"{job.stage} of {job.id}: {reason}; see {log}."}

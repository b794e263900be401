"""The command of each step of a comparison: its module, its arguments, and the settings file that it reads."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

from rankwise.comparison import stages
from rankwise.comparison.collect import read_json
from rankwise.comparison.inputs import Inputs
from rankwise.comparison.matrix import Cell, cell_settings
from rankwise.comparison.pool import steps_of
from rankwise.comparison.schedule import Plan, probe_of
from rankwise.comparison.settings import CompareSettings, shared_training
from rankwise.comparison.stages import Job
from rankwise.config import is_own, variant_of
from rankwise.errors import warn
from rankwise.foreign import Fields, JsonObject
from rankwise.records import write_json
from rankwise.reports.numbers import byte_size

# Optimizer steps of the run that measures how many fit into --minutes; the first, which allocates, is not counted.
PROBE_STEPS = 6
# Settings, other than the tasks, on which the results of a measurement depend.
MEASURED = ("task_limit", "eval_data", "max_length", "chat_template", "dtype")


class Commands:
    """Makes the command of a job."""

    def __init__(self, given: CompareSettings, plan: Plan, inputs: Inputs) -> None:
        self.given, self.plan, self.inputs = given, plan, inputs
        self.shared = shared_training(given)
        self.batches = {method: self._batch(method) for method in plan.methods}

    def of(self, job: Job) -> tuple[str, list[str]]:
        if job.stage in ("train", "probe"):
            return stages.CLI, stages.train_arguments(job, self.plan.output, self._training(job))
        path = stages.beside(job.name(self.plan.output), ".in")
        if job.stage == "prepare":
            cells = [Cell(method, self.plan.rates[method][0], 0) for method in self.plan.methods]
            # The settings of one run of each method.
            write_json(path, {"runs": [self._cell_settings(cell, None) for cell in cells]})
            return stages.PREPARE, [str(path)]
        write_json(path, self._measuring(job))
        return stages.MEASURE, [str(path)]

    def steps(self, job: Job) -> int:
        """The number of optimizer steps of a training, for the progress display and the time left."""
        if job.cell is None or job.stage not in ("train", "probe"):
            return 0
        steps = self._max_steps(job)
        if steps is not None:
            return steps
        batch = self.shared["batch_size"] * self.shared["gradient_accumulation"]
        return max(1, math.ceil(self.inputs.train_rows / batch) * math.ceil(self.shared["epochs"]))

    def is_outdated(self, job: Job) -> bool:
        """Whether a finished step must run again because this call asks for other methods or tasks."""
        before = read_json(stages.beside(job.name(self.plan.output), ".in"))
        if job.stage == "prepare":
            return [run["method"] for run in before.get("runs", [])] != list(self.plan.methods)
        if job.stage != "measure" or not before:
            return False
        now = self._measuring(job)
        added = set(now["tasks"]) - set(before.get("tasks", ()))
        checked = now["merged_check"] and not before.get("merged_check")
        asked = before.get("questions", {})
        changed = any(asked.get(task, sha256) != sha256 for task, sha256 in now["questions"].items())
        return bool(added or checked or changed) or any(before.get(name) != now[name] for name in MEASURED)

    def _max_steps(self, job: Job) -> int | None:
        assert job.cell is not None
        if job.stage == "probe":
            return PROBE_STEPS
        if job.cell.short:
            return self.given.search_steps
        if self.given.minutes is not None:
            return self._steps_in_time(job.cell.method)
        return self.shared["max_steps"]

    def _steps_in_time(self, method: str) -> int:
        seen = steps_of(probe_of(self.plan, method).folder(self.plan.output))
        if len(seen) < 2:
            # The method's probe has not run yet, or it failed, and then the method has no runs.
            return PROBE_STEPS
        (first, start), (last, end) = seen[0], seen[-1]
        assert self.given.minutes is not None
        return max(1, int(self.given.minutes * 60 * (last - first) / (end - start)))

    def _training(self, job: Job) -> JsonObject:
        assert job.cell is not None
        settings = self._cell_settings(job.cell, self._max_steps(job))
        if job.stage != "probe":
            return settings
        return settings | {
            "output": str(job.folder(self.plan.output)),
            "logging_steps": 1,
            **dict.fromkeys(("eval_data", "eval_limit", "eval_steps", "early_stopping", "save_steps")),
        }

    def _cell_settings(self, cell: Cell, steps: int | None) -> JsonObject:
        inputs = {"model": _model(self.given.model), "data": self.inputs.train, "eval_data": self.inputs.evaluation}
        shared = {**self.shared, **self.batches[cell.method], "eval_limit": 0, "cache": str(self._cache())}
        settings = cell_settings(cell, self.plan.output, shared, inputs, steps)
        if cell.learning_rate is not None:
            return settings
        rates = ",".join(map(repr, self.plan.rates[cell.method]))
        return settings | {"learning_rate": f"auto:{rates}", "budget": self.given.budget}

    def _batch(self, method: str) -> JsonObject:
        """With --memory-budget, the largest micro-batch that the plan says fits. The rows of a step do not change."""
        if self.given.memory_budget is None:
            return {}
        if not is_own(method):
            warn("RW564", f"there is no memory plan for {method}; it keeps --batch-size {self.shared['batch_size']}.")
            return {}
        rows = self.shared["batch_size"] * self.shared["gradient_accumulation"]
        sizes = [size for size in range(rows, 0, -1) if rows % size == 0]
        for again in (False, True):
            for size in sizes:
                changes = {"batch_size": size, "gradient_accumulation": rows // size, "gradient_checkpointing": again}
                if self._peak_bytes(method, changes) <= self.given.memory_budget:
                    return changes
        warn(
            "RW565",
            f"{method} does not fit in --memory-budget {byte_size(self.given.memory_budget)}, even one row at "
            "a time with --gradient-checkpointing; it still runs, and its measured memory is in the report.",
        )
        return {"batch_size": 1, "gradient_accumulation": rows, "gradient_checkpointing": True}

    def _peak_bytes(self, method: str, changes: Fields) -> int:
        from rankwise.planning.estimate import estimate
        from rankwise.planning.hardware import cpu_hardware, this_machine
        from rankwise.planning.plan import workload_of

        base, options = variant_of(method)
        settings = {**self.shared, **changes, **options, "method": base}
        hardware = cpu_hardware() if settings["device"] == "cpu" else this_machine()
        workload = dataclasses.replace(workload_of(settings, hardware), max_length=self.shared["max_length"])
        return estimate(_model(self.given.model), base, workload).peak_bytes

    def _cache(self) -> Path:
        """The cache folder with prepared base models and encoded rows."""
        return self.plan.output.resolve() / "cache"

    def _measuring(self, job: Job) -> JsonObject:
        names = (
            *("max_length", "chat_template", "dtype", "device", "trust_remote_code", "revision"),
            *("objective", "beta", "prompt_column", "completion_column"),
        )
        return {
            "folder": str(job.folder(self.plan.output)),
            "model": _model(self.given.model),
            "cache": str(self._cache()),
            "method": variant_of(job.cell.method)[0] if job.cell else None,
            "eval_data": self.inputs.evaluation,
            "merged_check": self.given.merged_check,
            "tasks": list(self.given.task),
            "task_data": list(self.given.task_data),
            "questions": self.inputs.questions,
            "task_limit": self.given.task_limit,
            **{name: self.shared[name] for name in names},
        }


def _model(name: str) -> str:
    """The model as the user wrote it, a path as an absolute one."""
    path = Path(name).expanduser()
    return str(path.resolve()) if name != "demo" and path.exists() else name

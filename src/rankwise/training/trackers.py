"""Trackers of runs: TensorBoard, Weights & Biases and trackio, each by its own package."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import ConfigError, RunError, one_line, warn
from rankwise.foreign import JsonObject

# (log(values, step), finish()) of a tracker that has begun.
Begun = tuple[Callable[[dict[str, Any], int], Any], Callable[[], None]]


def check_installed(names: Sequence[str]) -> None:
    """Raise ConfigError (RW794) for trackers whose package is missing."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(missing)
        raise ConfigError(
            "RW794", f"--report-to {', '.join(missing)} needs packages that are missing; run pip install {packages}."
        )


def begin(name: str, folder: Path, settings: JsonObject) -> Begun:
    if name == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(os.environ.get("TENSORBOARD_LOGGING_DIR", folder / "tensorboard"))
        return lambda values, step: [writer.add_scalar(key, values[key], step) for key in values], writer.close
    own = {"resume": "allow", "embed": False} if name == "trackio" else {}
    project = os.environ.get(f"{name.upper()}_PROJECT", "rankwise")
    run = importlib.import_module(name).init(project=project, name=folder.name, config=settings, **own)
    return run.log, run.finish


class Trackers:
    """The trackers of a run, from entering to leaving. Raises RunError (RW629) for one that cannot begin; one that
    fails later is dropped (RW630)."""

    def __init__(self, names: Sequence[str], folder: Path, settings: JsonObject, predicted_bytes: int | None) -> None:
        self.names, self.folder, self.settings, self.predicted_bytes = names, folder, settings, predicted_bytes
        self.begun: dict[str, Begun] = {}

    def __enter__(self) -> Trackers:
        for name in self.names:
            try:
                with _on_stderr():
                    self.begun[name] = begin(name, self.folder, self.settings)
            except Exception as error:
                self.__exit__()
                advice = "correct that, or leave the tracker out of --report-to, and continue with --resume"
                raise RunError("RW629", f"{_failed(name, error)}; {advice}.") from error
        return self

    def log(self, line: Mapping[str, Any], step: int) -> None:
        """Log a line under the sections eval, memory and train; beside the peak so far, what the plan predicts."""
        values, peak = dict(line), line.get("peak_memory_bytes")
        if self.predicted_bytes and peak is not None:
            values["predicted_peak_memory_bytes"] = self.predicted_bytes
            values["peak_memory_of_predicted"] = peak / self.predicted_bytes
        part = "eval" if "eval_loss" in line else "train"
        placed = {
            f"{'memory' if 'memory' in name else part}/{name.removeprefix('eval_')}": values[name] for name in values
        }
        for name, begun in list(self.begun.items()):
            self._call(name, begun[0], placed, step)

    def __exit__(self, *_: object) -> None:
        for name, begun in list(self.begun.items()):
            self._call(name, begun[1])

    def _call(self, name: str, call: Callable[..., None], *given: Any) -> None:
        try:
            with _on_stderr():
                call(*given)
        except Exception as error:  # noqa: BLE001  trackers raise exceptions of their own libraries
            del self.begun[name]
            warn("RW630", f"{_failed(name, error)}; the run continues without it.")


def _on_stderr() -> contextlib.AbstractContextManager[Any]:
    """What trackers print, kept out of the document of --json."""
    return contextlib.redirect_stdout(sys.stderr)


def _failed(name: str, error: Exception) -> str:
    return f"the tracker {name} failed: {one_line(error)}"

"""A comparison as its folder holds it: ``comparison.json``, the metrics of the runs, and the models' answers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from rankwise.errors import RunError
from rankwise.foreign import Fields, parse_json, read_json
from rankwise.records import read_metrics
from rankwise.reports.numbers import is_number
from rankwise.reports.schema import COMPARISON_FILE, EVALUATION_FOLDER, SCHEMA
from rankwise.reports.words import unit_of


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The content of one or more comparison folders, and the place of each run's files."""

    document: Fields
    folder: Path
    # Run id -> the folder of the comparison that holds the run.
    places: Mapping[str, Path]

    def __getitem__(self, key: str) -> Any:
        return self.document[key]

    @property
    def metric(self) -> str:
        return str(self.document["primary_metric"])

    @property
    def objective(self) -> str:
        """The objective of the runs."""
        return str(self["settings"].get("objective") or "sft")

    @property
    def unit(self) -> str:
        """The unit of the primary metric."""
        return unit_of(self.document)

    @property
    def finals(self) -> list[Fields]:
        return [run for run in self["runs"] if run["phase"] == "final" and run["status"] == "finished"]

    def finals_of(self, method: str) -> list[Fields]:
        return [run for run in self.finals if run["method"] == method]

    def is_higher_better(self, metric: str) -> bool:
        """As the methods' records say; by default lower is better for a loss, and higher for other metrics."""
        for facts in self["methods"].values():
            if metric in facts["higher_is_better"]:
                return bool(facts["higher_is_better"][metric])
        return "loss" not in metric and "perplexity" not in metric

    def ranked(self) -> list[str]:
        """Methods with a result, the best first by the primary metric; then the others, in their order."""
        means = {name: facts["mean"].get(self.metric) for name, facts in self["methods"].items()}
        sign = -1 if self.is_higher_better(self.metric) else 1
        known = [name for name, mean in means.items() if is_number(mean)]
        return sorted(known, key=lambda name: sign * means[name]) + [name for name in means if name not in known]

    def with_result(self) -> list[str]:
        return [name for name in self.ranked() if is_number(self["methods"][name]["mean"].get(self.metric))]

    def metrics_of(self, run: Fields) -> list[Fields]:
        """The lines of the run's ``metrics.jsonl``; none when the folder no longer exists."""
        return [line for line in read_metrics(self.place_of(run)) if isinstance(line, Mapping)]

    def place_of(self, run: Fields) -> Path:
        return inside(self.places.get(run["id"], self.folder), str(run["folder"]))

    def answers_of(self, run: Fields, task: str) -> list[Fields]:
        return read_answers(self.place_of(run), task, run["tasks"].get(task, {}))

    def base_answers(self, task: str) -> list[Fields]:
        base = self["base"]
        if not base.get("folder"):
            return []
        return read_answers(inside(self.folder, str(base["folder"])), task, base.get("tasks", {}).get(task, {}))


def load_comparison(folder: Path) -> Comparison:
    """Read ``comparison.json`` of the folder.

    Raises RunError: RW592 no comparison here, RW593 it cannot be read.
    """
    path = folder / COMPARISON_FILE
    if not path.is_file():
        state = f"holds no {COMPARISON_FILE}" if folder.is_dir() else "is not a folder"
        raise RunError("RW592", f"{folder} {state}; give a folder that `rankwise compare` wrote (its --output).")
    try:
        document = read_object(path)
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, and this version reads {SCHEMA}")
        return Comparison(document, folder, {run["id"]: folder for run in document["runs"]})
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RunError("RW593", f"cannot read {path} as a comparison: {error!r}.") from None


def read_object(path: Path) -> Any:
    """The content of a JSON file. Raises ValueError for a file that is not JSON."""
    return read_json(path, constants=True)


@contextlib.contextmanager
def as_expected(comparison: Comparison) -> Iterator[None]:
    """Raises RunError (RW593) where a part of the comparison has a form that cannot be shown."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        place = comparison.folder
        raise RunError("RW593", f"{place}: a part of the comparison is not as expected ({error!r}).") from error


def inside(folder: Path, relative: str) -> Path:
    """``folder``/``relative``. The relative path comes from a file, so it must not leave the folder.

    Raises RunError (RW593) for an absolute path or one with ``..`` in it.
    """
    parts = PurePosixPath(relative).parts
    if ".." in parts or PurePosixPath(relative).is_absolute() or "\\" in relative or "\x00" in relative:
        raise RunError("RW593", f"{folder / COMPARISON_FILE} names the path {relative!r}, which leaves its folder.")
    return folder.joinpath(*parts)


def read_answers(place: Path, task: str, result: Fields) -> list[Fields]:
    """The examples of one evaluation, one object each; none when the file no longer exists."""
    name = str(result.get("examples") or "predictions.jsonl")
    path = inside(inside(place, f"{EVALUATION_FOLDER}/{task}"), name)
    return list(_objects(path)) if path.is_file() else []


def _objects(path: Path) -> Iterator[Fields]:
    """The JSON objects of a file with one per line. Stops at a line that was cut short by a kill."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                content = parse_json(line, constants=True, halves=True)
            except ValueError:
                return
            if isinstance(content, Mapping):
                yield content

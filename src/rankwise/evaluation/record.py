"""The records of an evaluation, to and from JSON. Imports no torch.

``DIR/TASK/result.json`` is one ``TaskResult``; ``predictions.jsonl`` beside it has one ``Example`` per line.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rankwise.errors import RunError
from rankwise.foreign import Fields, JsonObject, checked, parse_json, read_json, reason_of
from rankwise.records import write_json

RESULT_FILE = "result.json"
EXAMPLES_FILE = "predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Example:
    """One question, the model's prediction, and its scores."""

    # Unique within its task, and the same for every model.
    id: str
    prompt: str
    prediction: str
    # Empty where only the whole set has a score, as with BLEU.
    scores: Mapping[str, float] = dataclasses.field(default_factory=dict)
    references: Sequence[str] | None = None
    # Questions about one source text have the same cluster: their scores are not independent.
    cluster: str | None = None
    # What the task needs to score again, such as the log-likelihood of each choice.
    details: Fields = dataclasses.field(default_factory=dict)
    # Whether the limit of tokens ended the prediction.
    is_cut: bool = False

    def to_json(self) -> JsonObject:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {key: value for key, value in fields.items() if value or key not in ("details", "is_cut")}


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """One task on one model, or on one adapter over it."""

    task: str
    model: str
    adapter: str | None
    metrics: Mapping[str, float]
    # Name of the task's main metric.
    primary: str
    higher_is_better: Mapping[str, bool]
    # Clustered where questions share a source text; None where the metric has none.
    standard_errors: Mapping[str, float | None]
    # Number of questions that were scored.
    count: int
    settings: Fields
    data_sha256: str | None
    versions: Mapping[str, str]
    wall_seconds: float
    # File of the predictions, beside the record.
    examples: str = EXAMPLES_FILE
    # Number of clusters, where the standard errors are clustered.
    clusters: int | None = None
    # What a reader should know: metrics that could not be computed, answers that were empty.
    notes: Sequence[str] = ()

    def to_json(self) -> JsonObject:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def save(self, folder: Path) -> None:
        write_json(folder / RESULT_FILE, self.to_json())


def load_result(folder: Path) -> TaskResult:
    """The record in ``folder``. Raises RunError (RW574) when it is missing or cannot be read."""
    path = folder / RESULT_FILE
    try:
        return checked(TaskResult, read_json(path, constants=True))
    except FileNotFoundError:
        raise RunError("RW574", f"{folder} holds no {RESULT_FILE}; give a folder that evaluate has written.") from None
    except (OSError, ValueError) as error:
        raise RunError("RW574", f"cannot read {path} as the result of an evaluation: {reason_of(error)}.") from None


def read_examples(path: Path) -> Iterator[Example]:
    """The predictions in ``path``, in order; a last line cut short by a kill is left out.

    Raises RunError (RW571) for a broken line elsewhere.
    """
    if not path.exists():
        return
    lines = path.read_bytes().split(b"\n")
    # Text after the last newline is a line whose write was interrupted.
    for number, line in enumerate(lines[:-1], 1):
        try:
            yield checked(Example, parse_json(line, constants=True, halves=True))
        except ValueError as error:
            reason = str(error)[:120]
            raise RunError(
                "RW571",
                f"{path}, line {number}: not a prediction that evaluate wrote ({reason}); remove the file, or use "
                "--overwrite.",
            ) from None

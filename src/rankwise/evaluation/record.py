"""The records of an evaluation, to and from JSON. Imports no torch.

``DIR/TASK/result.json`` is one ``TaskResult``; ``predictions.jsonl`` beside it has one ``Example`` per line.

Predictions on disk during an evaluation. They are appended batch by batch, so that a kill loses at most one batch.

A folder belongs to one evaluation: ``settings.json`` holds everything that its answers depend on, except the batch
size, and a folder of another evaluation is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path

from rankwise.disk import appending, refuse_links
from rankwise.errors import RunError, one_line
from rankwise.foreign import Fields, Json, JsonObject, checked, parse_json, read_json
from rankwise.records import read_checked, read_lines, write_bytes, write_json

RESULT_FILE = "result.json"
EXAMPLES_FILE = "predictions.jsonl"
IDENTITY_FILE = "settings.json"
RESPONSES_FILE = "responses.jsonl"
REMEDY = "remove the file, or use --overwrite"


@dataclasses.dataclass(frozen=True, kw_only=True)
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One task on one model, or on one adapter over it."""

    task: str
    model: str
    adapter: str | None
    metrics: Mapping[str, float]
    # Name of the task's main metric.
    primary: str
    higher_is_better: Mapping[str, bool]
    # Clustered where questions share a source text; None if the metric has none.
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
    """The record in ``folder``. Raises RunError (RW571) when it is missing or cannot be read."""
    return read_checked(TaskResult, folder / RESULT_FILE, "RW571", "an evaluation")


def read_examples(path: Path) -> Iterator[Example]:
    """The predictions in ``path``, in order; a last line cut short by a kill is left out.

    Raises RunError (RW571) for a broken line elsewhere.
    """
    yield from read_lines(path, "RW571", REMEDY, lambda line: checked(Example, parse_json(line)))


def text_sha256(text: str, length: int = 12) -> str:
    """The first digits of a text's sha256, in names of questions and of their clusters."""
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def json_sha256(value: Json) -> str:
    """sha256 over sorted JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


@dataclasses.dataclass(frozen=True)
class Opened:
    """A folder that belongs to the evaluation which ``identity`` describes."""

    folder: Path
    identity: Fields


def open_folder(folder: Path, identity: Fields, *, overwrite: bool) -> Opened:
    """Prepare ``folder`` for the evaluation that ``identity`` describes: create it, or continue in it.

    Raises RunError: RW570 when the folder belongs to another evaluation, with what differs; RW571 when its settings
    cannot be read.
    """
    known = _identity_in(folder)
    if known is not None and known != json.loads(json.dumps(identity, default=str)) and not overwrite:
        keys = [key for key in {**known, **identity} if known.get(key) != identity.get(key)]
        different = "; ".join(f"{key} was {_short(known.get(key))}, now {_short(identity.get(key))}" for key in keys)
        raise RunError(
            "RW570",
            f"{folder} holds results of a different evaluation ({different}); use a new --output, or --overwrite.",
        )
    if overwrite:
        # The identity is overwritten below, not deleted: a folder without one would pass as any evaluation's.
        for name in (RESULT_FILE, EXAMPLES_FILE, RESPONSES_FILE):
            (folder / name).unlink(missing_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / IDENTITY_FILE, identity)
    return Opened(folder, identity)


def _identity_in(folder: Path) -> JsonObject | None:
    path = folder / IDENTITY_FILE
    try:
        found = read_json(path)
        if not isinstance(found, dict):
            raise ValueError(f"it holds a {type(found).__name__}")
        return found
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise RunError(
            "RW571", f"cannot read {path}: {one_line(error)}; remove the folder, or use --overwrite."
        ) from None


def _short(value: Json) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class Lines:
    """An append-only file of JSON lines. A last line that was cut short is removed when the file is opened."""

    def __init__(self, path: Path) -> None:
        refuse_links(path.parent, [path.name])
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.truncate(path, whole)

    def append(self, records: Iterable[Fields]) -> None:
        """Append all ``records`` in one write. They are on disk when this returns."""
        text = "".join(json.dumps(record, ensure_ascii=False, default=str) + "\n" for record in records)
        with appending(self.path) as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))


class Journal:
    """The predictions of one task, by id."""

    def __init__(self, folder: Path) -> None:
        self.lines = Lines(folder / EXAMPLES_FILE)
        self.done: dict[str, Example] = {example.id: example for example in read_examples(self.lines.path)}

    def append(self, examples: Iterable[Example]) -> None:
        """Keep the predictions of a batch. Known predictions are not changed."""
        new = [example for example in examples if example.id not in self.done]
        self.lines.append(example.to_json() for example in new)
        self.done.update((example.id, example) for example in new)


def rewrite(folder: Path, examples: Iterable[Example]) -> None:
    """Write the predictions of a finished task in the order of the data."""
    text = "".join(json.dumps(example.to_json(), ensure_ascii=False, default=str) + "\n" for example in examples)
    write_bytes(folder / EXAMPLES_FILE, text.encode("utf-8", errors="backslashreplace"))


class Responses:
    """Answers to requests of lm-evaluation-harness, by the sha256 of the request."""

    def __init__(self, folder: Path) -> None:
        self.lines = Lines(folder / RESPONSES_FILE)
        pairs = read_lines(
            self.lines.path, "RW571", REMEDY, lambda line: itemgetter("request", "response")(parse_json(line))
        )
        self.known: JsonObject = dict(pairs)

    def append(self, responses: Fields) -> None:
        self.lines.append({"request": key, "response": value} for key, value in responses.items())
        self.known.update(responses)

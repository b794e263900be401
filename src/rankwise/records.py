"""The records of a run, written to and read from JSON. Imports no torch.

``run.json`` is one ``RunRecord``; ``metrics.jsonl`` is one object per logged step and one per evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

# On Python 3.11, pydantic does not accept typing.TypedDict, and brings this one.
from typing_extensions import TypedDict

from rankwise.disk import whole_file
from rankwise.errors import RunError, one_line
from rankwise.foreign import Dataclass, Fields, JsonObject, checked, parse_json, read_json
from rankwise.objectives import ObjectiveName

T = TypeVar("T")
Checked = TypeVar("Checked", bound=Dataclass)

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
# One line for each bad row that was left out: {"set": "train" or "eval", "row", "code", "why"}.
SKIPPED_FILE = "skipped_rows.jsonl"


class RateTrial(TypedDict):
    """A short run at one learning rate."""

    learning_rate: float
    steps: int
    # Loss on rows that the short runs did not train on; None if the run diverged.
    loss: float | None


class RateSearch(TypedDict):
    """The trials of ``--learning-rate auto``, in order, and the rate that was chosen."""

    chosen: float
    # Number of training rows that no short run trained on.
    rows: int
    seconds: float
    trials: list[RateTrial]
    # As given.
    budget: float | None


@dataclasses.dataclass(kw_only=True)
class RunRecord:
    """One training run. Times are in seconds, memory in bytes; a figure that was not measured is None."""

    method: str
    seed: int
    # Every option of the run, as given or by default.
    settings: JsonObject
    # {option: value} of those that were resolved to another value: in ``settings``, or in ``products``.
    asked: JsonObject = dataclasses.field(default_factory=dict)
    # sft, dpo, kto or grpo.
    objective: ObjectiveName = "sft"
    train_loss: float | None = None
    # Evaluation loss before the first step.
    initial_eval_loss: float | None = None
    # Evaluation loss of the adapter that was kept.
    eval_loss: float | None = None
    # At the same evaluation, for an objective with rewards: reward_accuracy, reward_margin, ...
    eval_rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    # Of preferences: prompts that were answered after training, and how many answers differ from the reference's.
    answers: dict[str, int] | None = None
    # With --retain: source, sha256 and rows; losses of the base and of the weights kept, in nats per ``unit`` (token or
    # question), and their difference with its 95 % interval over rows; margin and verdict.
    retained: JsonObject | None = None
    # Non-padding tokens divided by the seconds of the training steps.
    tokens_per_second: float | None = None
    # Training examples divided by the seconds of the training steps, without loading and evaluation.
    examples_per_second: float | None = None
    # An idle process (idle_bytes) and the training.
    peak_memory_bytes: int | None = None
    # The part of peak_memory_bytes that is frozen weights in mapped files, which the system may drop and read again.
    mapped_bytes: int | None = None
    predicted_peak_memory_bytes: int | None = None
    # The part of both peaks that the process takes with its libraries alone; 0 on a GPU, whose meter does not see it.
    idle_bytes: int | None = None
    trainable_parameters: int | None = None
    total_parameters: int | None = None
    wall_seconds: float | None = None
    steps: int | None = None
    # Step of the checkpoint that became the final adapter, and why it was chosen.
    kept_step: int | None = None
    kept_because: str | None = None
    # name, revision or file, sha256 of its weights, dtype, quantization.
    base_model: JsonObject = dataclasses.field(default_factory=dict)
    # Per file: path, sha256, rows, tokens, trained tokens, truncated and dropped rows.
    data: dict[str, JsonObject] = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    device: JsonObject = dataclasses.field(default_factory=dict)
    # Number of processes that trained together, each on its own device. Speeds are totals over the processes; memory is
    # the largest of any process.
    devices: int = 1
    # How several processes shared the model: ddp or fsdp.
    strategy: str | None = None
    # LoRA+: the peak learning rate of each parameter group.
    learning_rates: dict[str, float] | None = None
    # With --learning-rate auto. ``settings`` hold the rate that was found; ``wall_seconds`` exclude the search.
    rate_search: RateSearch | None = None
    # What --products auto took, and by which measurement (training/products.py).
    products: Literal["bfloat16", "int8"] | None = None
    products_measured: JsonObject | None = None
    # The last step in 8 bits, where a run does not end in them.
    eight_bit_steps: int | None = None
    # The most bytes of frozen weights that one process holds between steps.
    frozen_bytes: int | None = None
    warnings: list[dict[str, str]] = dataclasses.field(default_factory=list)
    # Files of this run in addition to those that every run writes; --overwrite removes them by name.
    files: list[str] = dataclasses.field(default_factory=list)
    # running, finished, interrupted, failed, or (while --overwrite removes the run) replaced.
    status: str = "running"

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    def save(self, folder: Path) -> None:
        write_json(folder / RUN_FILE, self.to_json())


def load_record(folder: Path) -> RunRecord:
    """The record of a run folder. Raises RunError (RW501) as ``read_checked``."""
    return read_checked(RunRecord, folder / RUN_FILE, "RW501", "a rankwise run")


def read_checked(kind: type[Checked], path: Path, code: str, what: str) -> Checked:
    """A JSON file as an instance of ``kind``. Raises RunError (``code``) if it is missing or cannot be read."""
    try:
        return checked(kind, read_json(path))
    except FileNotFoundError:
        raise RunError(code, f"{path.parent} holds no {path.name}; give the folder of {what}.") from None
    except (OSError, ValueError) as error:
        raise RunError(code, f"cannot read {path} as the record of {what}: {one_line(error)}.") from None


def record_of(folder: Path | None) -> RunRecord | None:
    """The record in ``folder``; None if there is none, as in an adapter folder that another program wrote."""
    return load_record(folder) if folder is not None and (folder / RUN_FILE).is_file() else None


def read_metrics(folder: Path) -> Iterator[Fields]:
    """The lines of ``metrics.jsonl``. Raises RunError (RW501) for a damaged line."""
    yield from read_lines(folder / METRICS_FILE, "RW501", "remove that line")


def read_lines(path: Path, code: str, remedy: str, read: Callable[[bytes], T] = parse_json) -> Iterator[T]:
    """What ``read`` makes of each line of a file, if it exists, without a last line that a kill cut short.

    Raises RunError (``code``) for any other damaged line.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else []
    for number, line in enumerate(filter(None, lines[:-1]), 1):
        try:
            yield read(line)
        except (ValueError, LookupError, TypeError) as error:
            raise RunError(code, f"{path}, line {number}, is damaged ({one_line(error)}); {remedy}.") from None


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """{name: version} of Python and of those ``packages`` that are installed."""
    import platform
    from importlib import metadata

    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_skipped_rows(folder: Path, data: Mapping[str, Fields]) -> None:
    """Write ``SKIPPED_FILE`` from a record's ``data``, if rows were left out."""
    lines = [json.dumps({"set": name, **row}) for name, part in data.items() for row in part.get("skipped", ())]
    if lines:
        write_text(folder / SKIPPED_FILE, "\n".join(lines) + "\n")


def write_json(path: Path, content: Mapping[str, object] | Sequence[object]) -> None:
    """Write JSON with indent 2, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def kept_json(file: Path) -> Any:
    """What a process kept in a file of the cache; None where there is nothing that can be read."""
    try:
        return read_json(file)
    except (OSError, ValueError):
        return None


def keep_json(file: Path, content: Mapping[str, object]) -> bool:
    """Keep JSON in the cache for later processes. Returns False where it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_json(file, content)
    except OSError:
        return False
    return True


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text, whole or not at all. A lone surrogate, which UTF-8 cannot encode, becomes a JSON escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def check_writable(output: Path) -> None:
    """Raise RunError (RW503) if ``output`` is not a folder, or the nearest existing folder cannot be written."""
    nearest = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not nearest.is_dir():
        raise RunError("RW503", f"--output {output} is a file, or lies below one ({nearest}); give a folder.")
    # The mode is respected for root too, who could write all the same.
    if not nearest.stat().st_mode & 0o222 or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError("RW503", f"{nearest} cannot be written; give an --output that can.")

"""The records of a run, to and from JSON. Imports no torch.

``run.json`` is one ``RunRecord``; ``metrics.jsonl`` is one object per logged step and one per evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

# pydantic reads no TypedDict of Python 3.11's own.
from typing_extensions import TypedDict

from rankwise.disk import whole_file
from rankwise.errors import RunError
from rankwise.foreign import Fields, JsonObject, checked, parse_json, read_json, reason_of

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
# A line for each bad row that was left out: {"set": "train" or "eval", "row", "code", "why"}.
SKIPPED_FILE = "skipped_rows.jsonl"
# Variables of the environment by which a user says how long threads of OpenMP spin before they sleep.
WAIT_POLICIES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# What is reckoned with of a line of the metrics.
NUMBERS = ("loss", "eval_loss", "learning_rate", "train_seconds")


class RateTrial(TypedDict):
    """A short run at one rate."""

    learning_rate: float
    steps: int
    # On the rows that were kept from the short runs; None where it diverged.
    loss: float | None


class RateSearch(TypedDict):
    """What ``--learning-rate auto`` tried before the run, in order, and the rate that it took."""

    chosen: float
    # Training rows that no short run saw.
    rows: int
    seconds: float
    trials: list[RateTrial]


@dataclasses.dataclass
class RunRecord:
    """One training run. Times in seconds, memory in bytes; a figure that was not measured is None."""

    method: str
    seed: int
    # Every option of the run, as given or by default.
    settings: JsonObject
    # What it learned from: sft, dpo, kto or grpo.
    objective: str = "sft"
    train_loss: float | None = None
    # Evaluation loss before the first step.
    initial_eval_loss: float | None = None
    # Evaluation loss of the adapter that was kept.
    eval_loss: float | None = None
    # Of an objective with rewards, at the same evaluation: reward_accuracy, reward_margin, ...
    eval_rewards: dict[str, float | None] = dataclasses.field(default_factory=dict)
    # Tokens that are not padding, over the seconds of the training steps.
    tokens_per_second: float | None = None
    # Training examples over the seconds of the training steps; loading and evaluation are left out.
    examples_per_second: float | None = None
    peak_memory_bytes: int | None = None
    predicted_peak_memory_bytes: int | None = None
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
    data: JsonObject = dataclasses.field(default_factory=dict)
    versions: dict[str, str] = dataclasses.field(default_factory=dict)
    device: JsonObject = dataclasses.field(default_factory=dict)
    # Processes that trained together, each on a device of its own. Speeds are those of all together, memory that of the
    # process with the most.
    devices: int = 1
    # How several shared the model: ddp or fsdp.
    strategy: str | None = None
    # Of LoRA+: the peak rate of each group of parameters.
    learning_rates: dict[str, float] | None = None
    # With --learning-rate auto; ``settings`` hold the rate that was found, and ``wall_seconds`` leave the search out.
    rate_search: RateSearch | None = None
    # The most bytes of frozen weights that one process holds between steps.
    frozen_bytes: int | None = None
    warnings: list[dict[str, str]] = dataclasses.field(default_factory=list)
    # What the run wrote into its folder besides the files of every run: --overwrite removes these by name.
    files: list[str] = dataclasses.field(default_factory=list)
    # running, finished, interrupted or failed; replaced, while --overwrite removes the run.
    status: str = "running"

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)

    def save(self, folder: Path) -> None:
        write_json(folder / RUN_FILE, self.to_json())


def load_record(folder: Path) -> RunRecord:
    """The record of a run folder. Raises RunError (RW501) when it is missing or cannot be read."""
    path = folder / RUN_FILE
    try:
        return checked(RunRecord, read_json(path, constants=True))
    except FileNotFoundError:
        raise RunError("RW501", f"{folder} holds no {RUN_FILE}; give the folder of a rankwise run.") from None
    except (OSError, ValueError) as error:
        raise RunError("RW501", f"cannot read {path} as the record of a run: {reason_of(error)}.") from None


def record_of(folder: Path | None) -> RunRecord | None:
    """The record in ``folder``; None where there is none, as beside an adapter from elsewhere."""
    return load_record(folder) if folder is not None and (folder / RUN_FILE).is_file() else None


def read_metrics(folder: Path) -> Iterator[Fields]:
    """The lines of ``metrics.jsonl``; a last line cut short by a kill is left out.

    Raises RunError (RW501) for a damaged line elsewhere.
    """
    path = folder / METRICS_FILE
    if not path.is_file():
        return
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            if line:
                yield _logged(parse_json(line))
        except ValueError as error:
            if number == len(lines):
                return
            raise RunError(
                "RW501", f"{path}, line {number}, is not a line of a run ({reason_of(error)}); remove that line."
            ) from None


def _logged(line: Any) -> Fields:
    if not isinstance(line, dict):
        raise ValueError(f"it holds a {type(line).__name__}")
    if type(line.get("step", 0)) is not int:
        raise ValueError("its step is not a whole number")
    odd = next((key for key in NUMBERS if not isinstance(line.get(key), int | float | None)), None)
    if odd is not None:
        raise ValueError(f"its {odd} is not a number")
    return line


def versions_of(packages: Iterable[str]) -> dict[str, str]:
    """Versions of Python and of ``packages``; those not installed are left out."""
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
    """``SKIPPED_FILE`` from a record's ``data``, where rows were left out."""
    lines = [json.dumps({"set": name, **row}) for name, part in data.items() for row in part.get("skipped", ())]
    if lines:
        write_text(folder / SKIPPED_FILE, "\n".join(lines) + "\n")


def write_json(path: Path, content: Any) -> None:
    """JSON with indent 2, whole or not at all."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """UTF-8 text, whole or not at all. Half a surrogate pair, which UTF-8 has no bytes for, becomes JSON's escape."""
    write_bytes(path, text.encode("utf-8", errors="backslashreplace"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    with whole_file(path) as file:
        file.write(content)


def check_writable(output: Path) -> None:
    """Raise RunError (RW503) where ``output`` is not a folder, or neither it nor the folder above it can be written."""
    if output.exists() and not output.is_dir():
        raise RunError("RW503", f"--output {output} is a file; give a folder.")
    nearest = output
    while not nearest.exists():
        nearest = nearest.parent
    if not nearest.is_dir():
        raise RunError("RW503", f"--output {output} lies below {nearest}, which is a file; give a folder.")
    # The mode counts for root too, who could write all the same: whoever took the right away meant it.
    no_writers = not nearest.stat().st_mode & (stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH)
    if no_writers or not os.access(nearest, os.W_OK | os.X_OK):
        raise RunError("RW503", f"{nearest} cannot be written; give an --output that can.")

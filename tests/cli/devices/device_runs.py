"""Runs of several processes over gloo: their options, what they left behind, and how they are compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rankwise.records import read_metrics
from several import Nursery

# 29 rows in batches of 4, and 2 of them a step: an epoch, 4 steps, ends in a batch of one row.
ROWS, EVAL_ROWS, STEPS, BATCH = 29, 7, 6, 4
OPTIONS = (
    *("--dtype", "float32", "--device", "cpu", "--r", 4, "--max-length", 48, "--learning-rate", 1e-3),
    *("--gradient-accumulation", 2, "--max-steps", STEPS, "--eval-steps", 3, "--save-steps", 2, "--logging-steps", 1),
    *("--lr-scheduler-type", "constant", "--ignore-plan"),
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def differing(first: Path, second: Path) -> list[str]:
    """Names of the trained tensors that are not equal to the bit."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys() != set()
    return [name for name in one if not torch.equal(one[name], other[name])]


def lines(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


class Runs:
    """The runs that several tests look at: one process of batch 4, and two of batch 2."""

    def __init__(self, folder: Path, several: Nursery, given: list[str]) -> None:
        self.one, self.two = folder / "one", folder / "two"
        one = several.run(1, [*given, "--method", "qdora", "--batch-size", BATCH, "--output", self.one])
        assert one.codes == [0], one.stderr
        self.done = several.run(2, [*given, "--method", "qdora", "--batch-size", 2, "--output", self.two, "--json"])
        assert self.done.codes == [0, 0], self.done.stderr


def check_alike(one: Path, several: Path) -> None:
    """Losses, evaluations and weights of a run in several processes are those of one process."""
    expected, found = lines(one, "loss"), lines(several, "loss")
    assert len(found) == record(one)["steps"]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-4)
    assert lines(several, "entropy") == pytest.approx(lines(one, "entropy"), rel=1e-4)
    assert lines(several, "tokens") == lines(one, "tokens")
    assert lines(several, "eval_loss") == pytest.approx(lines(one, "eval_loss"), rel=1e-5)
    assert lines(several, "eval_loss")[0] == pytest.approx(lines(one, "eval_loss")[0], rel=1e-7)
    learnt = weights(several)
    for name, value in weights(one).items():
        torch.testing.assert_close(learnt[name], value, rtol=1e-3, atol=2e-5)


def check_failed(done: Any, *words: str) -> None:
    """All processes ended, and one of them said why."""
    assert 0 not in done.codes
    assert done.stderr.count("error RW") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


def check_saved(folder: Path, stderr: str) -> None:
    """The run was interrupted, and the step that it had come to is saved."""
    assert stderr.count("interrupted RW") == 1, stderr
    assert "interrupted RW540: stopped after step" in stderr
    done = record(folder)
    assert done["status"] == "interrupted"
    assert (folder / "checkpoints" / f"step-{done['steps']}").is_dir()

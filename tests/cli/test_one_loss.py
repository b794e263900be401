"""A run has one evaluation loss: in its record, on its curve, by `rankwise evaluate`, and in a comparison."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rankwise.comparison.steps import measure
from rankwise.records import load_record, read_metrics

CASES = [
    ("lora", "bfloat16", False),
    ("dora", "bfloat16", True),
    ("qdora", "float32", True),
    ("full", "bfloat16", True),
]


@pytest.fixture
def uneven_rows(tmp_path: Path) -> tuple[Path, Path]:
    """Rows of many lengths, some too long: batches, padding and cutting all matter."""
    draw = random.Random(0)
    files = []
    for name, count in (("train", 20), ("eval", 13)):
        rows = [
            {"prompt": f"{n} " * draw.randint(1, 6), "completion": f"{n % 7}, " * draw.randint(1, 20)}
            for n in range(count)
        ]
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    return files[0], files[1]


@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
@pytest.mark.parametrize(("method", "dtype", "fast"), CASES)
def test_a_run_has_one_loss(
    method: str,
    dtype: str,
    fast: bool,
    rankwise: Callable[..., Any],
    model_folder: Path,
    uneven_rows: tuple[Path, Path],
    tmp_path: Path,
):
    train, held_out = uneven_rows
    folder = tmp_path / "run"
    command = ["train", "--model", model_folder, "--data", train, "--eval-data", held_out, "--method", method]
    command += ["--output", folder, "--max-steps", 4, "--eval-steps", 2, "--batch-size", 3, "--max-length", 48]
    command += ["--learning-rate", 0.02, "--dtype", dtype, "--device", "cpu", *([] if fast else ["--no-fast"])]
    assert rankwise(*command).code == 0
    record = load_record(folder)
    curve = {line["step"]: line["eval_loss"] for line in read_metrics(folder) if "eval_loss" in line}
    assert record.eval_loss == curve[record.kept_step]

    assert _measured(folder, model_folder, held_out, method, dtype) == pytest.approx(record.eval_loss, rel=1e-12)
    if method != "full":
        call = ["evaluate", "--adapter", folder, "--task", "perplexity", "--data", held_out]
        done = rankwise(*call, "--output", tmp_path / "evaluation", "--json", "--device", "cpu")
        assert done.code == 0, done.stderr
        [result] = done.document["results"]
        # Without bfloat16 instructions, evaluate multiplies faster than --no-fast does, and rounds otherwise.
        assert result["metrics"]["loss"] == pytest.approx(record.eval_loss, rel=1e-12 if fast else 1e-8)


def _measured(folder: Path, model: Path, held_out: Path, method: str, dtype: str) -> float:
    job = {"folder": str(folder), "model": str(model), "cache": str(folder.parent / "cache"), "method": method}
    job |= {"dtype": dtype, "device": "cpu", "trust_remote_code": False, "revision": None, "eval_data": str(held_out)}
    job |= {"objective": "sft", "beta": None, "prompt_column": None, "completion_column": None, "max_length": 48}
    job |= dict.fromkeys(("chat_template", "task_limit", "retain")) | {"tasks": [], "task_data": []}
    measure(job)
    result = json.loads((folder / "evaluation" / "perplexity" / "result.json").read_text(encoding="utf-8"))
    return float(result["metrics"]["loss"])

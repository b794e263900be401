"""A model and rows for several processes, and two finished runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from device_runs import EVAL_ROWS, OPTIONS, ROWS, Runs

from several import Nursery
from tiny_models import save_with_tokenizer, tiny_llama


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A two-layer Llama whose 4-bit weights are read by rows, which are whole blocks. 259 rows are no multiple of 2."""
    made = tiny_llama(vocab_size=259, hidden_size=64, intermediate_size=128)
    return save_with_tokenizer(made, model_folder, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", ROWS), ("eval", EVAL_ROWS)):
        rows = [{"prompt": f"{name} {index}: ", "completion": "abcdefgh"[: 2 + index % 6]} for index in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def given(rows: Path, model: Path) -> list[str]:
    data = ("--data", rows / "train.jsonl", "--eval-data", rows / "eval.jsonl")
    return [str(item) for item in ("train", "--model", model, *data, *OPTIONS)]


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, several: Nursery, given: list[str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), several, given)

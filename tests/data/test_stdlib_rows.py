"""The demo data set: enough rows, the same each time, no leak from train to eval."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from rankwise.data import read_rows, stdlib_rows
from rankwise.errors import DataError


def test_there_are_thousands_of_distinct_rows() -> None:
    train, evaluation = stdlib_rows(), stdlib_rows(split="eval")
    assert len(train) > 1500
    assert 0.05 < len(evaluation) / len(train) < 0.2
    sentences = [row.completion for row in [*train, *evaluation]]
    assert len(set(sentences)) == len(sentences)
    assert all(row.kind == "prompt" for row in train)


def test_a_known_function_is_there() -> None:
    rows = [*stdlib_rows(), *stdlib_rows("eval")]
    [row] = [row for row in rows if " json.dumps(" in row.prompt]
    assert row.prompt.startswith(
        "Say in one sentence what this Python function does: json.dumps(obj, *, skipkeys=False"
    )
    assert row.completion == "Serialize ``obj`` to a JSON formatted ``str``."


def test_rows_are_the_same_in_another_process() -> None:
    code = "from rankwise.data import stdlib_rows; print(stdlib_rows().sha256)"
    path = os.pathsep.join(sys.path)
    environment = {**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == stdlib_rows().sha256


def test_read_rows_knows_it_by_name() -> None:
    assert read_rows("stdlib", split="eval").sha256 == stdlib_rows("eval").sha256
    with pytest.raises(DataError, match=r"RW208.*no split 'dev'"):
        read_rows("stdlib", split="dev")


def test_columns_that_it_does_not_have_are_refused() -> None:
    with pytest.raises(DataError, match="RW207: stdlib has no column `q`, `a`"):
        read_rows("stdlib", prompt_column="q", completion_column="a")
    assert len(read_rows("stdlib", prompt_column="prompt", completion_column="completion")) == len(read_rows("stdlib"))

"""A mistake that a look at the paths shows is said before torch is loaded, and leaves nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rankwise.records import RunRecord

SOURCE = Path(__file__).parents[2] / "src"
RUN = """
import sys
from rankwise.cli.main import main
code = main(sys.argv[1:])
print(code, "torch" in sys.modules)
"""


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    """A new interpreter, in which nothing has been imported yet."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    ("code", "arguments"),
    [
        ("RW201", ("train", "--model", "M", "--data", "gone.jsonl", "--output", "out")),
        ("RW201", ("train", "--model", "M", "--data", "D", "--eval-data", "gone.csv", "--output", "out")),
        ("RW301", ("train", "--model", "./gone", "--data", "D", "--output", "out")),
        ("RW302", ("train", "--model", "empty", "--data", "D", "--output", "out")),
        ("RW201", ("compare", "--model", "M", "--data", "gone.jsonl", "--output", "out")),
        ("RW301", ("compare", "--model", "./gone", "--data", "D", "--output", "out")),
        ("RW165", ("compare", "--model", "M", "--data", "D", "--methods", "loar", "--output", "out")),
        ("RW154", ("compare", "--model", "M", "--data", "D", "--task", "perplexty", "--output", "out")),
        ("RW301", ("generate", "--model", "./gone", "--prompt", "Hello")),
        ("RW122", ("generate", "--prompt", "Hello")),
        ("RW301", ("evaluate", "--model", "./gone", "--task", "perplexity", "--data", "D")),
        ("RW503", ("train", "--model", "M", "--data", "D", "--output", "below a file")),
        ("RW503", ("compare", "--model", "M", "--data", "D", "--output", "below a file")),
        ("RW503", ("evaluate", "--model", "M", "--task", "perplexity", "--data", "D", "--output", "below a file")),
        ("RW154", ("evaluate", "--model", "M", "--task", "perplexty", "--data", "D")),
        ("RW503", ("merge", "--adapter", "M", "--output", "below a file")),
        ("RW502", ("train", "--model", "M", "--data", "D", "--output", "a run")),
        ("RW504", ("train", "--model", "M", "--data", "D", "--output", "M")),
        ("RW505", ("train", "--model", "M", "--data", "D", "--output", "out", "--resume")),
        ("RW506", ("train", "--model", "M", "--data", "D", "--output", "a run", "--resume", "--overwrite")),
    ],
)
def test_a_path_with_nothing_there_costs_no_import(code, arguments, model_folder, rows_file, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    known = {"M": model_folder, "D": rows_file, "out": tmp_path / "out", "empty": empty}
    known |= {"below a file": rows_file / "out", "a run": tmp_path / "a run"}
    known["a run"].mkdir()
    RunRecord(method="lora", seed=0, settings={}).save(known["a run"])
    done = python("-c", RUN, *(known.get(part, part) for part in arguments))
    assert f"error {code}: " in done.stderr
    assert done.stdout.split()[-2:] == ["2", "False"]
    assert not (tmp_path / "out").exists()


def test_a_comparison_that_its_data_refuse_leaves_no_folder(rankwise, model_folder, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"q": "a", "a": "b"}) + "\n", encoding="utf-8")
    done = rankwise("compare", "--model", model_folder, "--data", rows, "--output", tmp_path / "out")
    assert (done.code, "RW207" in done.stderr) == (2, True)
    assert not (tmp_path / "out").exists()
    (tmp_path / "mine").mkdir()
    rankwise("compare", "--model", model_folder, "--data", rows, "--output", tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


def test_the_module_runs_as_the_program_does():
    done = python("-m", "rankwise", "--version")
    assert done.returncode == 0
    assert done.stdout.startswith("rankwise ")

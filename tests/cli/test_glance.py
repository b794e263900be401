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
CASES = [
    ("RW201", ("train", "--model", "M", "--data", "gone.jsonl", "--output", "out")),
    ("RW201", ("train", "--model", "M", "--data", "D", "--eval-data", "gone.csv", "--output", "out")),
    ("RW301", ("train", "--model", "./gone", "--data", "D", "--output", "out")),
    ("RW301", ("train", "--model", "qwen3", "--data", "D", "--output", "out")),
    ("RW302", ("train", "--model", "empty", "--data", "D", "--output", "out")),
    ("RW201", ("compare", "--model", "M", "--data", "gone.jsonl", "--output", "out")),
    ("RW301", ("compare", "--model", "./gone", "--data", "D", "--output", "out")),
    ("RW165", ("compare", "--model", "M", "--data", "D", "--methods", "loar", "--output", "out")),
    ("RW154", ("compare", "--model", "M", "--data", "D", "--task", "perplexty", "--output", "out")),
    ("RW301", ("generate", "--model", "./gone", "--prompt", "Hello")),
    ("RW121", ("generate", "--prompt", "Hello")),
    ("RW301", ("evaluate", "--model", "./gone", "--task", "perplexity", "--data", "D")),
    ("RW503", ("train", "--model", "M", "--data", "D", "--output", "below a file")),
    ("RW503", ("compare", "--model", "M", "--data", "D", "--output", "below a file")),
    ("RW503", ("evaluate", "--model", "M", "--task", "perplexity", "--data", "D", "--output", "below a file")),
    ("RW154", ("evaluate", "--model", "M", "--task", "perplexty", "--data", "D")),
    ("RW503", ("merge", "--adapter", "M", "--output", "below a file")),
    ("RW502", ("train", "--model", "M", "--data", "D", "--output", "a run")),
    ("RW504", ("train", "--model", "M", "--data", "D", "--output", "M")),
    ("RW505", ("train", "--model", "M", "--data", "D", "--output", "out", "--resume")),
    ("RW112", ("train", "--model", "M", "--data", "D", "--output", "a run", "--resume", "--overwrite")),
]
OTHER_BASE = ("--model", "GPT2", "--adapter", "RUN")
BEFORE_DATA = [
    ("RW312", ("train", "--model", "M", "--device", "mps")),
    ("RW401", ("train", "--model", "M", "--target-modules", "nope")),
    ("RW401", ("train", *OTHER_BASE)),
    ("RW312", ("compare", "--model", "M", "--device", "mps")),
    ("RW401", ("compare", "--model", "M", "--target-modules", "nope")),
    ("RW312", ("evaluate", "--model", "M", "--task", "perplexity", "--device", "mps")),
    ("RW401", ("evaluate", *OTHER_BASE, "--task", "perplexity")),
    ("RW401", ("generate", *OTHER_BASE, "--prompt", "Hello")),
    ("RW401", ("merge", *OTHER_BASE)),
    ("RW401", ("merge", *OTHER_BASE, "--verify")),
    ("RW401", ("export", *OTHER_BASE, "--for", "vllm")),
]
RUN = """
import contextlib, io, json, sys
from rankwise.cli.main import main
found = []
for words in json.load(sys.stdin):
    with contextlib.redirect_stderr(io.StringIO()) as said:
        code = main(words)
    found.append([code, "torch" in sys.modules, said.getvalue()])
print(json.dumps(found))
"""


def python(*arguments: object, given: str = "") -> subprocess.CompletedProcess[str]:
    """A new interpreter, in which nothing has been imported yet."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(SOURCE)},
        input=given,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("glance")


@pytest.fixture(scope="module")
def answers(folder, model_folder, rows_file):
    """[exit code, whether torch was loaded by then, messages] of each case, all in one new process."""
    known = {"M": model_folder, "D": rows_file, "empty": folder / "empty"}
    known |= {"below a file": rows_file / "out", "a run": folder / "a run"}
    known["empty"].mkdir()
    known["a run"].mkdir()
    RunRecord(method="lora", seed=0, settings={}).save(known["a run"])
    calls = [
        [str({**known, "out": folder / f"out-{number}"}.get(word, word)) for word in words]
        for number, (_, words) in enumerate(CASES)
    ]
    return json.loads(python("-c", RUN, given=json.dumps(calls)).stdout)


@pytest.mark.parametrize("number", range(len(CASES)))
def test_a_path_with_nothing_there_costs_no_import(number, answers, folder):
    code, has_torch, said = answers[number]
    assert f"error {CASES[number][0]}: " in said
    assert (code, has_torch) == (2, False)
    assert not (folder / f"out-{number}").exists()


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


@pytest.mark.parametrize(("code", "words"), BEFORE_DATA)
def test_what_the_model_s_config_decides_is_said_before_data_and_weights_are_read(
    rankwise, model_folder, gpt2_folder, run_folder, tmp_path, monkeypatch, code, words
):
    (tmp_path / "bad.jsonl").write_text("{")
    monkeypatch.setattr("rankwise.models.load.check_finite", lambda *_: pytest.fail("the weights were read"))
    places = {"M": model_folder, "GPT2": gpt2_folder, "RUN": run_folder}
    given = [places.get(word, word) for word in words]
    given += ["--data", tmp_path / "bad.jsonl"] if words[0] not in ("generate", "merge") else []
    given += ["--output", tmp_path / "out"] if words[0] != "generate" else []
    done = rankwise(*given)
    assert f"error {code}" in done.stderr
    assert not (tmp_path / "out").exists()

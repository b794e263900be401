"""``rankwise evaluate`` on the command line."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import guest_task
from rankwise.evaluation.record import TaskResult
from rankwise.evaluation.run import Evaluation
from rankwise.verbs.evaluate import print_task
from rankwise.verbs.output import Output
from several import Nursery

# Of an evaluation that is stopped, a batch each.
ROWS = 240


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_one_document_on_stdout(rankwise, model_folder: Path, rows_file: Path):
    done = rankwise("evaluate", "--model", model_folder, "--task", "perplexity", "--data", rows_file, "--json")
    assert done.code == 0, done.stderr
    [result] = done.document["results"]
    assert result["label"] == "base"
    assert result["count"] == 12
    assert result["metrics"]["perplexity"] > 1
    assert Path(done.document["output"], "perplexity", "result.json").is_file()
    assert "perplexity on base: 12/12" in done.stderr


def test_models_of_other_tokens_are_not_asked_as_one(rankwise, model_folder: Path, run_folder: Path, rows_file: Path):
    """Each alone; the base answers as if nobody had added tokens."""
    given = ("train", "--model", model_folder, "--data", rows_file, "--max-steps", 2, "--batch-size", 2, "--r", 2)
    assert rankwise(*given, "--new-tokens", "What,It", "--output", "first").code == 0
    assert rankwise(*given, "--new-tokens", "What,is", "--output", "second").code == 0
    task = ("evaluate", "--task", "perplexity", "--data", rows_file, "--max-length", 64)
    for others in (("--base",), ("--adapter", run_folder), ("--adapter", "second", "--no-base")):
        done = rankwise(*task, "--adapter", "first", *others)
        assert done.code != 0
        assert "error RW151" in done.stderr
    assert rankwise(*task, "--adapter", "first").code == 0
    ask = ("generate", "--prompt", "What is 3?", "--max-new-tokens", 8, "--dtype", "float32", "--json")
    [both] = rankwise(*ask, "--adapter", "first", "--compare").document["answers"]
    [base] = rankwise(*ask, "--model", model_folder).document["answers"]
    assert both["base"] == base["base"]


def test_a_run_beside_its_base(rankwise, run_folder: Path, rows_file: Path, tmp_path: Path):
    output = tmp_path / "out"
    call = [
        "evaluate",
        "--adapter",
        run_folder,
        "--base",
        "--task",
        "perplexity",
        "--data",
        rows_file,
        "--output",
        output,
    ]
    done = rankwise(*call)
    assert done.code == 0, done.stderr
    assert "first - base: loss" in done.stdout
    assert "perplexity: 12 rows\n" in done.stdout
    assert "questions" not in done.stdout
    assert "95 % [" in done.stdout
    [difference] = json.loads((output / "differences.json").read_text())
    losses = [
        json.loads((output / label / "perplexity" / "result.json").read_text())["metrics"]["loss"]
        for label in ("first", "base")
    ]
    assert difference["difference"] == pytest.approx(losses[0] - losses[1])
    assert json.loads((run_folder / "run.json").read_text())["eval_loss"] == pytest.approx(losses[0], rel=0.02)


def test_several_tasks_with_data_of_their_own(
    rankwise, model_folder: Path, rows_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    guest_task.install(monkeypatch)
    (tmp_path / "lines.txt").write_text("one\nthree\n")
    done = rankwise(
        "evaluate", "--model", model_folder, "--task", "perplexity,lengths", "--data", rows_file, "--set", "longest=4",
        "--data", "lengths=lines.txt", "--output", "out", "--json",
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert [(result["task"], result["count"]) for result in done.document["results"]] == [
        ("perplexity", 12),
        ("lengths", 2),
    ]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--task", "perplexity"], "RW121"),
        (["--model", "MODEL", "--task", "perplexity"], "RW150"),
        (["--model", "MODEL", "--task", "perplexity", "--data", "nowhere.csv"], "RW201"),
        (["--model", "MODEL"], "RW103"),
        (["--model", "MODEL", "--task", "perplexity", "--data", "ROWS", "--num-fewshot", "4"], "RW112"),
        (["--model", "MODEL", "--task", "perplexity", "--data", "ROWS", "--data", "ROWS"], "RW112"),
    ],
)
def test_mistakes_are_one_line_with_a_code(rankwise, model_folder: Path, rows_file: Path, arguments, code):
    known = {"MODEL": model_folder, "ROWS": rows_file}
    done = rankwise("evaluate", *[known.get(argument, argument) for argument in arguments])
    assert done.code == 2
    assert done.stderr.splitlines()[-1].startswith(f"error {code}: ")


def test_a_folder_of_another_evaluation_is_refused(rankwise, model_folder: Path, rows_file: Path):
    call = ["evaluate", "--model", model_folder, "--task", "perplexity", "--data", rows_file, "--output", "out"]
    assert rankwise(*call).code == 0
    done = rankwise(*call, "--limit", 2)
    assert done.code == 2
    assert "RW570" in done.stderr
    assert rankwise(*call, "--limit", 2, "--overwrite").code == 0


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As in the process that is stopped: more threads add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_stopped_evaluation_goes_on(
    model_folder: Path, tmp_path: Path, rankwise, several: Nursery, one_thread: None
) -> None:
    rows = [{"prompt": f"Number {n} ", "completion": "word " * (1 + n % 40)} for n in range(ROWS)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["evaluate", "--model", model_folder, "--task", "perplexity", "--data", tmp_path / "rows.jsonl"]
    command += ["--dtype", "float32", "--batch-size", 1, "--json", "--output"]
    assert rankwise(*command, tmp_path / "whole").code == 0
    whole = (tmp_path / "whole" / "perplexity" / "predictions.jsonl").read_bytes()
    for number in (signal.SIGINT, signal.SIGKILL):
        part = tmp_path / number.name
        _stop(several, [*command, part], part / "perplexity" / "predictions.jsonl", number)
        assert rankwise(*command, part).code == 0
        assert (part / "perplexity" / "predictions.jsonl").read_bytes() == whole


def _stop(several: Nursery, command: list[Any], predictions: Path, number: signal.Signals) -> None:
    """Start the evaluation and stop it in the middle of its rows."""
    # Where the tests run in a shell's background, SIGINT is ignored by all that they start.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    launch = several.start(1, command, heed)
    launch.wait_for(predictions.parent, predictions.name)
    # A batch counts once it is flushed to disk, which is sure when the next one is written.
    sizes: set[int] = set()
    deadline = time.monotonic() + 100
    while len(sizes - {0}) < 2 and time.monotonic() < deadline:
        sizes.add(predictions.stat().st_size)
        time.sleep(0.001)
    os.kill(launch.pids[0], number)
    done = launch.ended()
    assert done.codes == [{signal.SIGINT: 130, signal.SIGKILL: -signal.SIGKILL}[number]], done.stderr
    if number == signal.SIGINT:
        assert json.loads(done.stdout)["error"]["code"] == "RW572"
    assert 0 < predictions.read_bytes().count(b"\n") < ROWS


def test_a_metric_of_one_model_and_every_note_are_shown(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    def result(metrics: dict[str, float], *notes: str) -> TaskResult:
        same = {"standard_errors": {}, "count": 3, "settings": {}, "data_sha256": None, "versions": {}}
        up = dict.fromkeys(metrics, False)
        return TaskResult(
            task="t",
            model="m",
            adapter=None,
            metrics=metrics,
            primary="a",
            higher_is_better=up,
            wall_seconds=0.0,
            notes=notes,
            **same,
        )

    results = [("base", result({"a": 1.0})), ("tuned", result({"a": 2.0, "b": 3.0}, "2 of 3 answers hold no number"))]
    print_task(Output(), "t", Evaluation(tmp_path, results, []))
    printed = capsys.readouterr().out
    assert "b ↓" in printed
    assert "  tuned: 2 of 3 answers hold no number\n" in printed

"""`rankwise compare` with real runs on a tiny model."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from in_process import steps_in_this_process
from rankwise.cli.main import main
from rankwise.comparison.pool import Picture
from rankwise.comparison.stages import Job, Outcome
from rankwise.records import load_record
from rankwise.reports import summary
from rankwise.reports.comparison import Comparison
from rankwise.reports.words import headline, method_name
from rankwise.verbs.compare import Lines, table_of, verdict_lines
from rankwise.verbs.output import Output

pytestmark = pytest.mark.slow
OPTIONS = ["--methods", "lora,qdora", "--seeds", 1, "--learning-rates", 0.01, "--max-steps", 3, "--batch-size", 4]
OPTIONS += ["--r", 2, "--max-length", 64, "--logging-steps", 1, "--device", "cpu", "--dtype", "float32"]


@pytest.fixture(scope="module")
def command(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("comparison")
    rows = [{"prompt": f"What is {n}?", "completion": f"It is {n}."} for n in range(30)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["compare", "--model", model_folder, "--data", folder / "rows.jsonl", "--output", folder / "out", *OPTIONS]
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def folder(command: list[str]) -> Path:
    """A finished comparison: two methods, one seed, one rate."""
    with pytest.MonkeyPatch.context() as patch:
        steps_in_this_process(patch)
        assert main(command) == 0
    return Path(command[command.index("--output") + 1])


@pytest.fixture(scope="module")
def comparison(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_every_run_is_measured(comparison: dict[str, Any], folder: Path):
    assert [run["id"] for run in comparison["runs"]] == ["lora-lr0.01-seed0", "qdora-lr0.01-seed0"]
    for run in comparison["runs"]:
        tasks = run["tasks"]
        assert run["status"] == "finished"
        # Row by row, on the same rows, with the same loss as the trainer's own evaluation.
        assert tasks["perplexity"]["metrics"]["loss"] == pytest.approx(run["eval_loss"], rel=1e-4)
        assert tasks["perplexity"]["count"] == comparison["data"]["eval"]["rows"]
        lines = (folder / run["folder"] / "evaluation" / "perplexity" / "predictions.jsonl").read_text().splitlines()
        answers = [row for row in map(json.loads, lines) if row["prediction"]]
        # The random model rarely ends an answer by itself.
        assert any(row.get("is_cut") for row in answers)
        assert run["adapter_bytes"] == (folder / run["folder"] / "adapter_model.safetensors").stat().st_size
    assert comparison["base"]["tasks"]["perplexity"]["metrics"]["loss"] > 0


def test_one_seed_is_said_to_tell_nothing(comparison: dict[str, Any], folder: Path):
    assert [item["code"] for item in comparison["warnings"]] == ["RW585"]
    (difference,) = comparison["differences"]
    assert difference["verdict"] == "cannot tell"
    assert difference["interval"] is None
    assert comparison["methods"]["lora"]["interval"] == {"eval_loss": None}
    assert comparison["minimum_detectable_effect"]["relative"] is None
    assert not comparison["recommendation"]["decided"]
    assert "is too small to detect any difference" in headline(comparison)
    (line,) = verdict_lines(Comparison(comparison, folder))
    assert re.match(r"the runs cannot tell (LoRA from QDoRA|QDoRA from LoRA): difference", line)


def test_console_and_report_show_the_same_digits(comparison: dict[str, Any], folder: Path):
    """With one seed nothing says how many digits are known, and both still agree."""
    loaded = Comparison(comparison, folder)
    console = Console(width=80, file=io.StringIO())
    console.print(table_of(loaded))
    shown = console.file.getvalue()
    html = (folder / "report.html").read_text(encoding="utf-8")
    for name in loaded.ranked():
        line = next(line for line in shown.splitlines() if line.startswith(method_name(name)))
        for key in ("verdict", "eval_loss", "peak_memory_bytes", "wall_seconds"):
            text = summary.cell(loaded["methods"][name], key).text
            assert text in line
            assert text in html


def test_reports_and_the_best_adapter_are_there(folder: Path, comparison: dict[str, Any]):
    assert all((folder / name).is_file() for name in ("report.html", "report.json"))
    found = comparison["recommendation"]
    assert found["method"] in ("lora", "qdora")
    assert (folder / found["adapter"] / "adapter_model.safetensors").is_file()
    assert load_record(folder / found["adapter"]).method == found["method"]


def test_recommended_settings_train_unchanged_and_give_the_same_loss(
    folder: Path, comparison: dict[str, Any], rankwise: Callable[..., Any]
):
    """Two runs of one cell with the same seed have identical losses on a CPU."""
    done = rankwise("train", "--config", folder / "recommended.yaml", "--json")
    assert done.code == 0, done.stderr
    best = next(run for run in comparison["runs"] if run["id"] == comparison["recommendation"]["run"])
    assert done.document["eval_loss"] == best["eval_loss"]


def test_the_same_command_again_runs_nothing(command: list[str], folder: Path, rankwise: Callable[..., Any]):
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/run.json")}
    done = rankwise(*command, "--json")
    assert done.code == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/run.json")} == before
    assert done.document["recommendation"]["run"]


@pytest.mark.parametrize(
    ("code", "said"), [("RW597", "training was interrupted"), ("RW550", "training failed: RW550: full")]
)
def test_a_run_that_the_user_stopped_has_not_failed(code: str, said: str, capsys: pytest.CaptureFixture[str]):
    """Its own advice, --resume, is not what continues a comparison."""
    outcome = Outcome(status="failed", seconds=1.0, error={"code": code, "message": "full"})
    Lines(Output()).ended(Job("train", None), outcome, Picture(done=1, left=2, seconds_left=None))
    assert capsys.readouterr().out == f"base: {said}  [1 run done, 2 to come]\n"

"""`rankwise compare` on preferences: each run's rewards row by row, and verdicts on them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from in_process import steps_in_this_process
from rankwise.cli.main import main
from rankwise.comparison.results import value_of
from rankwise.comparison.settings import CompareSettings, check_compare
from rankwise.comparison.steps import measure
from rankwise.objectives import OBJECTIVES
from rankwise.options import read_settings
from rankwise.records import load_record

OPTIONS = ["--learning-rate", 0.02, "--max-steps", 3, "--batch-size", 4, "--r", 2, "--max-length", 64]
OPTIONS += ["--device", "cpu", "--dtype", "float32", "--logging-steps", 1]
REWARDS = ("reward_accuracy", "reward_margin")


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Any]]:
    """Two pairs a prompt."""
    return [{"prompt": f"What is {n // 2}?", "chosen": f"It is {n}.", "rejected": f"No idea, {n}"} for n in range(30)]


@pytest.fixture(scope="module")
def folder(model_folder: Path, pairs: list[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished comparison of two methods under two seeds."""
    place = tmp_path_factory.mktemp("preferences")
    command = ["compare", "--objective", "dpo", "--model", model_folder, "--data", write(place / "pairs.jsonl", pairs)]
    command += ["--methods", "lora,qdora", "--seeds", 2, "--output", place / "out", *OPTIONS]
    command[command.index("--learning-rate")] = "--learning-rates"
    with pytest.MonkeyPatch.context() as patch:
        steps_in_this_process(patch)
        assert main([str(word) for word in command]) == 0
    return place / "out"


def test_rewards_row_by_row_are_those_of_the_trainers_evaluation(folder: Path):
    comparison = json.loads((folder / "report.json").read_text())
    assert comparison["primary_metric"] == "preference.reward_accuracy"
    assert len(comparison["runs"]) == 4
    for run in comparison["runs"]:
        assert run["objective"] == "dpo"
        measured = run["tasks"]["preference"]["metrics"]
        for name in REWARDS:
            assert measured[name] == pytest.approx(run["eval_rewards"][name], abs=1e-5), name
        assert measured["reward_margin"] != 0
        assert value_of(run, "eval_loss") == run["eval_loss"]


def test_a_difference_of_rewards_is_paired_by_pair_and_clustered_by_prompt(folder: Path):
    comparison = json.loads((folder / "report.json").read_text())
    rows = [json.loads(line) for line in (folder / "data" / "eval.jsonl").read_text().splitlines()]
    prompts = {row["prompt"] for row in rows}
    assert len(rows) == 2 * len(prompts) == 4
    found = {item["metric"]: item for item in comparison["differences"]}
    for name in REWARDS:
        item = found[f"preference.{name}"]
        assert (item["paired_by_example"], item["pairs"], item["clusters"]) == (True, 4, 2)
        assert item["verdict"] in ("better", "worse", "equivalent", "cannot tell")
        assert item["margin"] > 0 or comparison["methods"]["lora"]["mean"][f"preference.{name}"] == 0
    assert not found["eval_loss"]["paired_by_example"]


def test_the_report_says_what_was_learned_and_by_which_metric(folder: Path):
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "Reward accuracy" in text
    assert "how much likelier than its base" in text
    assert "nats per token" not in text
    assert "objective: dpo" in (folder / "recommended.yaml").read_text()


@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
def test_margins_of_marked_answers_are_those_of_the_trainers_evaluation(
    rankwise: Callable[..., Any], model_folder: Path, pairs: list[dict[str, Any]], tmp_path: Path
):
    """Of batches in which good and bad answers are not as many."""
    rows = [
        {"prompt": pair["prompt"], "completion": pair["rejected" if n % 4 else "chosen"], "label": n % 4 == 0}
        for n, pair in enumerate(pairs[:11])
    ]
    data, run = write(tmp_path / "marked.jsonl", rows), tmp_path / "run"
    command = ["train", "--objective", "kto", "--model", model_folder, "--data", data, "--eval-data", data]
    assert rankwise(*command, "--output", run, *OPTIONS).code == 0
    job = {"folder": str(run), "model": str(model_folder), "cache": str(tmp_path / "cache"), "method": "lora"}
    job |= {"dtype": "float32", "device": "cpu", "trust_remote_code": False, "revision": None, "eval_data": str(data)}
    job |= {"objective": "kto", "beta": None, "prompt_column": None, "completion_column": None, "max_length": 64}
    job |= dict.fromkeys(("chat_template", "task_limit", "retain")) | {"tasks": [], "task_data": []}
    measure(job)
    place = run / "evaluation" / "preference"
    found = json.loads((place / "result.json").read_text())["metrics"]
    scores = [json.loads(line)["scores"] for line in (place / "predictions.jsonl").read_text().splitlines()]
    wanted = load_record(run).eval_rewards
    assert found["reward_margin"] == pytest.approx(wanted["reward_margin"], abs=1e-6)
    assert found["reward_margin"] == pytest.approx(sum(item["reward_margin"] for item in scores) / 11)
    assert found["reward_accuracy"] == sum(item["reward_accuracy"] for item in scores) / 11
    assert 0 < found["reward_accuracy"] <= 1


def test_what_decides_and_which_methods_there_are_follow_from_the_objective():
    def settings(**given: Any) -> CompareSettings:
        return read_settings(CompareSettings, None, {"model": "demo", "data": "x", "output": "y", **given})

    assert settings().metric == "eval_loss"
    assert "full" in settings().methods
    for objective in ("dpo", "kto"):
        found = settings(objective=objective)
        assert (found.metric, found.methods) == ("preference.reward_accuracy", ("lora", "qlora", "dora", "qdora"))
        check_compare(settings(objective=objective, metric="eval_loss"))
    assert OBJECTIVES["dpo"].beta == 0.1


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (["--objective", "grpo"], "RW626"),
        (["--objective", "dpo", "--methods", "lora,full"], "RW112"),
        (["--objective", "dpo", "--loss-type", "kto"], "RW763"),
        (["--objective", "dpo", "--packing"], "RW112"),
        (["--beta", 0.3], "RW112"),
        (["--metric", "preference.reward_margin"], "RW167"),
        (["--objective", "dpo", "--metric", "preference.loss"], "RW167"),
        (["--objective", "kto", "--eval-data", "GOOD"], "RW627"),
    ],
    ids=["grpo", "full", "loss type", "packing", "beta of sft", "metric of sft", "unknown metric", "good alone"],
)
def test_what_cannot_be_compared_is_refused_before_anything_runs(
    options: list[Any],
    code: str,
    rankwise: Callable[..., Any],
    model_folder: Path,
    pairs: list[dict[str, Any]],
    tmp_path: Path,
):
    good = write(tmp_path / "good.jsonl", [{"prompt": f"{n}", "completion": "x", "label": True} for n in range(4)])
    data = write(tmp_path / "pairs.jsonl", pairs)
    words = [good if word == "GOOD" else word for word in options]
    done = rankwise("compare", "--model", model_folder, "--data", data, "--output", tmp_path / "out", *words)
    assert done.code == 2
    assert code in done.stderr
    assert not (tmp_path / "out").exists()

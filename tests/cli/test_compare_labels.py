"""`rankwise compare` on texts with labels: each run's answers row by row, verdicts on them, and a report of both."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from in_process import steps_in_this_process
from rankwise.cli.main import main
from rankwise.comparison.settings import CompareSettings, check_compare
from rankwise.errors import ConfigError
from rankwise.labels import NUMBER, SEVERAL, SINGLE
from tiny_models import save_with_tokenizer, tiny_bert

OPTIONS = ["--learning-rates", 0.02, "--max-steps", 6, "--batch-size", 8, "--r", 2, "--max-length", 64, "--device"]
OPTIONS += ["cpu", "--dtype", "float32"]
# Two of three rows have the first label.
KINDS: dict[str, tuple[Any, ...]] = {
    SINGLE: ("no", "no", "yes"),
    SEVERAL: (["a"], ["a"], ["a", "b"]),
    NUMBER: (0.5, 0.5, 2),
}
BASES = {SINGLE: "decoder", SEVERAL: "decoder", NUMBER: "encoder"}
METHODS = {SINGLE: "lora,full", SEVERAL: "qdora,dora", NUMBER: "lora,full"}
PRIMARY = {SINGLE: "labels.accuracy", SEVERAL: "labels.accuracy", NUMBER: "labels.pearson"}


def write(path: Path, kind: str) -> Path:
    rows = [{"text": f"{'ab'[n % 3 == 2] * 4} {n}", "label": KINDS[kind][n % 3]} for n in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module", params=[SINGLE, NUMBER, pytest.param(SEVERAL, marks=pytest.mark.long)])
def compared(
    request: pytest.FixtureRequest, model_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The kind of label, and a finished comparison of two methods under two seeds."""
    kind, place = request.param, tmp_path_factory.mktemp("labels")
    base = model_folder
    if BASES[kind] == "encoder":
        base = save_with_tokenizer(tiny_bert(vocab_size=259), model_folder, place / "bert")
    command = ["compare", "--objective", "classify", "--model", base, "--data", write(place / "rows.jsonl", kind)]
    command += ["--methods", METHODS[kind], "--seeds", 2, "--output", place / "out", *OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        steps_in_this_process(patch)
        assert main([str(word) for word in command]) == 0
    return kind, place / "out"


def test_answers_row_by_row_are_those_of_the_run_and_decide(compared: tuple[str, Path]) -> None:
    kind, folder = compared
    comparison = json.loads((folder / "report.json").read_text())
    assert comparison["primary_metric"] == PRIMARY[kind]
    assert [run["error"] for run in comparison["runs"]] == [None] * 4
    for run in comparison["runs"]:
        measured, recorded = run["tasks"]["labels"]["metrics"], run["eval_rewards"]
        assert measured["loss"] == pytest.approx(run["eval_loss"], rel=1e-4)
        for name in measured.keys() - {"loss"}:
            assert measured[name] == pytest.approx(recorded[name], abs=1e-5), name
    by_row = {item["metric"]: item["paired_by_example"] for item in comparison["differences"]}
    assert by_row["eval_loss"]
    assert by_row.get("labels.accuracy", True)


def test_the_report_shows_right_and_wrong_beside_a_constant(compared: tuple[str, Path]) -> None:
    kind, folder = compared
    base = json.loads((folder / "report.json").read_text())["base"]["tasks"]["labels"]["metrics"]
    rows = [json.loads(line) for line in (folder / "data" / "eval.jsonl").read_text().splitlines()]
    if kind != NUMBER:
        assert base["accuracy"] == max(sum(row["label"] == label for row in rows) / len(rows) for label in KINDS[kind])
    text = (folder / "report.html").read_text(encoding="utf-8")
    assert "the best constant answer" in text
    assert "the base model" not in text.replace("server of the base model", "")
    assert kind == NUMBER or "right where the constant is wrong" in text


def test_what_a_comparison_of_labels_refuses(tmp_path: Path) -> None:
    given = {"objective": "classify", "model": "m", "data": "d", "output": tmp_path / "out"}
    for more in ({"task": ("boolq",)}, {"metric": "preference.reward_margin"}, {"budget": 0.5}):
        with pytest.raises(ConfigError) as error:
            check_compare(CompareSettings.model_validate({**given, **more}))
        assert error.value.code == "RW167"

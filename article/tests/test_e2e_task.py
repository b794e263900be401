"""E2E through `evaluate` and `compare`: the task is found by its entry point."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import DataError
from rankwise.evaluation import run
from rankwise.evaluation.record import TaskResult, read_examples
from rankwise.evaluation.settings import EvaluateSettings
from small_engines import save_byte_model

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
E2E = "mr,ref\n" + "".join(
    f'"name[{name}], food[{food}]","{name} serves {food} food{end}"\n'
    for name in ("Aromi", "Zizzi", "The Mill")
    for food in ("French", "Thai")
    for end in (".", ", as they say.")
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_byte_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def _without_java(monkeypatch: pytest.MonkeyPatch) -> None:
    """Starting it takes seconds; `test_e2e_scores` computes its metrics."""
    for module in ("e2e", "e2e_scores"):
        monkeypatch.setattr(f"rankwise_article.{module}.missing_java", lambda: "no Java")


def settings(model: Path, data: Path, output: Path, **more: Any) -> EvaluateSettings:
    given = {"model": str(model), "task": "e2e", "data": str(data), "output": output, "dtype": "float32", **more}
    return EvaluateSettings.model_validate(given)


class SilentObserver:
    def phase(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int) -> None: ...

    def result(self, label: str, result: TaskResult) -> None: ...


def evaluate(given: EvaluateSettings) -> list[TaskResult]:
    return [result for _, result in run.evaluate(given, SilentObserver()).results]


def test_e2e_asks_each_meaning_representation_once(model: Path, tmp_path: Path):
    (tmp_path / "test.csv").write_text(E2E)
    [result] = evaluate(settings(model, tmp_path / "test.csv", tmp_path / "out", set=["max_new_tokens=8"]))
    assert result.count == 6
    assert {"BLEU", "NIST"} <= set(result.metrics)
    examples = list(read_examples(tmp_path / "out" / "e2e" / "predictions.jsonl"))
    assert examples[0].prompt == "name[Aromi], food[French]"
    assert examples[0].references == ["Aromi serves French food.", "Aromi serves French food, as they say."]


def test_metrics_that_lacked_java_are_computed_once_it_is_there(model: Path, tmp_path: Path, monkeypatch):
    (tmp_path / "test.csv").write_text(E2E)
    given = settings(model, tmp_path / "test.csv", tmp_path / "out", set=["max_new_tokens=2"])
    asked, answer_task = [], run.answer_task
    monkeypatch.setattr(run, "answer_task", lambda *place, **more: asked.append(place) or answer_task(*place, **more))
    for is_missing, calls in (("no Java", 1), ("no Java", 1), (None, 2)):
        monkeypatch.setattr("rankwise_article.e2e.missing_java", lambda missing=is_missing: missing)
        evaluate(given)
        assert len(asked) == calls


@pytest.mark.parametrize("beams", [1, pytest.param(2, marks=pytest.mark.long)])
def test_results_depend_neither_on_batches_nor_on_order(model: Path, tmp_path: Path, beams: int):
    lines = E2E.splitlines(keepends=True)
    (tmp_path / "a.csv").write_text(E2E)
    (tmp_path / "b.csv").write_text("".join([lines[0], *lines[:0:-1]]))
    written = []
    for number, (name, size) in enumerate([("a", None), ("a", 1), ("b", None)]):
        given = settings(
            model,
            tmp_path / f"{name}.csv",
            tmp_path / str(number),
            batch_size=size,
            set=["max_new_tokens=6", f"num_beams={beams}"],
        )
        evaluate(given)
        written.append(
            {e.prompt: e.prediction for e in read_examples(tmp_path / str(number) / "e2e" / "predictions.jsonl")}
        )
    assert written[0] == written[1] == written[2]


def test_e2e_takes_prompt_rows_only(model: Path, tmp_path: Path):
    (tmp_path / "text.txt").write_text("just text\n")
    with pytest.raises(DataError, match="RA250.*`mr` and `ref`"):
        evaluate(settings(model, tmp_path / "text.txt", tmp_path / "out"))

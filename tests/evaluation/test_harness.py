"""The engine behind lm-evaluation-harness says what the harness' own HFLM says, request by request."""

from __future__ import annotations

import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from rankwise.errors import ConfigError, DataError, RankwiseWarning
from rankwise.evaluation.record import RESPONSES_FILE, Responses
from small_engines import arc_docs, byte_engine, nobody, write_lines

pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")

from rankwise.compat import lm_eval as compat
from rankwise.evaluation.tasks.harness import HarnessTask, read_docs


def arc_task(data: Path, **options: Any) -> HarnessTask:
    given = {"data": str(data), "fewshot_data": None, "num_fewshot": None, "limit": None, **options}
    return HarnessTask("arc_easy", **given)


def by_hflm(engine: Any, task: HarnessTask) -> Any:
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    model = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=3)
    return evaluate(lm=model, task_dict={"tasks": task.tasks, "groups": {}}, bootstrap_iters=0)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "arc.jsonl", arc_docs(12))


def test_multiple_choice_equals_hflm_question_by_question(data: Path, tmp_path: Path):
    engine, task = byte_engine(), arc_task(data)
    examples = task.run(engine, tmp_path, nobody)
    summary = task.summarize(examples)
    theirs = by_hflm(engine, task)
    for example, sample in zip(examples, theirs["samples"]["arc_easy"]):
        pairs = zip(example.details["log_likelihoods"], sample["resps"])
        assert all(abs(ours - response[0][0]) < 1e-4 for ours, response in pairs)
        assert example.scores == {"acc": sample["acc"], "acc_norm": sample["acc_norm"]}
        assert example.prompt == sample["arguments"][0][0]
    assert summary.metrics["acc"] == theirs["results"]["arc_easy"]["acc,none"]
    assert summary.metrics["acc_norm"] == theirs["results"]["arc_easy"]["acc_norm,none"]
    assert summary.standard_errors["acc"] > 0


def test_few_shot_equals_hflm_too(data: Path, tmp_path: Path):
    shots = write_lines(tmp_path / "train.jsonl", arc_docs(5, seed=1))
    engine, task = byte_engine(), arc_task(data, num_fewshot=2, fewshot_data=str(shots))
    examples = task.run(engine, tmp_path, nobody)
    assert examples[0].prompt.count("Question:") == 3
    for name in task.tasks:
        task.tasks[name].set_fewshot_seed(seed=1234)
    for example, sample in zip(examples, by_hflm(engine, task)["samples"]["arc_easy"]):
        assert example.prompt == sample["arguments"][0][0]
        pairs = zip(example.details["log_likelihoods"], sample["resps"])
        assert all(abs(ours - response[0][0]) < 1e-4 for ours, response in pairs)


@pytest.mark.parametrize(
    "texts", [["a short text", "another"], ["the quick brown fox " * 60, "x"]], ids=["short", "longer than the model"]
)
def test_rolling_and_written_answers_equal_hflm(tmp_path: Path, texts: list[str]):
    from lm_eval.models.huggingface import HFLM

    from rankwise.evaluation.harness_model import EngineLM

    engine = byte_engine()
    ours = EngineLM(engine, Responses(tmp_path), nobody)
    theirs = HFLM(pretrained=engine.model, tokenizer=engine.tokenizer, batch_size=2)
    rolling = [SimpleNamespace(args=(text,)) for text in texts]
    for a, b in zip(ours.loglikelihood_rolling(rolling), theirs.loglikelihood_rolling(rolling, disable_tqdm=True)):
        assert a == pytest.approx(b, rel=1e-5)
    asked = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}
    written = [SimpleNamespace(args=(text, asked)) for text in texts]
    assert ours.generate_until(written) == theirs.generate_until(written, disable_tqdm=True)
    assert ours.generate_until(written) == [ours.generate_until([one])[0] for one in written]


def test_an_interrupted_task_goes_on_where_it_stopped(data: Path, tmp_path: Path):
    engine = byte_engine(batch_size=1)
    whole, part = tmp_path / "whole", tmp_path / "part"
    for folder in (whole, part):
        folder.mkdir()
    expected = arc_task(data).run(engine, whole, nobody)

    def stop(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        arc_task(data).run(engine, part, stop)
    half = len((part / RESPONSES_FILE).read_bytes())
    assert 0 < half < len((whole / RESPONSES_FILE).read_bytes())
    assert arc_task(data).run(engine, part, nobody) == expected
    assert (part / RESPONSES_FILE).read_bytes() == (whole / RESPONSES_FILE).read_bytes()


def test_neither_batches_nor_order_change_a_result(data: Path, tmp_path: Path):
    docs = arc_docs(12)
    turned = write_lines(tmp_path / "turned.jsonl", docs[::-1])
    found = []
    for number, (path, options) in enumerate([(data, {}), (data, {"batch_size": 1}), (turned, {})]):
        folder = tmp_path / str(number)
        folder.mkdir()
        task = arc_task(path)
        found.append(task.summarize(task.run(byte_engine(**options), folder, nobody)))
    assert found[0].metrics == found[1].metrics == found[2].metrics


def test_the_sets_of_the_paper_are_built_from_local_rows(tmp_path: Path):
    rows = {
        "boolq": {"passage": "A b.", "question": "is it", "label": 1},
        "piqa": {"goal": "Go", "sol1": "walk", "sol2": "run", "label": 0},
        "siqa": {
            "context": "Cam left.",
            "question": "Why?",
            "answerA": "a",
            "answerB": "b",
            "answerC": "c",
            "label": "2",
        },
        "hellaswag": {"ctx_a": "A man", "ctx_b": "he", "activity_label": "Sport", "endings": ["a", "b"], "label": "1"},
        "winogrande": {"sentence": "Ann met _ there.", "option1": "Bob", "option2": "Cy", "answer": "1"},
        "openbookqa": {
            "question_stem": "Ice is",
            "choices": {"text": ["hot", "cold"], "label": ["A", "B"]},
            "answerKey": "B",
        },
    }
    for name, row in rows.items():
        data = write_lines(tmp_path / f"{name}.jsonl", [row, row])
        task = HarnessTask(name, data=str(data), fewshot_data=None, num_fewshot=None, limit=None)
        (tmp_path / name).mkdir()
        examples = task.run(byte_engine(), tmp_path / name, nobody)
        summary = task.summarize(examples)
        assert set(summary.metrics) == ({"acc"} if name == "winogrande" else {"acc", "acc_norm"})
        if name in ("boolq", "siqa", "piqa"):
            assert len({example.cluster for example in examples} - {None}) == 1


def test_other_worked_examples_are_another_evaluation(data: Path, tmp_path: Path):
    files = [write_lines(tmp_path / f"train{seed}.jsonl", arc_docs(3, seed=seed)) for seed in (1, 2)]
    described = [arc_task(data, num_fewshot=2, fewshot_data=str(file)).describe() for file in files]
    assert described[0] != described[1]
    assert described[0] == arc_task(data, num_fewshot=2, fewshot_data=str(files[0])).describe()


def test_worked_examples_that_would_not_be_shown_are_refused(data: Path):
    with pytest.raises(ConfigError, match="RW112.*needs --data"):
        HarnessTask("arc_easy", data=None, fewshot_data=str(data), num_fewshot=2, limit=None)
    with pytest.raises(ConfigError, match="RW112.*--num-fewshot N"):
        arc_task(data, fewshot_data=str(data))


def test_a_task_that_never_shows_examples_is_asked_for_none(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "own_shots", lambda task: 0)
    with pytest.raises(ConfigError, match="RW112.*--num-fewshot 2 has no effect on arc_easy"):
        arc_task(data, num_fewshot=2, fewshot_data=str(data))
    assert arc_task(data).describe()["num_fewshot"] == {"arc_easy": 0}


def test_worked_examples_are_never_the_questions_themselves(data: Path, monkeypatch: pytest.MonkeyPatch):
    """The harness takes them from the questions where the task has no other split."""
    monkeypatch.setattr(compat, "own_shots", lambda task: 5)
    with pytest.raises(ConfigError, match="RW112.*shows 5 worked examples; give --fewshot-data"):
        arc_task(data)
    assert arc_task(data, num_fewshot=0).describe()["num_fewshot"] == {"arc_easy": 0}


def test_a_name_for_several_tasks_has_a_figure_or_is_refused(data: Path, monkeypatch: pytest.MonkeyPatch):
    built = compat.built

    def twice(*given: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        [task] = built(*given)[0].values()
        return {"first": task, "second": task}, {}

    monkeypatch.setattr(compat, "built", twice)
    with pytest.raises(ConfigError, match="RW154.*is a group of 2 tasks.*: first, second"):
        arc_task(data)
    monkeypatch.setattr(compat, "built", lambda *given: ({}, {}))
    with pytest.raises(ConfigError, match="RW112.*several tasks, and --data holds those of one"):
        arc_task(data)


def test_data_that_a_task_would_not_read_are_refused(data: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compat, "reads_json", lambda task: task.DATASET_PATH != "json")
    with pytest.raises(ConfigError, match="RW112.*by code of its own; leave --data out"):
        arc_task(data)


def test_answers_longer_than_the_model_leave_room_for_the_prompt(tmp_path: Path):
    from rankwise.evaluation.harness_model import EngineLM

    engine = byte_engine()
    engine.model.config.max_position_embeddings = 48
    asked = SimpleNamespace(args=("How much is it?", {"until": [], "max_gen_toks": 48, "do_sample": False}))
    with pytest.warns(RankwiseWarning, match="RW256.*end at 33 tokens instead of 48"):
        [answer] = EngineLM(engine, Responses(tmp_path), nobody).generate_until([asked])
    whole = SimpleNamespace(args=(asked.args[0], {**asked.args[1], "max_gen_toks": 33}))
    assert answer == EngineLM(engine, Responses(tmp_path), nobody).generate_until([whole])[0]


def test_unknown_names_and_missing_examples_are_told(data: Path):
    with pytest.raises(ConfigError, match=r"RW154.*hellaswag"):
        HarnessTask("helaswag", data=None, fewshot_data=None, num_fewshot=None, limit=None)
    with pytest.raises(ConfigError, match="RW112.*--fewshot-data"):
        arc_task(data, num_fewshot=3)
    with pytest.raises(DataError, match="RW251.*answerKey"):
        arc_task(write_lines(data.parent / "bad.jsonl", [{"question": "x", "choices": {}}]))


def test_rows_that_are_not_the_sets_are_named(tmp_path: Path):
    path = write_lines(tmp_path / "test.jsonl", [{"question": "x"}])
    with pytest.raises(DataError, match="RW251.*missing"):
        read_docs("siqa", str(path))
    path = tmp_path / "test.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"when": [datetime.date(2024, 1, 1)]}), path)
    with pytest.raises(DataError, match="RW251.*row 1: Object of type date is not JSON"):
        read_docs("siqa", str(path))

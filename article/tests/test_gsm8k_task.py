"""GSM8K: which examples come first, and what is asked."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.errors import DataError
from rankwise_article.gsm8k import Gsm8k, Worked, read_problems, worked_examples
from small_engines import byte_engine, nobody, write_lines

PROBLEMS = [{"question": f"How much is {n} + {n}?", "answer": f"{n} + {n} = {2 * n}.\n#### {2 * n}"} for n in range(6)]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "test.jsonl", PROBLEMS)


def make(data: Path, worked: Worked, limit: int | None = None) -> Gsm8k:
    return Gsm8k(read_problems(str(data)), worked=worked, limit=limit, decoding={"max_new_tokens": 4})


def test_worked_examples_are_never_the_problems_that_are_asked(data: Path, tmp_path: Path):
    others = [{"question": f"And {n} - 1?", "answer": f"#### {n - 1}"} for n in range(3)]
    train = write_lines(tmp_path / "train.jsonl", [PROBLEMS[0], others[0], PROBLEMS[3], *others[1:]])
    worked = worked_examples(3, str(train), read_problems(str(data)))
    assert [question for question, _ in worked.pairs] == [row["question"] for row in others]
    prompt = worked.prompt("And now?")
    assert prompt.startswith("Question: And 0 - 1?\nAnswer: #### -1\n\nQuestion: And 1 - 1?")
    assert prompt.endswith("\n\nQuestion: And now?\nAnswer:")
    with pytest.raises(DataError, match="RA252.*3 problems besides"):
        worked_examples(4, str(train), read_problems(str(data)))


def test_the_examples_of_wei_et_al_come_from_the_harness(data: Path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    worked = worked_examples(8, None, read_problems(str(data)))
    assert len(worked.pairs) == 8
    assert all("The answer is" in answer for _, answer in worked.pairs)
    assert worked.prompt("And now?").endswith("\n\nQ: And now?\nA:")
    with pytest.raises(DataError, match="RA252.*--fewshot-data"):
        worked_examples(9, None, read_problems(str(data)))


def test_prompts_are_those_of_the_harness_own_task(data: Path):
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra eval)")
    from rankwise.evaluation.tasks.harness import HarnessTask

    asked = HarnessTask("gsm8k_cot", data=str(data), fewshot_data=None, num_fewshot=None, limit=None)
    [task] = asked.tasks.values()
    task.build_all_requests()
    problems = read_problems(str(data))
    worked = worked_examples(8, None, problems)
    assert [instance.args[0] for instance in task.instances] == [worked.prompt(row.prompt) for row in problems]


def test_answers_are_scored_and_the_beginning_is_shared(data: Path, tmp_path: Path):
    worked = Worked([("How much is 90 + 1?", "#### 91")] * 3, "ab")
    task = make(data, worked)
    examples = task.run(byte_engine(), tmp_path, nobody)
    assert [example.prompt for example in examples] == [row["question"] for row in PROBLEMS]
    summary = task.summarize(examples)
    assert summary.metrics["accuracy"] == sum(e.scores["accuracy"] for e in examples) / 6
    (tmp_path / "alone").mkdir()
    alone = make(data, worked).run(byte_engine(batch_size=1), tmp_path / "alone", nobody)
    assert [e.prediction for e in alone] == [e.prediction for e in examples]


def test_without_examples_the_problem_is_asked_as_in_training(data: Path, tmp_path: Path):
    examples = make(data, Worked(), limit=2).run(byte_engine(), tmp_path, nobody)
    assert len(examples) == 2


def test_other_rows_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="RA250.*`question` and `answer`"):
        read_problems(str(write_lines(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])))


def test_answers_without_a_number_are_refused_before_the_model_is_loaded(data: Path):
    write_lines(data, [*PROBLEMS, {"question": "How much?", "answer": "Nobody knows."}])
    with pytest.raises(DataError, match="RA244.*Nobody knows."):
        make(data, Worked())
    assert len(make(data, Worked(), limit=6).rows) == 6

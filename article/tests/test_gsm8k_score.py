"""Answer extraction by table and against the labels of published solutions; joining of the two files."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path

import pytest

from rankwise.errors import DataError, RankwiseWarning
from rankwise.final_number import extract_answer
from rankwise_article.scores import is_correct, score_gsm8k

ANSWERS = {
    "She makes 9 * 2 = $18 a day.\nA: 18": 18,
    "so it is 16 - 3 = 13": 13,
    "#### 1,234": 1234,
    "#### -5": -5,
    "#### $18.50 per day": Fraction("18.5"),
    "48/2 = <<48/2=24>>24 clips": 24,
    "#### 18\n\nQuestion: and 2 + 3?\n#### 5": 18,
    "The answer is 5 + 3 = 8.": 8,
    "The answer is: $1,000.": 1000,
    "**Answer:** 42 eggs": 42,
    "\\boxed{7} of them": 7,
    "= 18.": 18,
    "He loses -$3": -3,
    "He has $-3": -3,
    "(−4)": -4,
    "It fell from 20-30": 30,
    "answer: 16 - 3": 16,
    "line\n- 3 apples": 3,
    "18.00 dollars": 18,
    "half, .5": Fraction("0.5"),
    "A: 3/4 cup": Fraction(3, 4),
    "A: Leah had 32 and her sister 42. They have 39 left. The answer is 39.": 39,
    "A: 5\n\nQ: and 2 + 3?\nA: 2 + 3 is 6. The answer is 6.": 5,
    "£20": 20,
    "50%": 50,
    "1,2 and 3": 3,
    "1/0": None,
    "#### Step 1: add\n3 + 4 = 7\n#### Step 2: double\nThe answer is 14.": 14,
    "#### 1. Add\n3 + 4 = 7": 7,
    "#### **18**": 18,
    "#### .5": Fraction("0.5"),
    "To find the final answer, add the 2 numbers.\n3 + 4 = 7": 7,
    "Final answer: **7** of 9": 7,
    "Final answer - $7 of 9": 7,
    "\\boxed{1{,}234{,}500}": 1234500,
    "it costs 1\\,200": 1200,
    "no number": None,
    "": None,
}


@pytest.mark.parametrize(("text", "number"), ANSWERS.items())
def test_the_final_number_is_found(text, number):
    assert extract_answer(text) == number


def test_equal_numbers_are_equal_however_they_are_written():
    assert is_correct("It costs $1,200.00 in all.", "x\n#### 1200")
    assert not is_correct("It costs $1,200.01 in all.", "x\n#### 1200")
    assert not is_correct("I cannot tell.", "x\n#### 0")
    assert not is_correct("A: 18", "#### -18")


def test_a_digit_that_is_repeated_without_end_is_no_number():
    """A fraction of five million digits would take minutes."""
    assert extract_answer("The answer is " + "9" * 5_000_000) is None


def test_blank_lines_without_end_are_read_in_little_time():
    began = time.process_time()
    assert extract_answer("\n" * 50_000 + "A: 5, not 6") == 5
    assert time.process_time() - began < 1


def test_a_reference_without_a_number_is_refused():
    with pytest.raises(DataError) as caught:
        is_correct("18", "eighteen")
    assert caught.value.code == "RA244"


def test_labels_of_published_solutions(shared):
    """OpenAI's own labels of 100 questions' solutions by four models."""
    lines = (shared / "gsm8k" / "model_solutions_first100.jsonl").read_text().splitlines()
    for row in map(json.loads, lines):
        for solution in (value for value in row.values() if isinstance(value, dict)):
            assert is_correct(solution["solution"], row["ground_truth"]) == solution["is_correct"]


def test_every_reference_answer_is_the_number_after_its_mark(shared):
    for line in (shared / "gsm8k" / "train.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        assert extract_answer(answer) == Fraction(answer.partition("####")[2].strip().replace(",", ""))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    return path


REFERENCES = [{"question": "two?", "answer": "#### 2"}, {"question": "three?", "answer": "#### 3"}]


def test_files_are_taken_in_order(tmp_path):
    references = write(tmp_path / "r.jsonl", REFERENCES)
    in_order = [{"question": "two?", "prediction": "2"}, {"prediction": "so 4"}]
    assert score_gsm8k(write(tmp_path / "p.jsonl", in_order), references) == {"correct": 1, "total": 2}


@pytest.mark.parametrize(
    ("rows", "code", "said"),
    [
        ([{"prediction": "2"}], "RA232", "1 predictions and .* 2 answers"),
        ([{"question": "three?", "prediction": "3"}, {"prediction": "2"}], "RA233", "row 1 of"),
        ([{"answer": "2"}] * 2, "RA238", "no text in prediction"),
        ([], "RA239", "empty"),
    ],
)
def test_bad_files_are_refused(rows, code, said, tmp_path):
    with pytest.raises(DataError, match=said) as caught:
        score_gsm8k(write(tmp_path / "p.jsonl", rows), write(tmp_path / "r.jsonl", REFERENCES))
    assert caught.value.code == code


def test_predictions_without_a_number_count_as_wrong(tmp_path):
    predictions = write(tmp_path / "p.jsonl", [{"prediction": ""}, {"prediction": "3"}])
    with pytest.warns(RankwiseWarning, match="RA235: 1 of 2"):
        scores = score_gsm8k(predictions, write(tmp_path / "r.jsonl", REFERENCES))
    assert scores == {"correct": 1, "total": 2}

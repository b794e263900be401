"""LLM-Adapters' prompts and answers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.errors import DataError, RankwiseWarning
from rankwise_article.commonsense import Commonsense, adapters_prompt, extract_answer, instructions_in
from small_engines import byte_engine, nobody

ROW = {
    "instruction": "Please choose the correct answer to the question: Why?\n\nAnswer1: a b Answer2: c Answer3: d\n\n"
    "Answer format: answer1/answer2/answer3",
    "input": "",
    "output": "the correct answer is answer2",
    "answer": "answer2",
}


STYLES = ("llm-adapters", "trained")


@pytest.mark.parametrize(
    ("task", "text", "expected"),
    [
        ("boolq", "the correct answer is true", "true"),
        ("boolq", "untrue or false", "true"),
        ("boolq", "True", ""),
        ("piqa", "  solution2, not solution1", "solution2"),
        ("siqa", "the correct answer is answer3", "answer3"),
        ("hellaswag", "ending4", "ending4"),
        ("winogrande", "option1", "option1"),
        ("arc_challenge", "answer5 answer1", "answer5"),
        ("siqa", "answer4 answer1", "answer4"),
        ("openbookqa", "Answer1", ""),
        ("openbookqa", "", ""),
    ],
)
def test_the_first_answer_word_counts(task: str, text: str, expected: str):
    assert extract_answer(task, text) == expected


def test_prompt_is_alpacas_with_the_blanks_of_llm_adapters():
    plain = adapters_prompt("Do it.")
    assert plain.splitlines()[0].endswith("the request. ")
    assert plain.endswith("### Response:\n" + " " * 16)
    assert [line.strip() for line in plain.splitlines()[1:]] == [
        "",
        "### Instruction:",
        "Do it.",
        "",
        "### Response:",
        "",
    ]
    with_input = adapters_prompt("Do it.", "this")
    assert "paired with an input" in with_input
    assert with_input.splitlines()[0].endswith("the request.")
    assert with_input.index("Do it.") < with_input.index("### Input:") < with_input.index("this")


def test_every_answer_in_the_published_files_is_readable(shared: Path):
    for task in ("boolq", "piqa", "arc_easy", "arc_challenge", "openbookqa"):
        data = instructions_in(task, str(shared / "commonsense"))
        assert data is not None
        # The outputs of the training format hold the answer where extraction finds it.
        assert all(extract_answer(task, row["output"]) == row["answer"] for row in data.rows)


def test_bad_rows_are_named(tmp_path: Path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([ROW, {**ROW, "answer": "solution1"}]))
    with pytest.raises(DataError, match="RW251.*row 2.*answer3"):
        instructions_in("siqa", str(path))
    path.write_text(json.dumps([ROW, {"instruction": "x"}]))
    with pytest.raises(DataError, match="RW251.*row 2"):
        instructions_in("siqa", str(path))
    path.write_text(json.dumps([{"question": "x"}]))
    assert instructions_in("siqa", str(path)) is None


@pytest.mark.parametrize("style", STYLES)
def test_answers_are_written_scored_and_counted(tmp_path: Path, style: str):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([ROW, {**ROW, "answer": "answer1"}]))
    data = instructions_in("siqa", str(path))
    assert data is not None
    decoding = {"max_new_tokens": 3, "num_beams": 2}
    task = Commonsense("siqa", data, limit=None, prompt_style=style, decoding=decoding)
    examples = task.run(byte_engine(), tmp_path, nobody)
    assert [example.references for example in examples] == [("answer2",), ("answer1",)]
    assert examples[0].prediction == examples[1].prediction
    # One question asked twice: both belong to one source.
    assert examples[0].cluster == examples[1].cluster is not None
    summary = task.summarize(examples)
    assert summary.metrics == {"accuracy": 0.0}
    assert "hold none of" in summary.notes[-1]


def test_an_answer_in_the_style_of_training_ends_where_the_template_ends_it(tmp_path: Path):
    """That is often another token than the tokenizer's end of a text."""
    path = tmp_path / "test.json"
    path.write_text(json.dumps([ROW]))
    data = instructions_in("siqa", str(path))
    assert data is not None
    engine = byte_engine(template="{% for m in messages %}{{ m['content'] }}<s>{% endfor %}")
    ends = {style: Commonsense("siqa", data, limit=None, prompt_style=style, decoding={}) for style in STYLES}
    assert [task._prompts(engine)[2] for task in ends.values()] == [set(), {engine.tokenizer.bos_token_id}]


def test_empty_answers_are_scored_and_warned_about(tmp_path: Path):
    path = tmp_path / "test.json"
    path.write_text(json.dumps([ROW]))
    data = instructions_in("siqa", str(path))
    assert data is not None
    task = Commonsense("siqa", data, limit=None, prompt_style="trained", decoding={"max_new_tokens": 3})
    engine = byte_engine()
    engine.model.config.eos_token_id = list(range(259))
    with pytest.warns(RankwiseWarning, match="RA235"):
        assert task.summarize(task.run(engine, tmp_path, nobody)).metrics["accuracy"] == 0

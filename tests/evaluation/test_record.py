"""Predictions survive a kill at any byte, and a folder belongs to one evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rankwise.errors import RunError
from rankwise.evaluation.record import (
    EXAMPLES_FILE,
    Example,
    Journal,
    Responses,
    TaskResult,
    load_result,
    open_folder,
    read_examples,
    rewrite,
)
from rankwise.evaluation.tasks.base import answer_in_batches

EXAMPLES = [
    Example(id=str(n), prompt=f"p{n} é", prediction=f"answer {n}\nwith lines", scores={"accuracy": float(n % 2)})
    for n in range(5)
]


def test_a_file_cut_at_any_byte_keeps_its_whole_lines(tmp_path: Path):
    Journal(tmp_path).append(EXAMPLES)
    path = tmp_path / EXAMPLES_FILE
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        journal = Journal(tmp_path)
        assert len(journal.done) == content[:length].count(b"\n")
        journal.append(EXAMPLES)
        assert list(read_examples(path)) == EXAMPLES


def test_what_was_done_is_not_done_again_and_a_torn_batch_is(tmp_path: Path):
    ids, batches = [example.id for example in EXAMPLES], [[4, 1], [0, 3, 2]]
    asked: list[list[int]] = []

    def answer(batch):
        asked.append(list(batch))
        return [EXAMPLES[index] for index in batch]

    def stop(batch):
        if len(batch) == 3:
            raise KeyboardInterrupt
        return answer(batch)

    with pytest.raises(KeyboardInterrupt):
        answer_in_batches(ids, batches, stop, tmp_path, lambda done, total: None)
    told = []
    found = answer_in_batches(ids, batches, answer, tmp_path, lambda done, total: told.append((done, total)))
    assert found == EXAMPLES
    assert asked == [[4, 1], [0, 3, 2]]
    assert told == [(2, 5), (5, 5)]
    lines = (tmp_path / EXAMPLES_FILE).read_bytes().split(b"\n")
    (tmp_path / EXAMPLES_FILE).write_bytes(b"\n".join(lines[:1]) + b"\n" + lines[1][:7])
    assert answer_in_batches(ids, batches, answer, tmp_path, lambda done, total: None) == EXAMPLES


def test_half_a_surrogate_pair_is_written_and_read(tmp_path: Path):
    odd = Example(id="odd", prompt="p", prediction="half \ud83d of a pair")
    Journal(tmp_path).append([odd])
    assert Journal(tmp_path).done["odd"] == odd
    rewrite(tmp_path, [odd])
    assert list(read_examples(tmp_path / EXAMPLES_FILE)) == [odd]


def test_a_line_of_something_else_is_an_error(tmp_path: Path):
    (tmp_path / EXAMPLES_FILE).write_text('{"id": "1"}\n')
    with pytest.raises(RunError, match="RW571.*line 1"):
        Journal(tmp_path)


def test_a_folder_of_another_evaluation_is_refused_by_name(tmp_path: Path):
    open_folder(tmp_path, {"task": "e2e", "dtype": "float32"}, overwrite=False)
    Journal(tmp_path).append(EXAMPLES)
    open_folder(tmp_path, {"task": "e2e", "dtype": "float32"}, overwrite=False)
    with pytest.raises(RunError, match=r'RW570.*dtype was "float32", now "bfloat16"'):
        open_folder(tmp_path, {"task": "e2e", "dtype": "bfloat16"}, overwrite=False)
    assert len(Journal(tmp_path).done) == 5
    open_folder(tmp_path, {"task": "e2e", "dtype": "bfloat16"}, overwrite=True)
    assert not Journal(tmp_path).done


def test_responses_are_kept_by_request(tmp_path: Path):
    Responses(tmp_path).append({"a": [-1.5, True], "b": "text"})
    with (tmp_path / "responses.jsonl").open("a") as file:
        file.write('{"request": "c", "resp')
    assert Responses(tmp_path).known == {"a": [-1.5, True], "b": "text"}


def test_a_result_goes_to_disk_and_back(tmp_path: Path):
    result = TaskResult(
        task="e2e", model="demo", adapter=None, metrics={"BLEU": 0.5}, primary="BLEU", higher_is_better={"BLEU": True},
        standard_errors={"BLEU": None}, count=3, settings={"limit": None}, data_sha256="ab", versions={"python": "3"},
        wall_seconds=1.5,
    )  # fmt: skip
    result.save(tmp_path)
    again = load_result(tmp_path)
    assert json.dumps(again.to_json()) == json.dumps(result.to_json())
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(RunError, match="RW571"):
        load_result(tmp_path)
    with pytest.raises(RunError, match="RW571"):
        load_result(tmp_path / "nowhere")


def test_a_file_behind_a_link_is_left_alone(tmp_path: Path):
    """A folder from elsewhere may hold one: its target would lose a half line and get ours."""
    precious = tmp_path / "precious.txt"
    precious.write_text("no line end")
    (tmp_path / "task").mkdir()
    (tmp_path / "task" / EXAMPLES_FILE).symlink_to(precious)
    with pytest.raises(RunError, match="RW554"):
        Journal(tmp_path / "task")
    assert precious.read_text() == "no line end"

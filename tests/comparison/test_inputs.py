"""One training set, one evaluation set: chosen by content, written so that they are read as they were."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest

from rankwise.comparison.inputs import prepare_inputs
from rankwise.comparison.settings import CompareSettings
from rankwise.data import read_rows
from rankwise.data.objectives import formats_of
from rankwise.data.rows import Row
from rankwise.errors import ConfigError, RankwiseWarning
from rankwise.options import read_settings


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def inputs(tmp_path: Path, data: object, name: str = "out", **changes: Any) -> Any:
    given = {"model": "demo", "data": str(data), "output": str(tmp_path / name), **changes}
    return prepare_inputs(read_settings(CompareSettings, None, given), lambda described: None)


user = {"role": "user", "content": "q{}"}
good, bad = ({"role": "assistant", "content": text} for text in ("good {}", "bad"))
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
ROWS = [{"prompt": f"q{n // 3}", "completion": f"answer {n}"} for n in range(90)]


def test_the_split_depends_on_content_alone_and_keeps_prompts_together(tmp_path: Path):
    mixed = ROWS.copy()
    random.Random(1).shuffle(mixed)
    one = inputs(tmp_path, write(tmp_path / "a.jsonl", ROWS), "one")
    two = inputs(tmp_path, write(tmp_path / "b.jsonl", mixed), "two")
    train, held = read_rows(one.train), read_rows(one.evaluation)
    assert len(train) + len(held) == 90
    assert 9 <= len(held) <= 12
    assert not {row.prompt for row in train} & {row.prompt for row in held}
    assert sorted(row.completion for row in held) == sorted(row.completion for row in read_rows(two.evaluation))


@pytest.mark.parametrize(
    "rows",
    [
        [{"mr": f"name[{n}]", "ref": f"Place {n}."} for n in range(20)],
        [
            {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": "a"}]}
            for n in range(20)
        ],
        [{"text": f"line {n}"} for n in range(20)],
        [{"question": f"q{n}", "answer": "a"} for n in range(20)],
        [{"instruction": f"do {n}", "input": "x", "output": "y"} for n in range(20)],
        [{"prompt": [{"role": "user", "content": f"q{n}"}], "completion": [good], "tools": [TOOL]} for n in range(20)],
        [{"prompt": f"q{n}", "completion": "two\u2028lines\n "} for n in range(20)],
    ],
)
def test_written_parts_mean_what_they_meant(tmp_path: Path, rows: list[dict[str, Any]]):
    source = write(tmp_path / "rows.jsonl", rows)
    found, whole = inputs(tmp_path, source), read_rows(source)
    parts = [*read_rows(found.train), *read_rows(found.evaluation)]
    assert sorted(map(meaning, parts)) == sorted(map(meaning, whole))
    for part in (read_rows(found.train), read_rows(found.evaluation)):
        assert (part.kind, part.uses_template, part.separator) == (whole.kind, whole.uses_template, whole.separator)


@pytest.mark.parametrize(
    ("objective", "row"),
    [
        ("dpo", {"prompt": "q{}", "chosen": "good {}", "rejected": "bad"}),
        ("dpo", {"question": "q{}", "chosen": "good {}", "rejected": "bad"}),
        ("dpo", {"chosen": "q{} good", "rejected": "q{} bad"}),
        ("dpo", {"prompt": [user], "chosen": [good], "rejected": [bad]}),
        ("dpo", {"chosen": [user, good], "rejected": [user, bad]}),
        ("kto", {"question": "q{}", "chosen": "good {}", "rejected": "bad"}),
        ("kto", {"prompt": "q{}", "completion": "a", "label": True}),
        ("kto", {"prompt": [user], "completion": [good], "label": False}),
    ],
)
def test_parts_of_preferences_mean_what_they_meant(tmp_path: Path, objective: str, row: dict[str, Any]):
    text = json.dumps(row)
    source = write(tmp_path / "rows.jsonl", [json.loads(text.replace("{}", str(n))) for n in range(20)])
    found = inputs(tmp_path, source, objective=objective)
    how = {"formats": formats_of(objective)}
    parts = [*read_rows(found.train, **how), *read_rows(found.evaluation, **how)]
    assert len(read_rows(found.evaluation, **how)) == 2
    assert sorted(map(meaning, parts)) == sorted(map(meaning, read_rows(source, **how)))


def meaning(row: Row) -> str:
    places = {"source": "", "line": 0}
    sides = [dataclasses.replace(side, rejected=None, **places) for side in row.sides]  # type: ignore[arg-type]
    return str(sides)


def test_given_evaluation_data_are_used_as_they_are_and_overlap_is_counted(tmp_path: Path):
    train = write(tmp_path / "train.jsonl", ROWS)
    held = write(tmp_path / "held.jsonl", [*ROWS[:4], {"prompt": "new", "completion": "row"}])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = inputs(tmp_path, train, eval_data=str(held))
    assert (found.train, found.evaluation) == (str(train), str(held))
    assert found.described["overlap"] == 4
    assert [item.message.code for item in caught if isinstance(item.message, RankwiseWarning)] == ["RW218"]


def test_evaluation_sets_are_limited(tmp_path: Path):
    train, held = write(tmp_path / "train.jsonl", ROWS[:5]), write(tmp_path / "held.jsonl", ROWS[5:])
    assert len(read_rows(inputs(tmp_path, train, eval_data=str(held), eval_limit=7).evaluation)) == 7
    everything = inputs(tmp_path, train, "all", eval_data=str(held), eval_limit=0)
    assert everything.eval_rows == 85


def test_one_prompt_cannot_be_split(tmp_path: Path):
    source = write(tmp_path / "rows.jsonl", [{"prompt": "same", "completion": f"{n}"} for n in range(9)])
    with pytest.raises(ConfigError) as caught:
        inputs(tmp_path, source)
    assert caught.value.code == "RW168"


@pytest.mark.parametrize(("steps", "expected"), [(100, 256), (200, 320), (1000, 400)])
def test_with_a_time_more_rows_are_evaluated_where_a_run_trains_on_many(steps: int, expected: int, tmp_path: Path):
    """A fifth of the rows of a run's steps, each at half the cost: a tenth of its time."""
    held = write(tmp_path / "held.jsonl", [{"prompt": f"p{n}", "completion": "a"} for n in range(400)])
    data = write(tmp_path / "rows.jsonl", ROWS)
    changes: dict[str, Any] = {"eval_data": str(held), "max_steps": steps, "batch_size": 8}
    assert inputs(tmp_path, data, "fixed", **changes).eval_rows == 256
    assert inputs(tmp_path, data, "timed", **changes, time="1h").eval_rows == expected

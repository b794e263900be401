"""Rewards from files and built in; whatever a reward does wrong is one error that names it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rankwise.errors import RankwiseError
from rankwise.training.grpo import read_rewards

FILE = """
import math

def words(completions, **kwargs):
    return [len(text.split()) for text in completions]

def right(prompts, completions, target):
    return [float(text == wanted) for text, wanted in zip(completions, target)]

async def later(completions, **kwargs):
    return [1.0 for _ in completions]

def some(completions, **kwargs):
    return [None if text == "b" else 0.5 for text in completions]

def raises(completions, **kwargs):
    return [1 / (text != "b c") for text in completions]

def nan(completions, **kwargs):
    return [math.nan if text == "b c" else 1.0 for text in completions]

def words_themselves(completions, **kwargs):
    return list(completions)

def too_few(completions, **kwargs):
    return [1.0]

def one_number(completions, **kwargs):
    return 1.0

def exits(completions, **kwargs):
    raise SystemExit(0)

def raises_later(completions, **kwargs):
    yield from (1 / (text != "b c") for text in completions)

def huge(completions, **kwargs):
    return [10**400 for _ in completions]

def several(completions, **kwargs):
    return [[1.0, 2.0] for _ in completions]

number = 3
"""
GIVEN: dict[str, Any] = {
    "prompts": ["p", "q"],
    "completions": ["a", "b c"],
    "completion_ids": [[5], [6, 7, 8]],
    "target": ["a", "x"],
    "answer": ["2 + 2 = 4 #### 4", "#### 7"],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rewards.py"
    path.write_text(FILE)
    return path


def called(spec: str, **changed: Any) -> list[float | None]:
    [reward] = read_rewards([spec])
    return [None if score != score else score for score in reward(**{**GIVEN, **changed})]


def refused(spec: str, **changed: Any) -> RankwiseError:
    with pytest.raises(RankwiseError) as caught:
        called(spec, **changed)
    return caught.value


def test_functions_of_a_file_get_what_trl_gives_and_name_what_they_use(file):
    assert called(f"{file}:words") == [1.0, 2.0]
    assert called(f"{file}:right") == [1.0, 0.0]
    assert called(f"{file}:later") == [1.0, 1.0]
    assert called(f"{file}:some", completions=["a", "b"]) == [0.5, None]


def test_a_file_is_known_by_its_content(file):
    [before] = read_rewards([f"{file}:words"])
    file.write_text(FILE + "# changed")
    [after] = read_rewards([f"{file}:words"])
    assert before.name == "words"
    assert before.sha256 != after.sha256


def test_names_are_told_apart(file):
    names = [reward.name for reward in read_rewards(["length=2", f"{file}:words", "length=3"])]
    assert names == ["length_1", "words", "length_3"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("answer", [1.0, 0.0]),
        ("format=<think>.*</think>", [1.0, 0.0]),
        ("length=2", [1.0, 0.5]),
        ("length=1", [1.0, 0.0]),
        ("length=3", [1.0, 1.0]),
    ],
)
def test_built_in_rewards(spec, expected):
    assert called(spec, completions=["<think>so</think> it is 4", "8"]) == expected


def test_built_in_rewards_read_messages():
    messages = [[{"role": "assistant", "content": text}] for text in ("so 4", "so 7")]
    assert called("answer", completions=messages) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("name", "code", "words"),
    [
        ("raises", "RW772", ["ZeroDivisionError"]),
        ("nan", "RW774", ["nan"]),
        ("words_themselves", "RW774", ["finite number", "'a'"]),
        ("too_few", "RW774", ["returned [1.0] for 2 answers"]),
        ("one_number", "RW774", ["returned [1.0] for 2 answers"]),
        ("exits", "RW772", ["SystemExit"]),
        ("raises_later", "RW772", ["ZeroDivisionError"]),
        ("huge", "RW774", ["10000"]),
        ("several", "RW774", ["[1.0, 2.0]"]),
        ("number", "RW771", ["has no function number", "words, right"]),
        ("absent", "RW771", ["has no function absent", "words, right"]),
    ],
)
def test_what_a_function_does_wrong_is_named(file, name, code, words):
    error = refused(f"{file}:{name}")
    assert error.code == code
    assert all(word in error.message for word in [f"{file}:{name}", *words])


@pytest.mark.parametrize(
    "spec",
    ["correct", "format=", "format=(", "length", "length=0", "length=many", "length=" + "9" * 5000, "rewards.py"],
)
def test_what_is_no_reward_is_refused(spec):
    error = refused(spec)
    assert error.code == "RW770"
    assert spec in error.message


def test_a_file_that_is_missing_or_does_not_load_is_refused(tmp_path):
    assert refused(f"{tmp_path}/none.py:right").code == "RW771"
    broken = tmp_path / "broken.py"
    for text, reason in (
        ("def (", "SyntaxError"),
        ("import no_such_module", "no_such_module"),
        ("raise SystemExit", ""),
    ):
        broken.write_text(text)
        error = refused(f"{broken}:right")
        assert error.code == "RW771"
        assert reason in error.message


def test_the_right_answer_must_be_there():
    [reward] = read_rewards(["answer"])
    without = {name: value for name, value in GIVEN.items() if name != "answer"}
    with pytest.raises(RankwiseError, match="solution") as caught:
        reward(**without)
    assert caught.value.code == "RW781"
    assert refused("answer", answer=["4", "none"]).code == "RW781"
    assert reward(**without, solution=["so 4", "5"], completion="x") == [0.0, 0.0]

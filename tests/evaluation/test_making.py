"""No option is ignored: what no task of the command uses is refused, by name and with the tasks it belongs to."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

import guest_task
from rankwise.errors import ConfigError
from rankwise.evaluation.engine import LoadOptions
from rankwise.evaluation.settings import EvaluateSettings, LoadingOptions
from rankwise.evaluation.tasks import names
from rankwise.evaluation.tasks.making import check_options, make_tasks


@pytest.fixture(autouse=True)
def _guest(monkeypatch: pytest.MonkeyPatch) -> None:
    guest_task.install(monkeypatch)


def settings(task: str, **more: Any) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"model": "demo", "task": task, **more})


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("mmlu", {"chat_template": "t.jinja"}, "RW112.*ignore --chat-template;"),
        ("mmlu", {"set": "longest=3"}, r"RW112.*--set longest; .*--set takes nothing here"),
        ("lengths", {"max_length": 64}, "RW112.*ignore --max-length;"),
        ("lengths", {"set": "unused=1"}, r"RW112.*--set unused; .*--set takes longest here"),
        ("lengths", {"set": "longest=0"}, "RW103.*--set longest is '0': .*greater than or equal to 1"),
        ("lengths", {"set": "longest"}, "RW103.*longest without a value"),
        ("lengths", {"set": ["longest=1", "longest=2"]}, "RW103.*longest twice"),
        ("lengths", {"data": ["a.csv", "b.csv"]}, "RW112.*2 times for all tasks .*a.csv, b.csv"),
        ("lengths", {"data": ["lengths=a.csv", "lengths=b.csv"]}, "RW112.*lengths= is given twice"),
        ("lengths", {"data": ["lengths=a.csv", "b.csv"]}, "RW112.*b.csv is for no task"),
        ("lengths", {}, "RW150.*a file of lines"),
    ],
)
def test_an_option_that_nothing_uses_is_refused(task: str, more: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=said):
        make_tasks(settings(task, **more))


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("perplexity,lengths", {"set": "longest=4", "max_length": 64, "num_fewshot": 1}),
        ("mmlu", {"num_fewshot": 5}),
        ("perplexity", {"chat_template": "t"}),
    ],
)
def test_an_option_that_one_of_the_tasks_uses_stands(task: str, more: dict[str, Any]):
    check_options(settings(task, **more))


def test_a_task_of_another_distribution_gets_its_data_and_options(tmp_path: Path):
    (tmp_path / "lines.txt").write_text("one\nthree\nfour\n")
    given = settings("lengths", data=f"lengths={tmp_path / 'lines.txt'}", set=["longest=4"], limit=2)
    [task] = make_tasks(given)
    names.check_tasks(given.task)
    assert task.describe() == {"longest": 4}
    assert task.summarize(task.run(None, tmp_path, lambda *_: None)).metrics == {"accuracy": 0.5}  # type: ignore[arg-type]


def test_the_articles_tasks_are_told_by_the_command_that_installs_them():
    with pytest.raises(ConfigError, match=r"RW153.*rankwise-article.*`pip install ./article`"):
        names.check_tasks(["perplexity", "e2e"])


def test_data_of_one_task_stand_beside_data_for_all():
    given = settings("e2e,gsm8k", data=["e2e=a.csv", "b=c.jsonl"])
    assert (given.data_of("e2e"), given.data_of("gsm8k")) == ("a.csv", "b=c.jsonl")


def test_each_option_of_loading_is_one_of_the_loader() -> None:
    """evaluate, generate and predict pass them on by name."""
    given = {
        "dtype": "float32",
        "quantization": "nf4",
        "base_bits": "16",
        "device": "cpu",
        "mmap": False,
        "revision": "a",
    }
    options = settings("mmlu", trust_remote_code=True, **given).model_dump(include={*LoadingOptions.model_fields})
    loading = dataclasses.asdict(LoadOptions(**options))
    assert {name: loading[name] for name in options} == options
    assert all(options[name] != usual for name, usual in LoadingOptions.defaults().items())

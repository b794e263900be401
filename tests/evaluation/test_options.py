"""No option is ignored: what no task of the command uses is refused, by name and with the tasks it belongs to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_engines import arc_docs, write_lines

from rankwise.errors import ConfigError
from rankwise.evaluation.settings import EvaluateSettings
from rankwise.evaluation.tasks.options import USED_BY, check_options
from rankwise.evaluation.tasks.registry import kind_of, make_tasks

WRITTEN = {"instruction": "Is it true?", "input": "", "output": "true", "answer": "true"}


def settings(task: str, **more: Any) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"model": "demo", "task": task, **more})


@pytest.mark.parametrize(
    ("task", "more", "said"),
    [
        ("mmlu", {"max_new_tokens": 5}, "--max-new-tokens belongs to e2e"),
        ("mmlu", {"num_beams": 4}, "--num-beams belongs to e2e"),
        ("mmlu", {"protocol": "loglikelihood"}, "--protocol belongs to commonsense"),
        ("mmlu", {"chat_template": "t.jinja"}, "--chat-template belongs to perplexity, e2e"),
        ("piqa", {"protocol": "loglikelihood", "max_new_tokens": 5}, "--max-new-tokens belongs to e2e"),
        ("piqa", {"protocol": "loglikelihood", "prompt_style": "trained"}, "--prompt-style belongs to commonsense"),
        ("piqa", {"protocol": "generative", "fewshot_data": "f"}, "--fewshot-data belongs to"),
        ("vicuna", {"num_beams": 2}, "--num-beams belongs to e2e"),
        ("gsm8k", {"length_penalty": 0.9}, "--length-penalty belongs to e2e"),
        ("gsm8k", {"no_repeat_ngram_size": 3}, "--no-repeat-ngram-size belongs to e2e"),
        ("e2e", {"temperature": 0.5}, "--temperature belongs to vicuna"),
        ("e2e", {"judge_model": "m"}, "--judge-model belongs to vicuna"),
        ("vicuna", {"max_length": 64}, "--max-length belongs to perplexity"),
        ("e2e,vicuna", {"protocol": "generative"}, "--protocol belongs to commonsense"),
        ("e2e", {"length_penalty": 0.9}, "--num-beams above 1"),
        ("vicuna", {"top_p": 0.9}, "--top-p goes with --temperature"),
        ("vicuna", {"seed": 3}, "--seed goes with --temperature"),
        ("piqa", {"protocol": "generative", "chat_template": "t.jinja"}, "--prompt-style trained"),
        ("gsm8k", {"chat_template": "t.jinja"}, "--num-fewshot 0"),
    ],
)
def test_an_option_that_nothing_uses_is_refused(task: str, more: dict[str, Any], said: str):
    given = settings(task, **more)
    with pytest.raises(ConfigError, match=f"RW152.*{said}"):
        check_options(given, [kind_of(name, given) for name in given.task])


@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("perplexity,e2e", {"max_new_tokens": 4, "max_length": 64}),
        ("e2e", {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4, "chat_template": "t"}),
        ("piqa", {"protocol": "generative", "length_penalty": 0.5, "prompt_style": "trained", "chat_template": "t"}),
        ("gsm8k", {"num_fewshot": 0, "chat_template": "t", "num_beams": 2}),
        ("mmlu", {"num_fewshot": 5}),
        ("vicuna", {"temperature": 0.7, "top_p": 0.9, "seed": 1}),
    ],
)
def test_an_option_that_one_of_the_tasks_uses_stands(task: str, more: dict[str, Any]):
    given = settings(task, **more)
    check_options(given, [kind_of(name, given) for name in given.task])


def test_the_protocol_is_what_the_data_are_for(tmp_path: Path):
    written = write_lines(tmp_path / "written.jsonl", [WRITTEN])
    original = write_lines(tmp_path / "original.jsonl", arc_docs(1))
    assert kind_of("boolq", settings("boolq", data=str(written))) == "generative"
    assert kind_of("arc_easy", settings("arc_easy", data=str(original))) == "loglikelihood"
    assert kind_of("boolq", settings("boolq", data=str(written), protocol="loglikelihood")) == "loglikelihood"
    [task] = make_tasks(settings("boolq", data=str(written), max_new_tokens=7))
    assert task.describe()["max_new_tokens"] == 7


def test_the_table_names_options():
    assert set(USED_BY) <= set(EvaluateSettings.model_fields)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (("a.csv", "b.csv"), "2 times for all tasks .*a.csv, b.csv"),
        (("e2e=a.csv", "e2e=b.csv"), "e2e= is given twice"),
        (("e2e=a.csv", "b.csv"), "b.csv is for no task"),
    ],
)
def test_no_data_are_ignored(data: tuple[str, ...], said: str):
    with pytest.raises(ConfigError, match=f"RW152.*{said}"):
        settings("e2e", data=list(data)).data_of("e2e")


def test_data_of_one_task_stand_beside_data_for_all():
    given = settings("e2e,gsm8k", data=["e2e=a.csv", "b=c.jsonl"])
    assert (given.data_of("e2e"), given.data_of("gsm8k")) == ("a.csv", "b=c.jsonl")


def test_worked_examples_that_would_not_be_shown_are_refused(tmp_path: Path):
    problems = write_lines(tmp_path / "p.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    with pytest.raises(ConfigError, match="RW152.*--num-fewshot is 0"):
        make_tasks(settings("gsm8k", data=str(problems), num_fewshot=0, fewshot_data=str(problems)))

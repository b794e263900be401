"""The tasks' options: what they admit, what they refuse, and what their defaults are."""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

import pytest

import rankwise.adapters
import rankwise.data
import rankwise.evaluation
from rankwise.errors import ConfigError, DataError
from rankwise.evaluation import EvaluateSettings
from rankwise.evaluation.tasks.making import check_options, make_tasks
from small_engines import arc_docs, write_lines

WRITTEN = {"instruction": "Is it true?", "input": "", "output": "true", "answer": "true"}
SOURCE = Path(__file__).parents[1] / "src" / "rankwise_article"


def settings(task: str, *options: str, **more: Any) -> EvaluateSettings:
    return EvaluateSettings.model_validate({"model": "demo", "task": task, "set": options, **more})


@pytest.mark.parametrize(
    ("task", "options", "more", "said"),
    [
        ("piqa", ["protocol=loglikelihood", "max_new_tokens=5"], {}, "--set max_new_tokens"),
        ("piqa", ["protocol=loglikelihood", "prompt_style=trained"], {}, "--set prompt_style"),
        ("piqa", ["protocol=generative"], {"fewshot_data": "f"}, "--fewshot-data"),
        ("piqa", ["protocol=generative", "num_beams=1", "length_penalty=0.9"], {}, "--set length_penalty"),
        ("piqa", ["protocol=generative"], {"chat_template": "t.jinja"}, "--chat-template"),
        ("vicuna", ["num_beams=2"], {}, "--set num_beams"),
        ("gsm8k", ["length_penalty=0.9"], {}, "--set length_penalty"),
        ("gsm8k", [], {"chat_template": "t.jinja"}, "--chat-template"),
        ("e2e", ["temperature=0.5"], {}, "--set temperature"),
        ("e2e,gsm8k", ["judge_model=m"], {}, "--set judge_model"),
        ("vicuna", ["top_p=0.9"], {}, "--set top_p"),
        ("vicuna", ["seed=3"], {}, "--set seed"),
    ],
)
def test_an_option_that_nothing_uses_is_refused(task: str, options: list[str], more: dict[str, Any], said: str):
    with pytest.raises(ConfigError, match=f"RW112.*would ignore {said}"):
        check_options(settings(task, *options, **more))


@pytest.mark.parametrize(
    ("task", "options", "more"),
    [
        ("perplexity,e2e", ["max-new-tokens=4"], {"max_length": 64}),
        ("e2e", ["num_beams=10", "length_penalty=0.9", "no_repeat_ngram_size=4"], {"chat_template": "t"}),
        ("piqa", ["protocol=generative", "length_penalty=0.5", "prompt_style=trained"], {"chat_template": "t"}),
        ("gsm8k", ["num_beams=2"], {"num_fewshot": 0, "chat_template": "t"}),
        ("vicuna", ["temperature=0.7", "top_p=0.9", "seed=1"], {}),
    ],
)
def test_an_option_that_one_of_the_tasks_uses_stands(task: str, options: list[str], more: dict[str, Any]):
    check_options(settings(task, *options, **more))


def test_options_without_their_partner_are_refused(tmp_path: Path):
    problems = write_lines(tmp_path / "p.jsonl", [{"question": "1 + 1?", "answer": "#### 2"}])
    for task, options, more, said in (
        ("e2e", ["length_penalty=0.9"], {}, "num_beams above 1"),
        ("vicuna", ["judge_url=http://x"], {}, "together"),
        ("gsm8k", [], {"num_fewshot": 0, "fewshot_data": str(problems)}, "--num-fewshot is 0"),
    ):
        with pytest.raises(ConfigError, match=f"RW112.*{said}"):
            make_tasks(settings(task, *options, data=str(problems), **more))
    with pytest.raises(ConfigError, match="RW150.*rows of LLM-Adapters.*no data were given"):
        make_tasks(settings("piqa", "protocol=generative"))


def test_the_defaults_are_the_papers(tmp_path: Path):
    (tmp_path / "e2e.csv").write_text("mr,ref\nname[A],A is.\n")
    known = {"max_new_tokens": 64, "meaning_representations": 1}
    for options, expected in (
        ([], {"num_beams": 1, "length_penalty": 1.0, "no_repeat_ngram_size": 0}),
        (["num_beams=10"], {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 4}),
        (
            ["num_beams=10", "no_repeat_ngram_size=0"],
            {"num_beams": 10, "length_penalty": 0.9, "no_repeat_ngram_size": 0},
        ),
    ):
        [task] = make_tasks(settings("e2e", *options, data=str(tmp_path / "e2e.csv")))
        assert task.describe() == known | expected


def test_the_protocol_is_what_the_data_are_for(tmp_path: Path):
    written = write_lines(tmp_path / "written.jsonl", [WRITTEN])
    [task] = make_tasks(settings("boolq", "max_new_tokens=7", data=str(written)))
    expected = {"protocol": "generative", "prompt_style": "llm-adapters", "max_new_tokens": 7, "num_beams": 4}
    assert task.describe() == expected | {"length_penalty": 1.0}
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
    original = write_lines(tmp_path / "original.jsonl", arc_docs(1))
    [task] = make_tasks(settings("arc_easy", data=str(original)))
    assert task.describe()["protocol"] == "loglikelihood"


def test_rows_of_llm_adapters_are_answered_in_writing(tmp_path: Path):
    written = write_lines(tmp_path / "written.jsonl", [WRITTEN])
    with pytest.raises(DataError, match="RW251.*needs passage, question, label"):
        make_tasks(settings("boolq", "protocol=loglikelihood", data=str(written)))


def test_only_what_the_core_exports_is_used():
    """The names that `rankwise.adapters`, `.data` and `.evaluation` export, and modules of the base."""
    rooms = (rankwise.adapters, rankwise.data, rankwise.evaluation)
    exported = {room.__name__: room.__all__ for room in rooms}
    # The look of a picture.
    exported["rankwise.reports.plots"] = ["STYLE_FILE", "colour", "svg_of"]
    for path in SOURCE.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            module = getattr(node, "module", None) or ""
            if isinstance(node, ast.ImportFrom) and module.startswith("rankwise."):
                names = [alias.name for alias in node.names]
                assert set(names) <= set(exported.get(module, names)), path
                assert module in exported or module.count(".") == 1, (path, module)

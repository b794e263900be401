"""Canaries of ``compat.lm_eval``, where that package is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from rankwise.compat import lm_eval as compat


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"q": f"{n}+1=", "a": str(n + 1)}) + "\n" for n in range(4))
    )
    task = {
        "task": "canary",
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"validation": str(tmp_path / "rows.jsonl"), "train": str(tmp_path / "rows.jsonl")},
            "cache_dir": str(tmp_path / "cache"),
        },
        "output_type": "multiple_choice",
        "validation_split": "validation",
        "fewshot_split": "train",
        "doc_to_text": "{{q}}",
        "doc_to_choice": ["1", "2", "3", "4"],
        "doc_to_target": "a",
        "num_fewshot": 1,
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    path = tmp_path / "task.yaml"
    path.write_text(json.dumps(task))
    return path


class Guessing(TemplateLM):
    """Prefers the first choice."""

    eot_token_id = 0
    max_length = 64

    def tok_encode(self, string: str, **_: object) -> list[int]:
        return [ord(letter) for letter in string]

    def _loglikelihood_tokens(self, requests, **_):
        return [(-float(continuation[-1]), False) for _, _, continuation in requests]

    def loglikelihood_rolling(self, requests, disable_tqdm=False):
        raise NotImplementedError

    def generate_until(self, requests, disable_tqdm=False):
        raise NotImplementedError


def test_task_index_names_every_task_and_its_yaml_path():
    files = compat.task_files()
    assert files["hellaswag"].name == "hellaswag.yaml"
    assert "arc_challenge" in files


def test_load_builds_tasks_and_evaluate_answers_with_samples(task_file: Path):
    tasks, groups = compat.built(str(task_file), task_file.parent)
    assert not groups
    task = tasks["canary"]
    assert [doc["q"] for doc in task.eval_docs] == ["0+1=", "1+1=", "2+1=", "3+1="]
    assert (task.OUTPUT_TYPE, task.multiple_input) == ("multiple_choice", 0)
    assert [compat.right_choice(task, doc) for doc in task.eval_docs] == [0, 1, 2, 3]
    assert task.VERSION is not None
    assert compat.own_shots(task) == 1
    compat.show_examples(task, 2, 1234)
    assert compat.own_shots(task) == 2
    results = compat.evaluated(Guessing(), tasks, groups, limit=3)
    assert results["results"]["canary"]["acc,none"] == pytest.approx(1 / 3)
    assert results["higher_is_better"]["canary"] == {"acc": True}
    samples = results["samples"]["canary"]
    assert [sample["acc"] for sample in samples] == [1, 0, 0]
    first = samples[0]
    assert (first["doc_id"], first["filter"], first["metrics"]) == (0, "none", ["acc"])
    assert first["arguments"][0][0].count("+1=") == 3
    assert len(first["resps"]) == 4


def test_tags_and_groups_say_whether_they_have_figures(task_file: Path):
    folder = task_file.parent
    task = json.loads(task_file.read_text(encoding="utf-8"))
    task_file.write_text(json.dumps({**task, "tag": "both"}), encoding="utf-8")
    (folder / "other.yaml").write_text(json.dumps({**task, "task": "other", "tag": "both", "fewshot_split": None}))
    group = {"group": "bare", "task": ["canary", "other"]}
    (folder / "bare.yaml").write_text(json.dumps(group))
    summed = {"aggregate_metric_list": [{"metric": "acc", "weight_by_size": True}]}
    (folder / "summed.yaml").write_text(json.dumps({**group, "group": "summed", **summed}))
    names = ["canary", "other"]
    for spec, figures, parts in (
        ("canary", "canary", ["canary"]),
        ("both", None, names),
        ("bare", None, names),
        ("summed", "summed", names),
    ):
        tasks, groups = compat.built(spec, folder)
        assert compat.place_of_figures(tasks, groups) == (figures, parts)
    assert [compat.has_examples(tasks[name]) for name in names] == [True, False]
    assert all(map(compat.reads_json, tasks.values()))
    assert "acc,none" in compat.evaluated(Guessing(), tasks, groups, limit=2)["results"]["summed"]


def test_requests_carry_their_arguments_in_args():
    request = Instance(request_type="generate_until", doc={}, arguments=("text", {"until": ["."]}), idx=0)
    assert request.args == ("text", {"until": ["."]})


def test_rolling_windows_score_each_token_once():
    windows = map(
        make_disjoint_window,
        get_rolling_token_windows(token_list=list(range(1, 8)), prefix_token=0, max_seq_len=3, context_len=1),
    )
    assert [token for _, scored in windows for token in scored] == list(range(1, 8))

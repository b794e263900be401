"""A misspelt task is told from the harness' files, without importing it."""

from __future__ import annotations

from pathlib import Path

import pytest

from rankwise.errors import ConfigError
from rankwise.evaluation.tasks import names


@pytest.fixture
def harness(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two files of lm-evaluation-harness: a task with a tag, and a group of tasks named nowhere else."""
    folder = tmp_path / "tasks" / "some"
    folder.mkdir(parents=True)
    (folder / "medtext.yaml").write_text("task: medtext_perplexity\ntag: medical\n", encoding="utf-8")
    (folder / "_group.yaml").write_text("group: 'mmlu'\ntask:\n  - mmlu_anatomy\n", encoding="utf-8")
    monkeypatch.setattr(names, "installed_harness", lambda: tmp_path)


@pytest.mark.parametrize(
    ("name", "meant"), [("perplexty", "perplexity or medtext_perplexity"), ("mmluu", "mmlu"), ("medicla", "medical")]
)
def test_the_closest_are_named_ours_first(harness: None, name: str, meant: str):
    with pytest.raises(ConfigError, match=rf"RW154.*did you mean {meant}\?"):
        names.check_tasks(["perplexity", name])


def test_what_stands_in_a_file_is_left_to_the_harness(harness: None):
    names.check_tasks(["piqa", "medtext_perplexity", "medical", "mmlu", "mmlu_anatomy"])


def test_without_the_harness_a_slip_of_ours_is_told(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(names, "installed_harness", lambda: None)
    with pytest.raises(ConfigError, match=r"RW154.*did you mean gsm8k\?"):
        names.check_tasks(["gsm8"])
    with pytest.raises(ConfigError, match="RW153.*pip install lm-eval"):
        names.check_tasks(["truthfulqa_mc1"])

"""``train --dry-run``: every check before the first step, and nothing written."""

from __future__ import annotations

import hashlib

import pytest

from rankwise.errors import RunError
from rankwise.planning.guard import MemoryGuard


@pytest.fixture
def command(model_folder, rows_file):
    """Two steps of four rows on the tiny model."""
    given = ["train", "--model", model_folder, "--data", rows_file, "--eval-data", rows_file, "--max-steps", 2]
    return [*given, "--batch-size", 2, "--gradient-accumulation", 2, "--r", 2, "--device", "cpu"]


def files_below(folder) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in folder.rglob("*")
    }


def test_it_says_what_would_be_done_and_writes_nothing(command, rankwise, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = rankwise(*command, "--output", "runs/deep/first", "--cache", "cache", "--dry-run")
    assert done.code == 0, done.stderr
    assert files_below(tmp_path) == {}
    lines = dict(line.split(maxsplit=1) for line in done.stdout.splitlines() if "  " in line)
    assert lines["data"].startswith("rows.jsonl: 12 rows, ")
    assert lines["evaluation"].startswith("rows.jsonl: 12 rows, ")
    assert lines["steps"] == "2 of 4 rows"
    assert lines["output"] == "runs/deep/first, which is made"
    assert "predicted peak" in done.stdout


def test_its_document_is_the_record_that_the_run_begins_with(command, rankwise, tmp_path):
    output = tmp_path / "run"
    planned = rankwise(*command, "--output", output, "--dry-run", "--json").document
    assert planned["status"] == "dry run"
    done = rankwise(*command, "--output", output, "--json").document
    for name in ("steps", "trainable_parameters", "total_parameters", "data", "base_model", "versions"):
        assert planned[name] == done[name], name


@pytest.mark.parametrize(
    ("option", "said"), [("--overwrite", "replaces the run there"), ("--resume", "continues the run there")]
)
def test_a_run_that_is_there_stays_as_it_is(option, said, command, rankwise, tmp_path):
    output = tmp_path / "run"
    assert rankwise(*command, "--output", output).code == 0
    before = files_below(tmp_path)
    longer = ["--max-steps", 4] if option == "--resume" else []
    done = rankwise(*command, *longer, "--output", output, option, "--dry-run")
    assert done.code == 0, done.stderr
    assert said in done.stdout
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("option", [[], ["--dry-run"]])
def test_a_run_refused_late_leaves_no_folder(option, command, rankwise, tmp_path, monkeypatch):
    def refuse(self, batch, evaluation, mapped):
        raise RunError("RW562", "this run cannot fit.")

    monkeypatch.setattr(MemoryGuard, "before_training", refuse)
    done = rankwise(*command, "--output", tmp_path / "runs" / "first", *option)
    assert done.code == 2
    assert files_below(tmp_path) == {}

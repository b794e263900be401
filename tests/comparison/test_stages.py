"""How a step of a comparison ended, by its exit code and what it wrote."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from rankwise.comparison import stages
from rankwise.comparison.stages import Cell


@pytest.mark.parametrize("code", [-signal.SIGINT, -signal.SIGTERM, 130])
def test_a_signal_from_outside_interrupts_a_step_and_does_not_fail_it(code: int, tmp_path: Path):
    """130 without a document: a command that was stopped while it read its options."""
    outcome = stages.outcome_from(stages.Job("measure", None), tmp_path, code, {}, 1.0)
    assert outcome.is_interrupted
    assert outcome.again
    killed = stages.outcome_from(stages.Job("measure", None), tmp_path, -signal.SIGKILL, {}, 1.0)
    assert not killed.is_interrupted


@pytest.mark.parametrize(
    ("code", "kind", "steps", "expected"),
    [
        ("RW181", "ConfigError", 0, True),
        ("RW401", "AdapterError", 0, True),
        ("RW562", "RunError", 0, True),
        ("RW502", "RunError", 0, False),
        ("RW201", "DataError", 0, False),
        ("RW181", "ConfigError", 1, False),
    ],
)
def test_a_method_cannot_run_where_training_never_began(
    code: str, kind: str, steps: int, expected: bool, tmp_path: Path
):
    job = stages.Job("train", Cell("lora", 2e-4, 0))
    job.folder(tmp_path).mkdir(parents=True)
    (tmp_path / "cells").mkdir()
    (job.folder(tmp_path) / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n' * steps)
    document = {"error": {"code": code, "kind": kind, "message": "why"}}
    outcome = stages.outcome_from(job, tmp_path, 2, document, 1.0)
    assert outcome.cannot_run == expected
    stages.keep_outcome(job, tmp_path, outcome)
    assert stages.outcome_of(job, tmp_path) == outcome

"""What a run looks like while it goes on."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import types

import pytest
from rich.console import Console

from rankwise.compat.system import WAIT_POLICIES
from rankwise.records import read_metrics
from rankwise.reports.numbers import byte_size, duration
from rankwise.training.watch import StepInfo
from rankwise.verbs.output import LiveProgress, Output, PlainProgress


def info(step: int, loss: float, total: int = 20) -> StepInfo:
    return StepInfo(
        step=step,
        total=total,
        loss=loss,
        tokens_per_second=1234.5,
        memory_bytes=2_100_000_000,
        peak_memory_bytes=2_300_000_000,
        grad_norm=0.84,
        learning_rate=1e-4,
        b_norm=0.132,
        seconds_left=187.0,
    )


def picture(progress: LiveProgress, width: int) -> str:
    console = Console(width=width, force_terminal=True, color_system=None, highlight=False)
    progress.output.console = console
    with console.capture() as captured:
        console.print(progress)
    return captured.get()


def trained(steps: int, evaluations: dict[int, float]) -> LiveProgress:
    progress = LiveProgress(Output())
    progress.phase("Training")
    best = math.inf
    for step in range(1, steps + 1):
        progress.step(info(step, 4 - 2 * step / steps, steps))
        if step in evaluations:
            progress.evaluation(step, evaluations[step], evaluations[step] < best)
            best = min(best, evaluations[step])
    return progress


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("steps", [1, 20, 500])
def test_the_picture_fits_its_terminal(steps, width):
    lines = picture(shown := trained(steps, {steps: 2.5}), width).splitlines()
    assert len(lines) == 3
    assert all(len(line.rstrip()) <= width for line in lines)
    shown.phase("Done")
    assert ("3 min 07 s left" in picture(trained(steps, {}), 120), "left" in picture(shown, 120)) == (True, False)


def test_the_best_evaluation_and_the_last_one_are_shown():
    shown = picture(trained(20, {1: 3.0, 7: 1.5, 12: 2.0, 20: 2.8}), 120).splitlines()[1:3]
    assert [line.strip() for line in shown] == [
        "evaluation at step 7: loss 1.5000 (best so far)",
        "evaluation at step 20: loss 2.8000",
    ]


def test_before_the_first_step_it_shows_the_phase():
    progress = LiveProgress(Output())
    progress.phase("Loading the model")
    assert "Loading the model" in picture(progress, 80)


def test_evaluations_of_rewards_show_rewards(capsys):
    plain, live = PlainProgress(Output(), every=5, of_rewards=True), LiveProgress(Output(), of_rewards=True)
    for progress in (plain, live):
        progress.step(info(1, 0.1, total=2))
        progress.evaluation(1, -0.0, False)
        progress.evaluation(2, -0.75, True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:] == ["evaluation at step 1: reward 0.0000", "evaluation at step 2: reward 0.7500 (best so far)"]
    drawn = picture(live, 80)
    assert "evaluation at step 2: reward 0.7500 (best so far)" in drawn


def test_plain_lines_come_every_few_steps(capsys):
    progress = PlainProgress(Output(), every=5)
    progress.phase("Training")
    for step in range(1, 13):
        progress.step(info(step, float(step), total=12))
    progress.evaluation(12, 2.0, True)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines if line.startswith("step ")] == ["1/12", "5/12", "10/12", "12/12"]
    losses = ["loss 1.0000  ", "loss 3.5000 (mean of 4 steps)  ", "loss 8.0000 (mean of 5 steps)  ", "loss 11.5000 (m"]
    assert all(loss in line for loss, line in zip(losses, lines[1:5], strict=True))
    assert "evaluation at step 12: loss 2.0000 (best so far)" in lines
    assert "1,234 tokens/s  2.10 GB  gradient 0.84  B 0.132  3 min 07 s left" in lines[1]


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (duration(42), "42 s"),
        (duration(8100), "2 h 15 min"),
        (byte_size(512), "512 B"),
        (byte_size(999_960), "1.00 MB"),
        (byte_size(2.1e9), "2.10 GB"),
    ],
)
def test_numbers_and_texts_as_people_read_them(shown, expected):
    assert shown == expected


def test_the_console_shows_the_losses_that_are_logged(rankwise, model_folder, rows_file, tmp_path):
    command = ("--model", model_folder, "--data", rows_file, "--output", tmp_path / "run", "--max-steps", 8)
    done = rankwise("train", *command, "--batch-size", 2, "--r", 2, "--logging-steps", 3, "--device", "cpu")
    assert done.code == 0
    shown = re.findall(r"^step (\d+)/8  loss ([\d.]+)", done.stdout, re.MULTILINE)
    assert shown == [(str(line["step"]), f"{line['loss']:.4f}") for line in read_metrics(tmp_path / "run")]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["device"]["wait_policy"] == {name: os.environ[name] for name in WAIT_POLICIES if name in os.environ}


def test_a_program_that_runs_notebooks_is_not_in_one(monkeypatch):
    """Such a program has ipykernel's modules, but no kernel."""
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert not Output().is_notebook

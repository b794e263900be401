"""What the board finds below a folder, and that nothing in a run folder stops it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from board_folders import write_run
from comparison_folders import HOSTILE, write_comparison

from rankwise.records import load_record
from rankwise.reports.board import comparison_panel, find, overview, run_panels


def test_runs_are_found_at_any_depth_with_the_newest_first(tmp_path):
    for index, name in enumerate(("old", "compare/runs/lora", "new")):
        folder = write_run(tmp_path / name)
        for file in folder.iterdir():
            os.utime(file, (1000 + index, 1000 + index))
    write_run(tmp_path / "old" / "checkpoints" / "step-2")
    write_run(tmp_path / ".hidden")
    runs, comparisons = find(tmp_path)
    assert [run.name for run in runs] == ["new", "compare/runs/lora", "old"]
    assert comparisons == {}
    assert [run.name for run in find(tmp_path / "new")[0]] == ["new"]


def test_a_panel_has_the_figures_the_charts_and_the_answers(tmp_path):
    write_run(tmp_path / "first", steps=20, prompt="What is a list?")
    [panel] = run_panels(find(tmp_path)[0])
    for text in (
        "first",
        "finished",
        "LoRA",
        "20 of 20",
        "3.000 → 2.000 at step 20",
        "1.20 GB of 1.50 GB planned (80%)",
    ):
        assert text in panel, text
    assert panel.count("<figure>") == 5
    assert panel.index("answer at step 20") < panel.index("answer at step 10")
    assert 'class="limit"' in panel
    memory = panel.partition("Peak memory")[2].partition("</figure>")[0]
    assert 'class="tick">0.0<' in memory


def test_rewards_are_not_called_losses(tmp_path):
    folder = write_run(tmp_path / "first")
    record = load_record(folder)
    record.objective = "grpo"
    record.save(folder)
    (folder / "metrics.jsonl").write_text('{"step": 0, "eval_loss": -0.25}\n{"step": 10, "eval_loss": -0.5}\n')
    [panel] = run_panels(find(tmp_path)[0])
    assert "reward 0.2500 → 0.5000 at step 10" in panel
    assert "per token" not in panel


def test_two_runs_share_their_scales(tmp_path):
    write_run(tmp_path / "short", steps=10)
    write_run(tmp_path / "long", steps=40)
    panels = run_panels(find(tmp_path)[0])
    ticks = [[part.split("<")[0] for part in panel.split('class="tick">')[1:]] for panel in panels]
    assert ticks[0] == ticks[1]


@pytest.mark.parametrize("cut", [2, 7, 30])
def test_a_half_written_line_is_left_out(cut, tmp_path):
    folder = write_run(tmp_path / "live", steps=6, status="running")
    file = folder / "metrics.jsonl"
    steps = [line for line in file.read_text().splitlines(keepends=True) if '"loss"' in line]
    file.write_text("".join(steps)[:-cut])
    [run] = find(tmp_path)[0]
    assert run.state == "running"
    assert run.problem == ""
    assert "5 of 6" in run_panels([run])[0]


def test_a_damaged_line_is_named_and_what_stands_before_is_shown(tmp_path):
    folder = write_run(tmp_path / "damaged", steps=10)
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").write_text("\n".join([*lines[:6], "{no json", *lines[6:]]) + "\n")
    [run] = find(tmp_path)[0]
    assert len(run.metrics) == 6
    assert "RW501" in run_panels([run])[0]


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"method": 7}', "\x00"])
def test_a_record_that_cannot_be_read_stops_nothing(content, tmp_path):
    write_run(tmp_path / "good")
    (write_run(tmp_path / "bad") / "run.json").write_text(content)
    runs = {run.name: run for run in find(tmp_path)[0]}
    assert runs["bad"].state == "unreadable"
    assert "RW501" in run_panels([runs["bad"], runs["good"]])[0]
    assert "bad" in overview(list(runs.values()))


def test_a_killed_run_is_shown_as_silent(tmp_path):
    folder = write_run(tmp_path / "killed", status="running")
    assert find(tmp_path)[0][0].state == "running"
    for file in folder.iterdir():
        os.utime(file, (time.time() - 600, time.time() - 600))
    assert find(tmp_path)[0][0].state.startswith("silent for 10 min")


def test_a_run_without_a_step_yet_is_shown(tmp_path):
    folder = write_run(tmp_path / "young", status="running")
    (folder / "metrics.jsonl").unlink()
    [panel] = run_panels(find(tmp_path)[0])
    assert "young" in panel
    assert "<figure>" not in panel


@pytest.mark.parametrize("text", HOSTILE)
def test_nothing_hostile_is_markup(text, tmp_path):
    folder = write_run(tmp_path / "hostile", prompt=text, answer=text, warnings=[{"code": text, "message": text}])
    record = json.loads((folder / "run.json").read_text())
    record["base_model"]["name"] = record["data"]["train"]["source"] = text
    (folder / "run.json").write_text(json.dumps(record))
    runs = find(tmp_path)[0]
    shown = run_panels(runs)[0] + overview(runs)
    for tag in ("<script", "<img", "<!--"):
        assert tag not in shown


def test_a_comparison_that_cannot_be_shown_is_named(tmp_path):
    rates = '{"unknown": {"tried": [{"learning_rate": 1e-4, "value": 1.0}, {"learning_rate": 2e-4, "value": 1.0}]}}'
    (tmp_path / "comparison.json").write_text(f'{{"schema": 1, "learning_rates": {rates}}}')
    assert "a part of the comparison is not as expected" in comparison_panel(tmp_path)


def test_200_runs_are_read_once(tmp_path, monkeypatch):
    for index in range(200):
        write_run(tmp_path / f"run-{index}", steps=20)
    assert len(find(tmp_path)[0]) == 200
    monkeypatch.setattr(Path, "read_bytes", lambda self: pytest.fail(f"{self} is read again"))
    began = time.process_time()
    assert len(find(tmp_path)[0]) == 200
    assert time.process_time() - began < 0.5
    assert overview(find(tmp_path)[0]).count("<tr>") == 201


def test_a_comparison_is_its_report(tmp_path):
    write_comparison(tmp_path / "comparison")
    comparisons = find(tmp_path)[1]
    assert list(comparisons) == ["comparison"]
    panel = comparison_panel(comparisons["comparison"])
    assert 'sandbox="allow-scripts" srcdoc="&lt;!doctype html&gt;' in panel
    assert "Recommended" in panel
    (tmp_path / "comparison" / "comparison.json").write_text("{")
    assert "RW593" in comparison_panel(comparisons["comparison"])

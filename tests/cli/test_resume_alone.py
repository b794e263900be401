"""``rankwise train --resume --output DIR``: everything else comes from run.json."""

from __future__ import annotations

import json

import pytest
from safetensors.torch import load_file

from rankwise.records import load_record

UNUSUAL = ["--r", 2, "--lora-dropout", 0.1, "--target-modules", "q_proj,v_proj", "--rank-pattern", "q_proj=1"]
UNUSUAL += ["--batch-size", 3, "--seed", 5, "--layers-to-transform", "0", "--lr-scheduler-type", "constant"]
UNUSUAL += ["--learning-rate", 0.01, "--device", "cpu", "--packing", "--max-length", 64]


@pytest.fixture
def start(rankwise, model_folder, rows_file, tmp_path):
    def call(name, steps, *more):
        command = ("--model", model_folder, "--data", rows_file, "--output", tmp_path / name, "--max-steps", steps)
        done = rankwise("train", *command, *UNUSUAL, *more)
        assert done.code == 0, done.stderr
        return tmp_path / name

    return call


@pytest.fixture
def resume(rankwise):
    return lambda folder, *more: rankwise("train", "--resume", "--output", folder, *more)


def weights(folder):
    return {name: value.tolist() for name, value in load_file(folder / "adapter_model.safetensors").items()}


def change(folder, **settings):
    record = json.loads((folder / "run.json").read_text())
    record["settings"] |= settings
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("overwritten", [False, True])
def test_every_setting_comes_from_the_run(overwritten, start, resume, tmp_path):
    """Also where the run had replaced another one."""
    straight = start("straight", 6)
    run = start("run", 4)
    if overwritten:
        run = start("run", 4, "--overwrite")
    done = resume(run, "--max-steps", 6)
    assert done.code == 0, done.stderr
    assert "Training, resuming from step 4 ..." in done.stdout
    assert "\nstep 6/6  " in done.stdout
    assert weights(run) == weights(straight)
    assert load_record(run).settings["rank_pattern"] == {"q_proj": 1}


def test_a_finished_run_says_how_it_is_lengthened(start, resume):
    done = resume(start("run", 2))
    assert done.code == 0
    assert "warning RW509: " in done.stderr
    assert "a larger --max-steps or --epochs lengthens it" in done.stderr


def test_epochs_lengthen_a_run_of_so_many_steps(start, resume):
    """--max-steps, which the run was started with, would overrule them."""
    run = start("run", 2)
    done = resume(run, "--epochs", 20)
    assert done.code == 0, done.stderr
    assert load_record(run).steps > 2
    assert load_record(run).settings["max_steps"] is None


@pytest.mark.parametrize(("option", "value"), [("--r", 4), ("--learning-rate", 0.1), ("--method", "dora")])
def test_another_setting_is_refused_all_the_same(option, value, start, resume):
    done = resume(start("run", 2), option, value)
    assert (done.code, "RW507" in done.stderr) == (2, True)
    assert f"{option} was " in done.stderr


def test_the_settings_file_may_ask_for_it_too(rankwise, start, tmp_path):
    run = start("run", 2)
    (tmp_path / "run.yaml").write_text(f"resume: true\noutput: {run}\nmax-steps: 3\n")
    assert rankwise("train", "--config", tmp_path / "run.yaml").code == 0
    assert load_record(run).steps == 3


def test_without_a_run_there_is_nothing_to_take(resume, tmp_path):
    assert "error RW505: " in resume(tmp_path / "none").stderr
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "run.json").write_text("[]")
    assert "error RW504: " in resume(tmp_path / "foreign").stderr


def test_code_of_a_hub_repository_runs_on_request_alone(start, resume):
    run = start("run", 2)
    change(run, trust_remote_code=True, no_such_setting=1)
    assert resume(run, "--max-steps", 3).code == 0
    assert load_record(run).settings["trust_remote_code"] is False


def test_a_damaged_setting_is_a_mistake_in_the_input(start, resume):
    run = start("run", 2)
    change(run, learning_rate=["high"])
    done = resume(run)
    assert done.code == 2
    assert "error RW103: --learning-rate is ['high']" in done.stderr


def test_data_that_a_moved_run_names_are_asked_for(start, resume, rows_file, tmp_path):
    run = start("run", 2)
    change(run, data="rows.jsonl")
    done = resume(run.rename(tmp_path / "moved"))
    assert "error RW201: there is no file or folder rows.jsonl, which the run took as --data; give it " in done.stderr
    assert resume(tmp_path / "moved", "--data", rows_file).code == 0

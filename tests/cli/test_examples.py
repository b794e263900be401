"""The example scripts run as they stand, on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_there_is_a_test_for_every_example():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "plain_loop.py",
        "with_trl.py",
        "merge_peft_adapter.py",
    }


@pytest.mark.parametrize("arguments", [[], ["a model alone"]])
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_an_example_without_its_arguments_prints_its_usage(script, arguments):
    command = [sys.executable, str(ROOT / "examples" / script), *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert f"usage: {script}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("script", ["plain_loop.py", "with_trl.py"])
def test_training_examples_leave_an_adapter_that_merges(script, model_folder, tmp_path):
    assert "a PEFT adapter is in" in run(script, model_folder, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    said = run("merge_peft_adapter.py", model_folder, tmp_path / "adapter", tmp_path / "merged")
    assert float(said.split("after merging: ")[1].split()[0]) < 1e-4
    assert (tmp_path / "merged" / "model.safetensors").is_file()

"""The example scripts run as they are, on a tiny model."""

from __future__ import annotations

import json
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from rankwise.cli.main import COMMANDS
from rankwise.cli.options import options_of
from rankwise.options import read_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """An example with these arguments, as a script; what it printed."""

    def call(script: str, *arguments: object) -> str:
        path = str(ROOT / "examples" / script)
        monkeypatch.setattr(sys, "argv", [path, *map(str, arguments)])
        runpy.run_path(path, run_name="__main__")
        return capsys.readouterr().out

    return call


def test_there_is_a_test_for_every_example():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == {
        "plain_loop.py",
        "with_trl.py",
        "merge_peft_adapter.py",
    }


@pytest.mark.parametrize("arguments", [[], ["a model alone"]])
@pytest.mark.parametrize("script", sorted(path.name for path in (ROOT / "examples").glob("*.py")))
def test_an_example_without_its_arguments_prints_its_usage(script, arguments, run, capsys):
    with pytest.raises(SystemExit) as ended:
        run(script, *arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert f"usage: {script}" in said
    assert "Traceback" not in said


@pytest.mark.parametrize("script", ["plain_loop.py", "with_trl.py"])
def test_training_examples_leave_an_adapter_that_merges(script, model_folder, tmp_path, run):
    assert "a PEFT adapter is in" in run(script, model_folder, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    said = run("merge_peft_adapter.py", model_folder, tmp_path / "adapter", tmp_path / "merged")
    assert float(said.split("after merging: ")[1].split()[0]) < 1e-4
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_the_commands_of_the_notebook_have_options_that_exist():
    """The notebook is for a service with a card; here each command is read as the command line reads it."""
    notebook = json.loads((ROOT / "examples" / "free_gpu.ipynb").read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    [file] = [text.partition("\n")[2] for text in cells if text.startswith("%%writefile run.yaml\n")]
    lines = [line for text in cells for line in text.split("\n") if line.startswith("!rankwise ")]
    commands = [shlex.split(line)[1:] for line in lines]
    known = {command.name: command for command in COMMANDS}
    assert {words[0] for words in commands} == {"doctor", "plan", "preview", "train", "generate", "merge", "export"}
    for name, *words in commands:
        kinds = {option.flag: option.kind for option in options_of(known[name])} | {"config": "value"}
        given = {}
        while words:
            flag = words.pop(0).removeprefix("--")
            given[flag.replace("-", "_")] = True if kinds[flag] == "switch" else words.pop(0)
        if given.pop("config", None) == "run.yaml":
            given |= {key.replace("-", "_"): value for key, value in yaml.safe_load(file).items()}
        assert read_settings(known[name].settings, None, given)

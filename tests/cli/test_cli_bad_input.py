"""Bad input that reaches the command line: exit 2, one line, nothing written and nothing overwritten."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest


def snapshot(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def refuses(rankwise, tmp_path):
    """Run a command that must fail for the user's fault; everything in ``tmp_path`` stays as it was."""

    def call(code, *arguments, said=""):
        before = snapshot(tmp_path)
        done = rankwise(*arguments)
        assert done.code == 2, done.stderr
        errors = [line for line in done.stderr.splitlines() if line.startswith("error ")]
        assert errors == done.stderr.splitlines()[-1:]
        assert errors[0].startswith(f"error {code}: ")
        assert said in errors[0]
        assert "Traceback" not in done.stderr
        assert snapshot(tmp_path) == before

    return call


@pytest.fixture
def command(model_folder, rows_file, tmp_path):
    """``train`` with good input, of which a test spoils one."""

    def build(**changed):
        given = {"model": model_folder, "data": rows_file, "output": tmp_path / "run", "max-steps": 1, "r": 2}
        return ["train", *(part for key, value in {**given, **changed}.items() for part in (f"--{key}", value))]

    return build


def test_missing_options_are_named_together(refuses):
    refuses("RW103", "train", said="--model is missing; --data is missing; --output is missing")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("learning-rate", "inf"),
        ("lora-alpha", "nan"),
        ("method", "loar"),
        ("r", 0),
        ("r", -4),
        ("r", "x"),
        ("lora-dropout", 1),
        ("dtype", "int3"),
        ("max-steps", 0),
    ],
)
def test_a_value_out_of_range(option, value, command, refuses):
    refuses("RW103", *command(**{option: value}), said=f"--{option} is '{value}'")


@pytest.mark.parametrize(
    ("command", "option", "meant"),
    [
        ("train", "lr", "--learning-rate"),
        ("compare", "lr", "--learning-rates"),
        ("train", "lora-r", "--r"),
        ("train", "per_device_train_batch_size", "--batch-size"),
        ("train", "num-train-epochs", "--epochs"),
        ("train", "dataset", "--data"),
        ("train", "learning-rat", "--learning-rate"),
        ("generate", "max-tokens", "--max-new-tokens"),
    ],
)
def test_an_option_of_another_tool_is_translated(command, option, meant, refuses):
    refuses("RW120", command, f"--{option}", 1, said=f"no such option: --{option}, did you mean {meant}?")


def test_another_tools_names_are_translated_in_files_and_values(command, refuses, tmp_path):
    (tmp_path / "run.yaml").write_text("num_train_epochs: 3\n")
    refuses("RW103", *command(config=tmp_path / "run.yaml"), said="did you mean --epochs?")
    refuses("RW110", *command(optimizer="adam"), said="the closest are adamw_torch.")
    refuses("RW110", *command(optimizer="adamm"), said="the closest are adamw_torch")


def test_what_is_translated_exists():
    from transformers.training_args import OptimizerNames

    from rankwise.cli.main import COMMANDS
    from rankwise.cli.options import options_of
    from rankwise.options import OPTIMIZERS, OPTIONS

    assert set(OPTIONS) <= {option.flag for command in COMMANDS for option in options_of(command)}
    assert set(OPTIMIZERS) <= {item.value for item in OptimizerNames}


@pytest.mark.parametrize(
    ("name", "content", "code", "said"),
    [
        ("empty.jsonl", b"", "RW204", "empty.jsonl"),
        ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n', "RW203", "line 2"),
        ("rows.csv", "mr,ref\nname[Café],Ein Café\n".encode("latin-1"), "RW205", "rows.csv"),
    ],
)
def test_bad_data(name, content, code, said, command, refuses, tmp_path):
    (tmp_path / name).write_bytes(content)
    refuses(code, *command(data=tmp_path / name), said=said)


def test_compare_without_an_adapter(refuses, model_folder):
    refuses("RW121", "generate", "--model", model_folder, "--prompt", "x", "--compare")


def test_generate_without_a_tokenizer(refuses, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    refuses("RW115", "generate", "--model", tmp_path / "model", "--prompt", "x")


def test_inspect_what_is_no_folder(refuses, tmp_path):
    refuses("RW560", "inspect", tmp_path / "none", said="no files")
    (tmp_path / "file").write_text("x")
    refuses("RW560", "inspect", tmp_path / "file", said="no files")


def test_inspect_a_folder_of_something_else(refuses, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    refuses("RW560", "inspect", tmp_path, said="thesis.tex")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "cannot read the settings file"),
        (b"method: lora\n  r: [1\n", "is not YAML (mapping values are not allowed here"),
        (b"method: caf\xe9\n", "is not YAML ('utf-8'"),
    ],
)
def test_a_settings_file_that_cannot_be_read(content, said, command, refuses, tmp_path):
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    refuses("RW102", *command(config=tmp_path / "run.yaml"), said=said)


def test_prompts_end_with_the_table_of_positions(refuses, rankwise, command, gpt2_folder, tmp_path):
    """12 positions over bytes; without the check the embedding raises an IndexError."""
    refuses("RW533", "generate", "--model", gpt2_folder, "--prompt", "x" * 13, said="13 tokens")
    done = rankwise("generate", "--model", gpt2_folder, "--prompt", "x" * 12)
    assert (done.code, "RW256" in done.stderr) == (0, True)


def test_an_adapter_without_weights_is_refused_before_its_base_is_loaded(run_folder, refuses, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    (broken / "adapter_model.safetensors").unlink()
    monkeypatch.setattr("rankwise.models.load_model", lambda *_, **__: pytest.fail("the base was loaded"))
    refuses("RW409", "generate", "--adapter", broken, "--prompt", "x", said="holds no adapter_model.safetensors")

"""Bad input that reaches the command line: exit 2, one line, nothing written and nothing overwritten."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file


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


def test_a_target_that_matches_nothing(command, refuses):
    refuses("RW401", *command(**{"target-modules": "q_prj,v_prj"}), said="q_proj")


def test_no_such_model(command, refuses):
    refuses("RW301", *command(model="/no/such/model"))


def test_a_model_folder_without_weights(command, refuses, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    refuses("RW305", *command(model=tmp_path / "model"))


def test_truncated_weights(command, refuses, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    refuses("RW306", *command(model=tmp_path / "model"), said="model.safetensors")


def test_a_pickle_instead_of_safetensors(command, refuses, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").rename(tmp_path / "model" / "pytorch_model.bin")
    refuses("RW307", *command(model=tmp_path / "model"), said="pickle")


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


def test_no_such_data(command, refuses, tmp_path):
    refuses("RW201", *command(data=tmp_path / "none.jsonl"), said="none.jsonl")


def test_an_output_that_holds_a_run(command, refuses, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    refuses("RW502", *command(), said="--resume")


def test_an_output_that_holds_something_else(command, refuses, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("mine")
    refuses("RW504", *command())


def test_an_output_that_cannot_be_written(command, refuses, tmp_path):
    (tmp_path / "locked").mkdir()
    (tmp_path / "locked").chmod(0o500)
    refuses("RW503", *command(output=tmp_path / "locked" / "run"))


def test_resuming_with_other_settings_names_them(command, refuses, run_folder, rows_file, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    changed = {"max-steps": 2, "batch-size": 2, "eval-data": rows_file, "learning-rate": 0.02, "seed": 3}
    refuses("RW507", *command(**changed), "--resume", said="--learning-rate was 0.01 and is 0.02")


def test_nothing_to_resume(command, refuses):
    refuses("RW505", *command(), "--resume")


@pytest.fixture
def adapter(run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.mark.parametrize("command", ["generate", "merge", "inspect"])
class TestHostileAdapters:
    """The three commands that read an adapter say the same about it."""

    @pytest.fixture
    def reads(self, command, refuses, adapter, model_folder, tmp_path):
        arguments = {
            "generate": ("--adapter", adapter, "--prompt", "x"),
            "merge": ("--adapter", adapter, "--output", tmp_path / "merged"),
            "inspect": (adapter,),
        }
        return lambda code, said="": refuses(code, command, *arguments[command], said=said)

    def test_truncated(self, reads, adapter):
        path = adapter / "adapter_model.safetensors"
        path.write_bytes(path.read_bytes()[:-10])
        reads("RW409", "adapter_model.safetensors")

    def test_a_pickle(self, reads, adapter):
        (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
        reads("RW409", "pickle")

    def test_no_json(self, reads, adapter):
        (adapter / "adapter_config.json").write_text("{")
        reads("RW409", "adapter_config.json")

    def test_a_field_that_would_change_the_result(self, reads, adapter):
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_qalora": True}))
        reads("RW410", "use_qalora")

    def test_a_damaged_record(self, reads, adapter):
        (adapter / "run.json").write_text("[")
        reads("RW501", "run.json")


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_an_adapter_for_another_base_lists_every_tensor(command, refuses, adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    wrong = [key for key in tensors if "lora_A" in key]
    save_file({key: value[:, :-1].contiguous() if key in wrong else value for key, value in tensors.items()}, path)
    rest = ("--prompt", "x") if command == "generate" else ("--output", tmp_path / "merged")
    for key in wrong:
        refuses("RW411", command, "--adapter", adapter, *rest, said=key)


def test_generate_with_nothing_to_generate_with(refuses):
    refuses("RW121", "generate", "--prompt", "x")


def test_compare_without_an_adapter(refuses, model_folder):
    refuses("RW121", "generate", "--model", model_folder, "--prompt", "x", "--compare")


def test_generate_without_a_tokenizer(refuses, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model", ignore=shutil.ignore_patterns("*token*", "*.jinja"))
    refuses("RW115", "generate", "--model", tmp_path / "model", "--prompt", "x")


def test_preview_of_a_row_that_is_not_there(refuses, model_folder, rows_file):
    refuses("RW217", "preview", "--model", model_folder, "--data", rows_file, "--row", 12)


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
        (None, "there is no settings file"),
        (b"method: lora\n  r: [1\n", "is not YAML: mapping values are not allowed here, line 2, column 4"),
        (b"method: caf\xe9\n", "is not UTF-8"),
    ],
)
def test_a_settings_file_that_cannot_be_read(content, said, command, refuses, tmp_path):
    if content is not None:
        (tmp_path / "run.yaml").write_bytes(content)
    refuses("RW102", *command(config=tmp_path / "run.yaml"), said=said)


def test_prompts_end_with_the_table_of_positions(refuses, rankwise, command, gpt2_folder, tmp_path):
    """12 positions over bytes; without the check the embedding raises an IndexError."""
    refuses("RW533", "generate", "--model", gpt2_folder, "--prompt", "x" * 13, "--raw", said="13 tokens")
    done = rankwise("generate", "--model", gpt2_folder, "--prompt", "x" * 12, "--raw")
    assert (done.code, "RW256" in done.stderr) == (0, True)
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "a ", "completion": "b"}) + "\n")
    data = dict.fromkeys(("data", "eval-data"), tmp_path / "rows.jsonl")
    long = {"model": gpt2_folder, **data, "sample-prompt": "x" * 13}
    done = rankwise(*command(**long))
    assert done.code == 2
    assert "RW533" in done.stderr.splitlines()[-1]


def test_an_adapter_without_weights_is_refused_before_its_base_is_loaded(run_folder, refuses, tmp_path, monkeypatch):
    broken = tmp_path / "broken"
    shutil.copytree(run_folder, broken)
    (broken / "adapter_model.safetensors").unlink()
    monkeypatch.setattr("rankwise.models.load_model", lambda *_, **__: pytest.fail("the base was loaded"))
    refuses("RW409", "generate", "--adapter", broken, "--prompt", "x", said="holds no adapter_model.safetensors")

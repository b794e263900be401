"""A download that was cut short, and a page in the place of a file: one coded line that is no fault of ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from rankwise.cli.main import main
from rankwise.errors import RunError
from rankwise.records import load_record, read_metrics
from rankwise.training.checkpoints import _write_manifest

TRAIN = ("--max-steps", 2, "--save-steps", 1, "--logging-steps", 1, "--batch-size", 2, "--r", 2)
PAGE = b"<!DOCTYPE html><html><body>404: not found</body></html>\n"


@pytest.fixture(scope="module")
def sharded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


# Fixture, file in it, and the command that reads it.
GENERATE = ("generate", "--prompt", "Hi", "--max-new-tokens", 2)
CASES = (
    ("run_folder", "run.json", (*GENERATE, "--adapter")),
    ("run_folder", "adapter_config.json", (*GENERATE, "--adapter")),
    ("run_folder", "adapter_model.safetensors", (*GENERATE, "--adapter")),
    ("model_folder", "tokenizer_config.json", (*GENERATE, "--model")),
    ("model_folder", "config.json", (*GENERATE, "--model")),
    ("model_folder", "model.safetensors", (*GENERATE, "--model")),
    ("model_folder", "tokenizer.json", (*GENERATE, "--model")),
    ("model_folder", "generation_config.json", (*GENERATE, "--model")),
    ("sharded", "model.safetensors.index.json", (*GENERATE, "--model")),
)


@pytest.mark.parametrize("damage", ["cut", "page"])
@pytest.mark.parametrize(("source", "name", "command"), CASES, ids=[name for _, name, _ in CASES])
def test_a_damaged_file_is_refused_by_code(source, name, command, damage, request, rankwise, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(request.getfixturevalue(source), folder)
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(PAGE if damage == "page" else content[: len(content) // 2])
    done = rankwise(*command, folder)
    assert done.code == 2, done.stderr
    assert "error RW" in done.stderr
    assert "RW550" not in done.stderr


@pytest.fixture(scope="module")
def stopped(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that stopped after the first of its two steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    words = ["train", "--model", model_folder, "--data", rows_file, "--output", folder, *TRAIN]
    assert main([str(word) for word in words]) == 0
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    shutil.rmtree(folder / "checkpoints" / "step-2")
    return folder


@pytest.mark.parametrize(
    "name",
    ["random-0.json", "optimizer.safetensors", "optimizer.json", "progress.json", "adapter_model.safetensors"],
)
def test_a_damaged_checkpoint_is_refused_by_code(name, rankwise, stopped, tmp_path):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "step-1" / name).write_bytes(PAGE)
    # As if the page had been saved.
    _write_manifest(tmp_path / "run" / "checkpoints" / "step-1", 1)
    done = rankwise("train", "--resume", "--output", tmp_path / "run")
    assert done.code == 2, done.stderr
    assert "error RW" in done.stderr


@pytest.mark.parametrize("command", ["generate", "merge", "evaluate"])
def test_a_missing_shard(command, rankwise, sharded, run_folder, rows_file, tmp_path):
    shutil.copytree(sharded, tmp_path / "model")
    sorted((tmp_path / "model").glob("*.safetensors"))[1].unlink()
    given = {
        "generate": ("--prompt", "Hi"),
        "merge": ("--adapter", run_folder, "--output", tmp_path / "out"),
        "evaluate": ("--task", "perplexity", "--data", rows_file, "--output", tmp_path / "out"),
    }
    done = rankwise(command, "--model", tmp_path / "model", *given[command])
    assert done.code == 2
    assert "error RW305: " in done.stderr or "error RW306: " in done.stderr
    assert "-of-0" in done.stderr


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", [-1, 5]),
        ("modules_to_save", [None]),
        ("rank_pattern", {"(?i)q_proj": "x"}),
        ("use_dora", "yes"),
    ],
)
def test_an_adapter_setting_of_another_type_is_named(field, value, rankwise, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    done = rankwise("inspect", tmp_path / "run")
    assert done.code == 2
    assert "error RW410: " in done.stderr
    assert field in done.stderr


@pytest.mark.parametrize(("field", "value"), [("base_model", []), ("data", {"train": []})])
def test_a_record_of_other_types_is_named_by_field(field, value, tmp_path):
    record = {"method": "lora", "seed": 0, "settings": {}, field: value}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=f"RW501: .*{field}"):
        load_record(tmp_path)


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\n{"step": 2, "loss": 1}\n')
    with pytest.raises(RunError, match="RW501: .*line 2"):
        list(read_metrics(tmp_path))


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_a_model_that_computes_nan_says_so(command, rankwise, model_folder, rows_file, tmp_path):
    """Its weights are sound: a number in the configuration is not."""
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 0, "rope_theta": 10000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    given = {
        "generate": ("--prompt", "Hi"),
        "evaluate": ("--task", "perplexity", "--data", rows_file, "--output", tmp_path / "out"),
    }
    done = rankwise(command, "--model", tmp_path / "model", *given[command])
    assert done.code == 2
    assert "error RW323: " in done.stderr

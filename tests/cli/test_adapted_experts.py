"""Adapters on stacked experts by the command line: planned, trained by the saved plan, inspected, merged."""

from __future__ import annotations

import json

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tiny_models import save_with_tokenizer, tiny_moe

TARGETS = ("--target-modules", "", "--target-parameters", "experts.gate_up_proj,experts.down_proj")


@pytest.fixture(scope="module")
def experts_folder(model_folder, tmp_path_factory):
    vocabulary = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    model = tiny_moe("qwen3_moe", vocab_size=vocabulary, moe_intermediate_size=32)
    return save_with_tokenizer(model, model_folder, tmp_path_factory.mktemp("tiny-moe"))


def test_the_plan_has_a_row_for_what_trains_them(rankwise, experts_folder, tmp_path):
    sizes = ("--memory", "8GB", "--max-length", 64, "--save", tmp_path / "plan.yaml", "--json")
    done = rankwise("plan", "--model", experts_folder, *sizes, *TARGETS)
    assert done.code == 0
    methods = done.document["methods"]
    assert methods["lora"]["trainable_parameters"] == 2 * 8 * 16 * (32 + 64 + 32 + 32)
    assert methods["qlora"]["fits"]
    for name in ("dora", "qdora"):
        assert methods[name]["failure"]["code"] == "RW101"
        assert "target_parameters" in methods[name]["failure"]["message"]
    assert done.document["recommendation"]["serving"][2].endswith("not tried there")
    saved = yaml.safe_load((tmp_path / "plan.yaml").read_text())
    assert saved["target-parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    assert saved["target-modules"] == []


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_from_training_to_the_merged_model(rankwise, experts_folder, rows_file, tmp_path, method):
    run = ("--output", tmp_path / "run", "--max-steps", 2, "--batch-size", 4, "--block-size", 32)
    options = ("--device", "cpu", "--gradient-checkpointing", "--method", method)
    run = run if method == "qlora" else run[:-2]
    done = rankwise("train", "--model", experts_folder, "--data", rows_file, *run, *options, *TARGETS, "--r", 2)
    assert done.code == 0, done.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["trainable_parameters"] == 2 * 8 * 2 * (32 + 64 + 32 + 32)
    done = rankwise("inspect", tmp_path / "run", "--model", experts_folder, "--json")
    assert done.document["fits"]["shapes"]
    assert done.document["target_parameters"] == ["experts.gate_up_proj", "experts.down_proj"]
    assert done.document["norm_of_B"]["total"] > 0
    done = rankwise("merge", "--adapter", tmp_path / "run", "--output", tmp_path / "merged", "--verify", "--json")
    assert done.code == 0, done.stderr
    assert done.document["merged_modules"] == 4


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_resumed_run_is_the_straight_one(rankwise, experts_folder, rows_file, tmp_path, method):
    def train(into, steps, *more):
        run = ("--output", tmp_path / into, "--max-steps", steps, "--lr-scheduler-type", "constant", *more)
        options = ("--device", "cpu", "--method", method, "--r", 2, "--target-modules", "q_proj", *TARGETS[2:])
        options += ("--block-size", 32) if method == "qlora" else ()
        done = rankwise("train", "--model", experts_folder, "--data", rows_file, *run, *options)
        assert done.code == 0, done.stderr
        return load_file(tmp_path / into / "adapter_model.safetensors")

    straight = train("straight", 4)
    train("parts", 2)
    parts = train("parts", 4, "--resume")
    assert any("experts" in name for name in straight)
    assert straight.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in straight.items())


def test_dora_is_refused_before_anything_is_read(rankwise, experts_folder, rows_file, tmp_path):
    where = ("--model", experts_folder, "--data", rows_file, "--output", tmp_path / "run")
    done = rankwise("train", *where, "--method", "dora", *TARGETS)
    assert done.code == 2
    assert "RW101" in done.stderr
    assert not (tmp_path / "run").exists()

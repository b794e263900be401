"""A gpt-oss whose files hold MXFP4, by the command line: planned, trained, resumed, evaluated, merged."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.errors import ConfigError
from rankwise.models import fetch_model
from rankwise.models.load import load_model
from rankwise.quantization.experts import four_bit_stacks
from rankwise.training.setup import check_model
from tiny_models import save_in_mxfp4, save_with_tokenizer, tiny_moe

TARGETS = ("--target-modules", "q_proj", "--target-parameters", "experts.gate_up_proj,experts.down_proj", "--r", 2)


@pytest.fixture(scope="module")
def folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    vocabulary = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    model = tiny_moe("gpt_oss", vocab_size=vocabulary, hidden_size=64, intermediate_size=96).bfloat16()
    made = save_with_tokenizer(model, model_folder, tmp_path_factory.mktemp("gpt-oss"))
    return save_in_mxfp4(model, made)


@pytest.mark.parametrize("method", ["lora", "qlora"])
def test_a_run_learns_resumes_as_it_would_have_gone_on_and_merges(rankwise, folder, rows_file, tmp_path, method):
    def train(into: Path, steps: int, *more: object) -> dict[str, torch.Tensor]:
        run = ("--output", into, "--max-steps", steps, "--batch-size", 4, "--device", "cpu", "--method", method)
        of_rate = ("--learning-rate", 1e-2, "--lr-scheduler-type", "constant")
        done = rankwise("train", "--model", folder, "--data", rows_file, *run, *TARGETS, *of_rate, *more)
        assert done.code == 0, done.stderr
        assert "RW179" not in done.stderr
        return load_file(into / "adapter_model.safetensors")

    straight = train(tmp_path / "straight", 4)
    train(tmp_path / "parts", 2)
    parts = train(tmp_path / "parts", 4, "--resume")
    assert straight.keys() == parts.keys()
    assert all(torch.equal(tensor, parts[name]) for name, tensor in straight.items())
    losses = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in losses if "loss" in line]
    assert losses[-1] < losses[0]
    done = rankwise("merge", "--adapter", tmp_path / "straight", "--output", tmp_path / "merged")
    assert done.code == 2
    assert "RW309" in done.stderr
    assert "--onto quantized" in done.stderr
    onto = ("--onto", "quantized", "--output", tmp_path / "merged", "--json")
    done = rankwise("merge", "--adapter", tmp_path / "straight", *onto)
    assert done.code == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    config = None if method == "lora" else rw.Nf4Config(double_quant=True)
    adapted, _ = load_model(str(folder), dtype=torch.float32, quantization=config)
    rw.load_adapter(adapted, tmp_path / "straight")
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        wanted, base = adapted(ids).logits, load_model(str(folder), dtype=torch.float32)[0](ids).logits
        off, moved = merged(ids).logits - wanted, wanted - base
    # The merged weights are rounded to bfloat16.
    assert off.norm() < 0.1 * moved.norm()


def test_the_plan_counts_the_experts_as_the_file_has_them(rankwise, folder):
    command = (
        "plan",
        "--model",
        folder,
        "--memory",
        "8GB",
        "--max-length",
        64,
        "--method",
        "lora,qlora",
        "--dtype",
        "bfloat16",
        "--json",
        *TARGETS,
    )
    document = rankwise(*command).document
    model, _ = load_model(str(folder))
    packed = sum(stack.codes.nbytes + stack.scales.absmax.nbytes for _, stack in four_bit_stacks(model))
    dense = sum(W.nbytes for W in model.parameters() if W.is_floating_point())
    lora = document["methods"]["lora"]["breakdown"]
    assert lora["weights_4bit"] == packed
    assert abs(lora["weights"] - dense) < 0.02 * dense
    qlora = document["methods"]["qlora"]["breakdown"]
    assert packed < qlora["weights_4bit"] < packed + dense / 3
    assert qlora["weights"] < lora["weights"]
    assert any("MXFP4" in note for note in document["methods"]["lora"]["notes"])


def test_training_it_whole_and_parting_it_is_refused(rankwise, folder, rows_file, tmp_path):
    where = ("--data", rows_file, "--output", tmp_path / "run", "--device", "cpu")
    done = rankwise("train", "--model", folder, *where, "--method", "full")
    assert done.code == 2
    assert "RW112" in done.stderr
    source = fetch_model(str(folder))
    base = SimpleNamespace(strategy="fsdp", device="cpu", method="lora", trust_remote_code=False)
    with pytest.raises(ConfigError, match="RW112.*MXFP4"):
        check_model(source, base, rw.LoraConfig())
    document = rankwise("plan", "--model", folder, "--max-length", 64, "--method", "lora,full", "--json").document
    assert document["methods"]["full"]["failure"]["code"] == "RW112"
    assert document["recommendation"]["method"] == "lora"

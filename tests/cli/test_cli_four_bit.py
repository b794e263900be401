"""The commands on a model folder that holds 4-bit weights, and on a 4-bit run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.cli import generate
from rankwise.cli.settings import GenerateSettings
from rankwise.models import load_model, model_facts, resolve_model
from rankwise.quantization import Linear4bit, Nf4Config
from rankwise.quantization.experts import four_bit_stacks
from rankwise.records import RunRecord
from tiny_models import tiny_moe


@pytest.fixture
def packed_folder(model_folder: Path, tmp_path: Path) -> Path:
    """The tiny model in NF4, with its tokenizer."""
    model, tokenizer = load_model(str(model_folder), quantization=Nf4Config(double_quant=True))
    model.save_pretrained(tmp_path / "packed")
    tokenizer.save_pretrained(tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def packed_run(packed_folder: Path, tmp_path: Path) -> Path:
    """A run whose base was that folder."""
    model, _ = load_model(str(packed_folder))
    facts = model_facts(model, resolve_model(str(packed_folder)))
    rw.add_adapter(model, rw.LoraConfig(r=2, init_lora_weights=False))
    rw.save_adapter(model, tmp_path / "run", base_model=str(packed_folder))
    RunRecord("qlora", 0, {"model": "packed"}, base_model=facts).save(tmp_path / "run")
    return tmp_path / "run"


def test_inspect_says_whether_an_adapter_fits_a_4_bit_base(packed_run, packed_folder, rankwise):
    assert rankwise("inspect", packed_run, "--model", packed_folder, "--json").document["fits"]["shapes"] is True


@pytest.mark.parametrize(("wish", "four_bit"), [("auto", True), ("none", False)])
@pytest.mark.parametrize("adapted", [False, True])
def test_generate_without_quantization_means_it(wish, four_bit, adapted, packed_run, packed_folder):
    adapter = packed_run if adapted else None
    settings = GenerateSettings(prompt=("Hi",), model=str(packed_folder), adapter=adapter, quantization=wish)
    speaker, _ = generate.load_speaker(settings, str(packed_folder), generate.record_of(adapter))
    assert any(isinstance(module, Linear4bit) for module in speaker.model.modules()) is four_bit
    assert speaker.adapted is adapted


def test_a_run_is_found_by_its_record_from_any_directory(packed_run, rankwise, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = rankwise("generate", "--adapter", packed_run, "--prompt", "Hi", "--max-new-tokens", 2)
    assert done.code == 0
    assert "RW324" not in done.stderr


def test_merge_verifies_and_merges_onto_what_the_folder_holds(packed_run, rankwise, tmp_path):
    done = rankwise("merge", "--adapter", packed_run, "--output", tmp_path / "merged", "--verify", "--json")
    assert done.code == 0
    assert done.document["onto"] == "quantized"
    names = [variant["name"] for variant in done.document["verification"]["variants"]]
    assert "merged onto the original" not in names
    assert json.loads((tmp_path / "merged" / "merge.json").read_text())["onto"] == "quantized"
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, Linear4bit) for module in merged.modules())


def test_merge_without_a_choice_has_no_original(packed_run, rankwise, tmp_path):
    done = rankwise("merge", "--adapter", packed_run, "--output", tmp_path / "merged")
    assert done.code == 2
    assert "RW309" in done.stderr


def test_merge_says_that_the_base_is_another_one(run_folder, model_folder, rankwise, tmp_path):
    shutil.copytree(model_folder, tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        model.lm_head.weight.add_(1)
    model.save_pretrained(tmp_path / "other")
    command = ("merge", "--adapter", run_folder, "--output")
    assert "RW415" in rankwise(*command, tmp_path / "a", "--model", tmp_path / "other").stderr
    assert "RW415" not in rankwise(*command, tmp_path / "b").stderr


@pytest.mark.parametrize("command", ["generate", "merge"])
def test_the_recorded_commit_is_used(command, run_folder, model_folder, rankwise, tmp_path, monkeypatch):
    shutil.copytree(run_folder, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["base_model"] |= {"kind": "hub", "name": "org/base", "revision": "c0ffee"}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    asked = []

    def download(repo, *, revision, code, weights):
        asked.append((repo, revision))
        return model_folder

    monkeypatch.setattr("rankwise.models.source.download", download)
    rest = ("--prompt", "Hi") if command == "generate" else ("--output", tmp_path / "merged")
    assert rankwise(command, "--adapter", tmp_path / "run", *rest).code == 0
    assert asked[0] == ("org/base", "c0ffee")


@pytest.fixture
def moe_folder(model_folder: Path, tmp_path: Path) -> Path:
    """A mixture of experts of random weights with the tiny model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tiny_moe("qwen3_moe", vocab_size=len(tokenizer), max_position_embeddings=512).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    return tmp_path / "moe"


def test_a_mixture_of_experts_from_training_to_a_merged_model(moe_folder, rows_file, rankwise, tmp_path):
    run, merged = tmp_path / "run", tmp_path / "merged"
    command = ["train", "--model", moe_folder, "--data", rows_file, "--eval-data", rows_file, "--method", "qlora"]
    steps = ["--max-steps", 2, "--batch-size", 2, "--r", 2, "--learning-rate", 0.01, "--dtype", "float32"]
    done = rankwise(*command, "--output", run, *steps, "--gradient-checkpointing")
    assert done.code == 0, done.stderr
    assert "RW613" not in done.stderr
    record = json.loads((run / "run.json").read_text())
    assert record["base_model"]["quantization"]["quant_type"] == "nf4"
    parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(moe_folder).parameters())
    assert record["base_model"]["parameters"] == parameters
    model, _ = load_model(str(moe_folder), dtype=torch.float32, quantization=Nf4Config(double_quant=True))
    assert len(list(four_bit_stacks(model))) == 4
    rw.load_adapter(model, run)
    assert rankwise("merge", "--adapter", run, "--output", merged, "--onto", "quantized").code == 0
    ids = torch.tensor([[5, 9, 40, 41, 42, 7]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        found = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)(input_ids=ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    assert rankwise("generate", "--adapter", run, "--prompt", "Hi", "--max-new-tokens", 2).code == 0


def test_a_plan_of_qlora_holds_experts_in_4_bits(moe_folder, rankwise):
    document = rankwise("plan", "--model", moe_folder, "--json").document
    weights = {
        method: sum(entry["breakdown"][term] for term in ("weights", "weights_4bit"))
        for method, entry in document["methods"].items()
    }
    assert 0 < weights["qlora"] < 0.6 * weights["lora"]

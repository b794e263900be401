"""The commands on a model folder that holds 4-bit weights, and on a 4-bit run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.cli import generate
from rankwise.models import load_model, model_facts, resolve_model
from rankwise.quantization import Linear4bit, Nf4Config
from rankwise.records import RunRecord
from rankwise.verbs.settings import GenerateSettings


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
    RunRecord(method="qlora", seed=0, settings={"model": "packed"}, base_model=facts).save(tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(("wish", "four_bit"), [("auto", True), ("none", False)])
@pytest.mark.parametrize("adapted", [False, True])
def test_generate_without_quantization_means_it(wish, four_bit, adapted, packed_run, packed_folder):
    adapter = packed_run if adapted else None
    settings = GenerateSettings(prompt=("Hi",), model=str(packed_folder), adapter=adapter, quantization=wish)
    speaker, _ = generate.load_speaker(settings, str(packed_folder), generate.record_of(adapter))
    assert any(isinstance(module, Linear4bit) for module in speaker.model.modules()) is four_bit
    assert (speaker.settings.adapter is not None) is adapted


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

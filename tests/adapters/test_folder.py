"""What a record says about the base reaches whoever loads it later, from wherever."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rankwise.adapters.folder import base_model_of, dtype_of, quantization_of, revision_of, sha256_of_base
from rankwise.errors import AdapterError, QuantizationError, RunError
from rankwise.models import load_model, model_facts, resolve_model
from rankwise.quantization import Fp4Config, Nf4Config
from rankwise.records import RunRecord
from tiny_models import tiny_llama


def folder_of(tmp_path: Path, typed: str | None, **facts: object) -> Path:
    folder = tmp_path / "run"
    folder.mkdir(exist_ok=True)
    RunRecord(method="qlora", seed=0, settings={"model": typed}, base_model=facts).save(folder)
    return folder


def test_a_relative_folder_is_found_from_elsewhere(tmp_path, monkeypatch):
    tiny_llama().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model, _ = load_model("base", dtype=torch.bfloat16)
    facts = json.loads(json.dumps(model_facts(model, resolve_model("base"))))
    run = folder_of(tmp_path, "base", **facts)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert base_model_of(run) == facts["path"] == str((tmp_path / "base").resolve())
    assert dtype_of(run) is torch.bfloat16
    assert sha256_of_base(run) == facts["sha256"]
    assert quantization_of(run) is None
    assert revision_of(run) is None


def test_hub_and_demo_go_by_their_names(tmp_path):
    run = folder_of(tmp_path, "org/base", kind="hub", name="org/base", revision="abc", path="/cache/abc")
    assert (base_model_of(run), revision_of(run)) == ("org/base", "abc")
    run = folder_of(tmp_path, "demo", kind="demo", name="demo", base_model="org/smol", path="/lib/smol.gguf")
    assert (base_model_of(run), revision_of(run)) == ("demo", None)


def test_what_was_typed_is_the_last_resort(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = folder_of(tmp_path, "moved", kind="folder", base_model="/gone/base")
    assert base_model_of(run) == "/gone/base"
    (tmp_path / "moved").mkdir()
    assert base_model_of(run) == "moved"
    assert base_model_of(folder_of(tmp_path, "org/base")) == "org/base"
    with pytest.raises(AdapterError, match="RW413"):
        base_model_of(folder_of(tmp_path, None))


@pytest.mark.parametrize(
    "config",
    [
        Nf4Config(block_size=128, double_quant=True, compute_dtype=torch.float16),
        Fp4Config(block_size=32, modules_to_not_convert=["down_proj"]),
    ],
    ids=["nf4", "fp4"],
)
@pytest.mark.parametrize("stored", [False, True])
def test_the_whole_4_bit_format_is_kept(config, stored, tmp_path):
    tiny_llama(hidden_size=128, intermediate_size=128).save_pretrained(tmp_path / "base")
    model, _ = load_model(str(tmp_path / "base"), quantization=config)
    if stored:
        model.save_pretrained(tmp_path / "packed")
        model, _ = load_model(str(tmp_path / "packed"))
    facts = json.loads(json.dumps(model_facts(model, resolve_model(str(tmp_path / "base")))))
    found = quantization_of(folder_of(tmp_path, "base", **facts))
    for name in ("quant_type", "block_size", "double_quant"):
        assert getattr(found, name) == getattr(config, name)
    if not stored:
        assert found == config


@pytest.mark.parametrize(
    ("stored", "kind", "code"),
    [
        ("nf4", RunError, "RW501"),
        (Nf4Config().to_loading_dict() | {"bits": 3}, QuantizationError, "RW615.*bits"),
        (Nf4Config().to_loading_dict() | {"quant_type": "nf5"}, QuantizationError, "RW615"),
    ],
)
def test_a_description_that_is_none(stored, kind, code, tmp_path):
    with pytest.raises(kind, match=code):
        quantization_of(folder_of(tmp_path, "base", quantization=stored))

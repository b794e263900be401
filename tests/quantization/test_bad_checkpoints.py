"""Truncated, inconsistent and hostile 4-bit checkpoints: one clear error each, before memory is taken."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from rankwise.errors import ModelError, QuantizationError
from rankwise.models import load_model
from rankwise.quantization import Nf4Config, adopt_bitsandbytes_config, quantize
from rankwise.quantization.config import from_bitsandbytes
from tiny_models import tiny_llama

LAYER = "model.layers.1.mlp.up_proj"
NAME = f"{LAYER}.weight"
STATE = f"{NAME}.quant_state.bitsandbytes__nf4"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folders = {}
    for double_quant in (False, True):
        model = tiny_llama(hidden_size=64, intermediate_size=128)
        quantize(model, Nf4Config(double_quant=double_quant))
        folders[double_quant] = tmp_path_factory.mktemp("checkpoint")
        model.save_pretrained(folders[double_quant])
    return folders


def load(folder):
    config = AutoConfig.from_pretrained(folder)
    adopt_bitsandbytes_config(config)
    return AutoModelForCausalLM.from_pretrained(folder, config=config)


def text(content: str) -> torch.Tensor:
    return torch.tensor(list(content.encode()), dtype=torch.uint8)


def state(**changes):
    def change(tensors):
        content = json.loads(bytes(tensors[STATE].tolist()))
        content |= changes
        tensors[STATE] = text(json.dumps({key: value for key, value in content.items() if value is not ...}))

    return change


def put(name, value):
    return lambda tensors: tensors.update({name: value(tensors[name]) if callable(value) else value})


def drop(*names):
    return lambda tensors: [tensors.pop(name) for name in names]


def rename(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


DAMAGES = {
    "no absmax": (drop(f"{NAME}.absmax"), "absmax: missing"),
    "no codes": (drop(NAME), "codes: missing"),
    "no state": (drop(STATE), "0 quant_state entries"),
    "no table": (drop(f"{NAME}.quant_map"), "quant_map: missing"),
    "absmax cut": (put(f"{NAME}.absmax", lambda t: t[:-1].clone()), "absmax: "),
    "codes cut": (put(NAME, lambda t: t[:-1].clone()), "codes: "),
    "absmax NaN": (put(f"{NAME}.absmax", lambda t: t * float("nan")), "NaN"),
    "two states": (lambda t: t.update({f"{NAME}.quant_state.bitsandbytes__fp4": t[STATE].clone()}), "2 quant_state"),
    "unknown type in the name": (rename(STATE, f"{NAME}.quant_state.bitsandbytes__int3"), "0 quant_state entries"),
    "types that differ": (state(quant_type="fp4"), "4-bit type fp4 under"),
    "no JSON": (put(STATE, text("{'quant_type'")), "not bitsandbytes"),
    "deep JSON": (put(STATE, text("[" * 4000)), "not bitsandbytes"),
    "odd block": (state(blocksize=48), "blocksize"),
    "huge block": (state(blocksize=2**40), "blocksize"),
    "dtype int8": (state(dtype="int8"), "dtype"),
    "swapped shape": (state(shape=[64, 128]), r"\(64, 128\) where the model needs \(128, 64\)"),
    "huge shape": (state(shape=[2**40, 2**40]), "codes: "),
    "big shape beside a zero": (state(shape=[0, 2**62]), "shape"),
}
NESTED_DAMAGES = {
    "no nested absmax": (drop(f"{NAME}.nested_absmax"), "nested_absmax: missing"),
    "no nested table": (drop(f"{NAME}.nested_quant_map"), "nested_quant_map: missing"),
    "nested table of its own": (put(f"{NAME}.nested_quant_map", lambda t: t.flip(0)), "nested_quant_map of its own"),
    "no offset": (state(nested_offset=...), "nested_offset"),
    "NaN offset": (state(nested_offset=float("nan")), "nested_offset"),
    "other nested block": (state(nested_blocksize=128), "nested_blocksize"),
    "nothing nested said": (
        state(nested_offset=..., nested_blocksize=..., nested_dtype=...),
        "absmax: .*no nested_offset",
    ),
    "infinite nested absmax": (put(f"{NAME}.nested_absmax", lambda t: t * float("inf")), "NaN or infinite"),
}
CASES = [pytest.param(False, *damage, id=name) for name, damage in DAMAGES.items()]
CASES += [pytest.param(True, *damage, id=name) for name, damage in NESTED_DAMAGES.items()]


@pytest.mark.parametrize(("double_quant", "change", "message"), CASES)
def test_it_is_named(double_quant, change, message, checkpoints, tmp_path):
    tensors = load_file(checkpoints[double_quant] / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoints[double_quant] / "config.json").read_text())
    with pytest.raises(QuantizationError, match=f"RW611.*{LAYER}.*{message}") as caught:
        load(tmp_path)
    assert str(caught.value).count("RW611") == 1


def test_all_faults_are_named_at_once(checkpoints, tmp_path):
    tensors = load_file(checkpoints[False] / "model.safetensors")
    for layer in range(2):
        del tensors[f"model.layers.{layer}.mlp.down_proj.weight.absmax"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((checkpoints[False] / "config.json").read_text())
    with pytest.raises(QuantizationError, match=r"layers\.0\.mlp\.down_proj.*layers\.1\.mlp\.down_proj"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 200, -1])
def test_a_truncated_file_is_refused(keep, checkpoints, tmp_path):
    content = (checkpoints[False] / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:keep])
    (tmp_path / "config.json").write_text((checkpoints[False] / "config.json").read_text())
    with pytest.raises(ModelError, match=r"RW306.*model\.safetensors"):
        load_model(str(tmp_path))


def test_a_dense_checkpoint_called_4_bit_is_refused(checkpoints, tmp_path):
    tiny_llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((checkpoints[False] / "config.json").read_text())
    with pytest.raises(QuantizationError, match=r"RW611.*holds no 4-bit weight"):
        load(tmp_path)


def test_a_4_bit_embedding_has_no_place(checkpoints, tmp_path):
    tensors = load_file(checkpoints[False] / "model.safetensors")
    part = "model.embed_tokens.weight"
    tensors |= {name.replace(NAME, part): tensor.clone() for name, tensor in tensors.items() if name.startswith(NAME)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoints[False] / "config.json").read_text())
    with pytest.raises(QuantizationError, match=r"RW611.*embed_tokens.*Embedding"):
        load(tmp_path)


def test_the_shape_of_a_state_says_nothing(checkpoints, tmp_path):
    tensors = load_file(checkpoints[False] / "model.safetensors")
    tensors[STATE] = tensors[STATE].view(1, -1)
    assert from_bitsandbytes(tensors, NAME).shape == (128, 64)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((checkpoints[False] / "config.json").read_text())
    assert torch.equal(load(tmp_path).get_submodule(LAYER).weight.view(-1), tensors[NAME].view(-1))

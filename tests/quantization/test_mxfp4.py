"""gpt-oss' experts in MXFP4: as transformers reads them, packed in memory, computed with, trained and merged."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, Mxfp4Config

import rankwise as rw
from marks import at_some_level
from precision import assert_as_exact
from rankwise.errors import QuantizationError, RankwiseError, RankwiseWarning
from rankwise.models.load import load_model
from rankwise.models.prepared import mapped_files
from rankwise.quantization import Nf4Config, dequantize
from rankwise.quantization.experts import four_bit_stacks
from rankwise.quantization.linear import Linear4bit, count_weights
from tiny_models import save_in_mxfp4, tiny_moe

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2], [7, 3, 3, 50, 41, 8, 22, 90]])
SIZES = {"hidden_size": 64, "intermediate_size": 96}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_moe("gpt_oss", **SIZES).bfloat16()
    return save_in_mxfp4(model, tmp_path_factory.mktemp("gpt_oss"))


def expanded(folder: Path, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model as transformers reads it densely."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=Mxfp4Config(dequantize=True)
    ).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_experts_are_those_of_transformers_to_the_bit(folder: Path, dtype: torch.dtype) -> None:
    model, _ = load_model(str(folder), dtype=dtype)
    dense = expanded(folder, dtype)
    stacks = dict(four_bit_stacks(model))
    assert len(stacks) == 4
    for name, stack in stacks.items():
        assert torch.equal(stack.dequantize(), dense.get_parameter(name))
    dequantize(model)
    assert {name: W.shape for name, W in model.named_parameters()} == {
        name: W.shape for name, W in dense.named_parameters()
    }
    assert all(torch.equal(W, model.get_parameter(name)) for name, W in dense.named_parameters())


def test_in_memory_they_are_the_file(folder: Path) -> None:
    model, _ = load_model(str(folder))
    held = sum(stack.codes.nbytes + stack.scales.absmax.nbytes for _, stack in four_bit_stacks(model))
    stored = load_file(folder / "model.safetensors")
    assert held == sum(tensor.nbytes for name, tensor in stored.items() if tensor.dtype is torch.uint8)
    files = mapped_files(model)
    assert {path.name for path in files.versions} == {"model.safetensors"}
    assert files.bytes >= held
    assert count_weights(model) == count_weights(expanded(folder))


@at_some_level
def test_it_computes_what_the_expanded_model_does(folder: Path) -> None:
    exact = expanded(folder, torch.float32)
    model, _ = load_model(str(folder), dtype=torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(model(IDS).logits, exact(IDS).logits, rtol=1e-5, atol=1e-6)
        experts = exact.model.layers[0].mlp.experts
        x, index, weights = torch.randn(40, 64), torch.randint(0, 4, (40, 2)), torch.rand(40, 2)
        x, weights = x.bfloat16(), weights.bfloat16()
        wanted = experts(x.float(), index, weights.float())
        in_bfloat16 = expanded(folder).model.layers[0].mlp.experts(x, index, weights)
        ours, _ = load_model(str(folder))
        assert_as_exact(ours.model.layers[0].mlp.experts(x, index, weights), in_bfloat16, wanted)


@pytest.mark.parametrize("targets", [["down_proj"], ["gate_up_proj", "down_proj"]])
@pytest.mark.parametrize("quantization", [None, Nf4Config(double_quant=True)])
def test_an_adapter_trains_and_merges_as_over_the_expanded_model(folder: Path, targets, quantization) -> None:
    config = rw.LoraConfig(
        r=4, target_modules=["q_proj"], target_parameters=[f"mlp.experts.{name}" for name in targets]
    )
    found = []
    for is_packed in (True, False):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RankwiseWarning)
            model, _ = load_model(str(folder), dtype=torch.float32, quantization=quantization)
        if not is_packed:
            dequantize(model)
        torch.manual_seed(0)
        rw.add_adapter(model, config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=0.1)
        loss = model(IDS, labels=IDS).loss
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        rw.merge_adapter(model, reversible=False)
        with torch.no_grad():
            found.append((loss.detach(), grads, model.eval()(IDS).logits))
    (loss, grads, merged), (dense_loss, dense_grads, dense_merged) = found
    torch.testing.assert_close(loss, dense_loss, rtol=1e-5, atol=1e-6)
    assert grads.keys() == dense_grads.keys()
    assert sum("experts" in name for name in grads) == 4 * len(targets)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, dense_grads[name], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(merged, dense_merged, rtol=1e-4, atol=1e-5)


def test_a_requested_format_is_that_of_the_other_layers(folder: Path) -> None:
    with pytest.warns(RankwiseWarning, match="RW324.*mxfp4"):
        model, _ = load_model(str(folder), quantization=Nf4Config())
    layers = [layer for layer in model.modules() if isinstance(layer, Linear4bit)]
    assert len(layers) == 8
    assert {layer.quant_type for layer in layers} == {"nf4"}
    assert {stack.scales.quant_type for _, stack in four_bit_stacks(model)} == {"mxfp4"}


def test_saving_it_packed_is_refused(folder: Path, tmp_path: Path) -> None:
    model, _ = load_model(str(folder))
    with pytest.raises(QuantizationError, match="RW615.*mxfp4"):
        model.save_pretrained(tmp_path)
    model.dequantize().save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    dense = expanded(folder)
    assert all(torch.equal(W, again.get_parameter(name)) for name, W in dense.named_parameters())


def changed(folder: Path, into: Path, change) -> str:
    state = load_file(folder / "model.safetensors")
    change(state)
    into.mkdir()
    (into / "config.json").write_text((folder / "config.json").read_text())
    save_file(state, into / "model.safetensors", {"format": "pt"})
    return str(into)


DOWN = "model.layers.1.mlp.experts.down_proj"


def test_what_does_not_fit_is_refused_by_name(folder: Path, tmp_path: Path) -> None:
    def infinite(state):
        state[f"{DOWN}_scales"][1, 2, 0] = 253

    def shorter(state):
        state[f"{DOWN}_blocks"] = state[f"{DOWN}_blocks"][:, :-1].contiguous()

    for name, change, message in (
        ("infinite", infinite, "layers.1.*down_proj.*infinite"),
        ("shorter", shorter, r"layers.1.*down_proj_blocks is \(4, 63, 3, 16\)"),
        ("alone", lambda state: state.pop(f"{DOWN}_scales"), "down_proj_scales is missing"),
        (
            "missing",
            lambda state: [state.pop(f"{DOWN}_{part}") for part in ("scales", "blocks")],
            "layers.1.*down_proj",
        ),
    ):
        with pytest.raises(RankwiseError, match=message):
            load_model(changed(folder, tmp_path / name, change))


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path: Path) -> None:
    model = tiny_moe("gpt_oss", hidden_size=64, intermediate_size=64)
    folder = save_in_mxfp4(model, tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 48}))
    with pytest.raises(RankwiseError, match="RW611.*48 weights.*blocks of 32"):
        load_model(str(folder))

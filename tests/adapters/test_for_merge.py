"""Training for a merged 4-bit file computes with the file's weights; its gradients take rounding for the identity."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

import rankwise as rw
from rankwise import ops
from rankwise.adapters.state import adapted_layers
from rankwise.errors import AdapterError, ConfigError
from rankwise.export.merged import merge_to_folder
from rankwise.ops.four_bit import spread_weight
from tables import thinned
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])
UP = "model.layers.0.mlp.up_proj"
Q4_0 = gguf.GGMLQuantizationType.Q4_0


def four_bit():
    rw.quantize(model := tiny_llama(intermediate_size=64), rw.Nf4Config())
    return model


BASES = {
    "dense": lambda: tiny_llama(intermediate_size=64),
    "biases, bfloat16": lambda: tiny_llama(intermediate_size=64, attention_bias=True).bfloat16(),
    "Conv1D": tiny_gpt2,
    "4 bits": four_bit,
}


def as_llama_cpp(W: torch.Tensor) -> torch.Tensor:
    blocks = gguf.quantize(np.ascontiguousarray(W.float().numpy()), Q4_0)
    return torch.from_numpy(gguf.dequantize(blocks, Q4_0))


def trained(base, for_merge, *, use_dora):
    """A model some steps of training away from its start."""
    model = BASES[base]()
    rw.add_adapter(model, rw.LoraConfig(r=3, for_merge=for_merge, use_dora=use_dora))
    optimizer = torch.optim.AdamW(rw.adapter_parameters(model).values(), lr=0.02)
    for _ in range(3):
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("for_merge", ["nf4", "q4_0"])
def test_gradients_take_rounding_for_the_identity(for_merge, use_dora):
    layer = dict(adapted_layers(trained("dense", for_merge, use_dora=use_dora), "default"))[UP]
    adapter, s = layer.at_work, layer.at_work.scaling
    x, dy = torch.randn(5, 32, requires_grad=True), torch.randn(5, 64)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = layer(x)
    y.backward(dy)
    A, B, m, Q = (
        adapter.lora_A,
        adapter.lora_B,
        adapter.magnitude,
        ops.dequantize_weight(adapter.rounded(layer.base_layer)),
    )
    g = torch.ones(64) if m is None else adapter.gain(layer.base_layer).detach()
    torch.testing.assert_close(y, F.linear(x, Q))
    torch.testing.assert_close(x.grad, dy @ Q)
    torch.testing.assert_close(B.grad, s * (g * dy).T @ (x @ A.T))
    torch.testing.assert_close(A.grad, s * B.T @ (g * dy).T @ x)
    if m is not None:
        torch.testing.assert_close(m.grad, (dy * y).sum(0) / m)
    # No dense weight waits for the backward pass.
    assert not any(tensor.is_floating_point() and tensor.numel() >= Q.numel() for tensor in kept)


def test_a_row_of_zeros_trains_on():
    base = torch.nn.Linear(32, 64)
    with torch.no_grad():
        base.weight[5] = 0
    model = torch.nn.Sequential(base)
    rw.add_adapter(model, rw.LoraConfig(r=3, target_modules=["0"], use_dora=True, for_merge="nf4"))
    optimizer = torch.optim.AdamW(rw.adapter_parameters(model).values(), lr=0.02)
    for _ in range(3):
        model(torch.randn(8, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(tensor.isfinite().all() for tensor in rw.adapter_parameters(model).values())


@thinned({"base": list(BASES), "for_merge": ["nf4", "q4_0"], "use_dora": [False, True]})
@pytest.mark.filterwarnings("ignore")
def test_the_merged_folder_computes_what_was_trained(tmp_path, base, for_merge, use_dora):
    model = trained(base, for_merge, use_dora=use_dora)
    plain = BASES[base]()
    plain.save_pretrained(tmp_path / "base")
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    dtype = next(model.parameters()).dtype if base != "4 bits" else torch.float32
    rw.load_adapter(loaded := rw.load_model(str(tmp_path / "base"), dtype=dtype)[0], tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    merged, _ = rw.load_model(str(tmp_path / "merged"), dtype=dtype)
    with torch.no_grad():
        expected, found = loaded(input_ids=IDS).logits, merged(input_ids=IDS).logits
        # Dense products and other attention sum in another order.
        tolerance = 0.02 if dtype is torch.bfloat16 else 1e-5
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    if for_merge == "nf4":
        assert torch.equal(found, expected)
    else:
        layers = {f"{path}.weight": layer for path, layer in adapted_layers(model, "default")}
        with safe_open(tmp_path / "merged" / "model.safetensors", "pt") as file:
            for name in layers.keys() & set(file.keys()):
                W = file.get_tensor(name)
                W = W.T if base == "Conv1D" else W
                Q = layers[name].at_work.rounded(layers[name].base_layer)
                assert torch.equal(as_llama_cpp(W), ops.dequantize_weight(Q, torch.float32))


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 96), (50, 30)])
def test_a_spread_weight_rounds_back_and_keeps_small_changes(shape, double_quant):
    Q = ops.quantize_weight(torch.randn(shape) * 0.05, double_quant=double_quant)
    spread, shift = spread_weight(Q), 0.002

    def moved_by(W):
        return (ops.dequantize_weight(ops.quantize_weight(W + shift)) - ops.dequantize_weight(Q)).mean().item()

    assert torch.equal(ops.quantize_weight(spread).codes, Q.codes)
    assert moved_by(spread) == pytest.approx(shift, rel=0.3)
    assert moved_by(ops.dequantize_weight(Q)) < shift / 2


def test_a_layer_over_nf4_keeps_a_small_update():
    rw.add_adapter(model := four_bit(), rw.LoraConfig(r=1, for_merge="nf4"))
    layer = dict(adapted_layers(model, "default"))[UP]
    adapter, shift = layer.at_work, 0.002
    torch.nn.init.ones_(adapter.lora_A)
    torch.nn.init.constant_(adapter.lora_B, shift / adapter.scaling)
    moved = ops.dequantize_weight(adapter.rounded(layer.base_layer)) - ops.dequantize_weight(layer.base_layer.packed)
    assert moved.mean().item() == pytest.approx(shift, rel=0.3)


REFUSED = {
    "dropout": {"lora_dropout": 0.1},
    "pissa": {"init_lora_weights": "pissa"},
    "experts": {"target_parameters": ["mlp.experts.down_proj"]},
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_merged_file_cannot_hold_is_refused(case):
    with pytest.raises(ConfigError, match="for_merge"):
        rw.LoraConfig(for_merge="nf4", **REFUSED[case])


def test_rows_that_q4_0_cannot_divide_are_named():
    with pytest.raises(AdapterError, match=r"RW402.*down_proj.*take nf4"):
        rw.add_adapter(tiny_llama(), rw.LoraConfig(for_merge="q4_0"))


def test_such_an_adapter_is_not_served_beside_its_base(tmp_path):
    model = trained("dense", "nf4", use_dora=False)
    with pytest.raises(AdapterError, match="RW433"):
        rw.export_adapter(model, tmp_path / "out", target="vllm")

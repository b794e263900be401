"""`quantize` on models in memory: what becomes 4-bit, what stays, what transformers thinks of the result."""

from __future__ import annotations

import copy
import gc
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import rankwise as rw
from rankwise.errors import QuantizationError
from rankwise.quantization import Fp4Config, Linear4bit, Nf4Config, dequantize, quantize
from rankwise.quantization.linear import PLAIN_SUBCLASSES
from tiny_models import tiny_falcon, tiny_gpt2, tiny_llama

LINEAR_NAMES = ("_proj", "c_attn", "c_fc", "query_key_value", "self_attention.dense", "4h", "to_h")
IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def four_bit(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}


@pytest.mark.parametrize("config", [Nf4Config(), Fp4Config(block_size=32, double_quant=True)], ids=["nf4", "fp4"])
@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2, tiny_falcon])
def test_the_model_computes_with_its_dequantized_weights(build, config):
    model, plain = build(), build()
    names = [name for name, module in plain.named_modules() if name.endswith(LINEAR_NAMES)]
    report = quantize(model, config)
    assert four_bit(model) == set(report.layers) == set(names)
    assert type(model) is type(plain)
    for name in report.layers:
        layer, dense = model.get_submodule(name), plain.get_submodule(name)
        W = layer.dequantize()
        dense.weight.data = W if isinstance(dense, nn.Linear) else W.T.contiguous()
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-4, atol=1e-5)


def test_subclasses_that_become_4_bit_are_plain_products():
    """A name in the list is a promise about another library's forward."""
    from transformers.models.falcon import modeling_falcon

    for name in PLAIN_SUBCLASSES:
        layer = getattr(modeling_falcon, name)(5, 3)
        x = torch.randn(2, 7, 5)
        torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_falcon_trains_on_4_bit_layers(use_dora):
    model = tiny_falcon()
    quantize(model, Nf4Config())
    before = logits(model)
    rw.add_adapter(model, rw.LoraConfig(r=2, use_dora=use_dora))
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert all(value.grad is not None for value in rw.adapter_parameters(model).values())


def test_the_head_stays_dense_tied_or_not():
    for tied in (False, True):
        model = tiny_llama(tie_word_embeddings=tied)
        report = quantize(model, Nf4Config())
        assert type(model.lm_head) is nn.Linear
        assert report.dense == ("lm_head",)
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_plain_module_is_quantized_whole_but_for_its_head_and_what_is_tied():
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 32)
            self.body = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
            self.again = self.body[0]
            self.attention = nn.MultiheadAttention(32, 2)
            self.tied = nn.Linear(32, 10, bias=False)
            self.tied.weight = self.embedding.weight
            self.lm_head = nn.Linear(32, 10)

    model = Plain()
    report = quantize(model, Nf4Config())
    assert report.layers == ("body.0", "body.2")
    assert model.again is model.body[0]
    assert set(report.dense) == {"tied", "lm_head"}
    x = torch.randn(3, 1, 32)
    assert model.attention(x, x, x)[0].shape == x.shape
    assert not hasattr(model, "hf_quantizer")
    assert "2 layers quantized" in str(report)
    assert report.bytes_before == 2 * 32 * 32 * 4
    assert report.bytes_after == 2 * (32 * 32 // 2 + 16 * 4)


@pytest.mark.parametrize(
    "made", [nn.utils.weight_norm, nn.utils.spectral_norm, lambda linear: prune.l1_unstructured(linear, "weight", 0.5)]
)
def test_a_weight_that_every_forward_makes_anew_stays_dense(made):
    model = nn.Sequential(made(nn.Linear(32, 32)), nn.Linear(32, 32)).eval()
    assert quantize(model, Nf4Config()).layers == ("1",)
    assert model(torch.randn(2, 32)).isfinite().all()


def test_excluded_modules_stay_dense():
    model = tiny_llama()
    quantize(model, Nf4Config(modules_to_not_convert=["down_proj", "model.layers.0.self_attn"]))
    assert four_bit(model) == {
        "model.layers.0.mlp.gate_proj",
        "model.layers.0.mlp.up_proj",
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
    }


def test_each_dense_weight_is_freed_before_the_next_layer(monkeypatch):
    model = tiny_llama()
    weights = [weakref.ref(model.get_submodule(name).weight) for name in four_bit(_quantized(tiny_llama()))]
    alive: list[int] = []
    original = Linear4bit.from_linear.__func__

    def counting(cls, linear, **arguments):
        alive.append(sum(weight() is not None for weight in weights))
        return original(cls, linear, **arguments)

    monkeypatch.setattr(Linear4bit, "from_linear", classmethod(counting))
    gc.disable()
    try:
        quantize(model, Nf4Config())
    finally:
        gc.enable()
    assert alive == list(range(14, 0, -1))


def _quantized(model: nn.Module, config: Nf4Config | None = None) -> nn.Module:
    quantize(model, config or Nf4Config())
    return model


def test_hooks_on_a_layer_stay_and_can_be_removed():
    model, calls = tiny_llama(), []
    layer = model.model.layers[0].mlp.up_proj
    handles = [
        layer.register_forward_hook(lambda *_: calls.append("after")),
        layer.register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True),
    ]
    for change in (lambda: quantize(model, Nf4Config()), lambda: dequantize(model)):
        change()
        calls.clear()
        logits(model)
        assert calls == ["before", "after"]
    for handle in handles:
        handle.remove()
    calls.clear()
    logits(model)
    assert not calls


def test_nan_is_named_and_nothing_changes():
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 4] = float("nan")
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    with pytest.raises(QuantizationError, match=r"RW603.*layers\.0\.mlp\.up_proj.*layers\.1\.self_attn\.k_proj"):
        quantize(model, Nf4Config())
    assert not four_bit(model)
    assert not getattr(model, "is_quantized", False)


def test_big_finite_weights_are_no_nan():
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 1))
    model[0].weight.data.fill_(3e38)
    quantize(model, Nf4Config())
    assert isinstance(model[0], Linear4bit)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: nn.Sequential(nn.ReLU()), "none of the 0 dense"),
        (lambda: _quantized(nn.Sequential(nn.Linear(64, 4))), "none of the 0 dense"),
        (lambda: _quantized(tiny_llama()), "quantized already"),
        (lambda: nn.Linear(4, 4), "from_linear"),
    ],
)
def test_models_with_nothing_to_quantize(model, message):
    with pytest.raises(QuantizationError, match=f"RW610.*{message}"):
        quantize(model(), Nf4Config())


def test_all_layers_excluded_is_an_error():
    with pytest.raises(QuantizationError, match=r"RW610.*a shorter list"):
        quantize(tiny_llama(), Nf4Config(modules_to_not_convert=["model"]))


def test_adapters_come_after():
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(QuantizationError, match=r"RW610.*adapters"):
        quantize(model, Nf4Config())


def test_weights_of_another_dtype_are_named_and_nothing_changes():
    model = nn.Sequential(nn.Linear(64, 4), nn.Linear(4, 4).double(), nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(QuantizationError, match=r"RW605.* 1 \(torch\.float64\), 2 \(torch\.complex64\)"):
        quantize(model, Nf4Config())
    assert not four_bit(model)


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ({"block_size": 63}, "RW615"),
        ({"block_size": 16}, "RW615"),
        ({"block_size": 8192}, "RW615"),
        ({"block_size": 64.0}, "RW615"),
        ({"block_size": "64"}, "RW615"),
        ({"block_size": True}, "RW615"),
        ({"double_quant": 1}, "RW615"),
        ({"modules_to_not_convert": "lm_head"}, "RW615"),
        ({"modules_to_not_convert": [3]}, "RW615"),
        ({"compute_dtype": "bf16"}, "RW605"),
        ({"compute_dtype": torch.int32}, "RW605"),
        ({"compute_dtype": "nn"}, "RW605"),
    ],
)
@pytest.mark.parametrize("kind", [Nf4Config, Fp4Config])
def test_settings_are_checked_at_once(kind, arguments, code):
    with pytest.raises(QuantizationError, match=code):
        kind(**arguments)


@pytest.mark.parametrize("config", [None, "nf4", SimpleNamespace(quant_type="nf4")])
def test_other_configs_are_refused(config):
    with pytest.raises(QuantizationError, match="RW615"):
        quantize(tiny_llama(), config)


def test_configs_compare_by_their_settings():
    assert Nf4Config(block_size=128) == Nf4Config(block_size=128)
    assert Nf4Config(block_size=128) != Nf4Config()
    assert Nf4Config() != Fp4Config()
    config = Nf4Config(block_size=128, double_quant=True, modules_to_not_convert=["a"], compute_dtype="bfloat16")
    assert type(config).from_dict(config.to_loading_dict()) == config
    assert "block_size=128" in repr(config)


def test_one_config_serves_two_models():
    config = Nf4Config()
    first, second = _quantized(tiny_llama(), config), _quantized(tiny_gpt2().to(torch.bfloat16), config)
    assert first.config.quantization_config.to_dict()["bnb_4bit_compute_dtype"] == "float32"
    assert second.config.quantization_config.to_dict()["bnb_4bit_compute_dtype"] == "bfloat16"
    assert config == Nf4Config()
    assert config.dense_modules is None


def test_dequantize_gives_a_plain_model_that_computes_the_same():
    model = _quantized(tiny_llama(attention_bias=True))
    before, count = logits(model), len(four_bit(model))
    plain = model.dequantize()
    assert not four_bit(plain)
    assert not plain.is_quantized
    assert not hasattr(plain.config, "quantization_config")
    torch.testing.assert_close(logits(plain), before, rtol=1e-4, atol=1e-5)
    assert dequantize(_quantized(tiny_llama()), torch.bfloat16) == count


def test_quantizing_a_model_without_storage_is_free():
    with torch.device("meta"):
        model = tiny_llama()
    quantize(model, Nf4Config(double_quant=True))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


def test_a_copied_model_is_quantized_too():
    model = _quantized(tiny_llama())
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin), logits(model))


def test_import_is_quick():
    code = "import sys, rankwise.quantization; sys.exit(any(m in sys.modules for m in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

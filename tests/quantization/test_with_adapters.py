"""LoRA and DoRA over 4-bit layers: that is QLoRA and QDoRA."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from marks import at_some_level
from precision import assert_as_exact, merged_in_float64
from rankwise.quantization import Fp4Config, Linear4bit, Nf4Config, quantize
from tables import thinned
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2], [1, 7, 7, 8, 90, 41, 3, 2]])
BASES = {"llama": lambda: tiny_llama(attention_bias=True), "gpt2": tiny_gpt2}
ADAPTERS = {"qlora": {}, "qdora": {"use_dora": True}, "rslora": {"use_rslora": True, "r": 6}}
CONFIGS = {"nf4": Nf4Config(), "fp4-double": Fp4Config(block_size=32, double_quant=True)}
DTYPES = (torch.float32, torch.bfloat16)
every_case = thinned({"adapter": list(ADAPTERS), "base": list(BASES), "config": list(CONFIGS), "dtype": DTYPES})


def build(adapter: str, base: str, config: str, dtype: torch.dtype, *, trained: bool) -> nn.Module:
    model = BASES[base]().to(dtype)
    quantize(model, CONFIGS[config])
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 8, "target_modules": "all-linear", **ADAPTERS[adapter]}
    rw.add_adapter(model, rw.LoraConfig(**settings))
    if trained:
        with torch.no_grad():
            for name, parameter in rw.adapter_parameters(model).items():
                parameter.add_(torch.randn_like(parameter) * (0.02 if "magnitude" in name else 0.05))
    return model


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


@at_some_level
@every_case
def test_a_new_adapter_changes_nothing(adapter, base, config, dtype):
    model = build(adapter, base, config, dtype, trained=False)
    exact = logits(merged_in_float64(model))
    with rw.adapter_disabled(model):
        plain = logits(model)
    assert_as_exact([logits(model)], [plain], [exact], dtype=dtype)


@every_case
def test_only_the_adapter_gets_gradients_and_the_codes_never_change(adapter, base, config, dtype):
    model = build(adapter, base, config, dtype, trained=False)
    stored = {name: t.clone() for name, t in model.state_dict().items() if "adapters" not in name}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    model.train()
    model(input_ids=IDS, labels=IDS).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if ".adapters." in name}
    optimizer.step()
    after = model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in stored.items())


@at_some_level
@every_case
def test_merging_gives_plain_layers_that_say_the_same(adapter, base, config, dtype):
    model = build(adapter, base, config, dtype, trained=True)
    before, exact = logits(model), logits(merged_in_float64(model))
    rw.merge_adapter(model)
    layers = [module for name, module in model.named_modules() if name.endswith(("_proj", "c_attn", "c_fc"))]
    assert layers
    kind = Conv1D if base == "gpt2" else nn.Linear
    assert all(type(layer) is kind and layer.weight.dtype == dtype for layer in layers)
    # The merged weight is rounded, as are the numbers between layers.
    assert_as_exact([logits(model)], [before], [exact], slack=2, dtype=dtype)
    rw.unmerge_adapter(model)
    assert any(isinstance(module, Linear4bit) for module in model.modules())
    assert torch.equal(logits(model), before)


@at_some_level
@every_case
def test_an_adapter_goes_through_a_file_exactly(adapter, base, config, dtype, tmp_path):
    model = build(adapter, base, config, dtype, trained=True)
    rw.save_adapter(model, tmp_path)
    other = BASES[base]().to(dtype)
    quantize(other, CONFIGS[config])
    rw.load_adapter(other, tmp_path)
    assert torch.equal(logits(other), logits(model))


def test_gradient_checkpointing_gives_the_same_gradients():
    gradients = []
    for checkpointing in (False, True):
        model = build("qdora", "llama", "nf4", torch.float32, trained=True).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append([p.grad for p in rw.adapter_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("use_dora", [False, True])
def test_transforms_of_functions(use_dora):
    model = tiny_llama()
    quantize(model, Nf4Config(block_size=32))
    rw.add_adapter(model, rw.LoraConfig(r=2, use_dora=use_dora, init_lora_weights=False))
    model(input_ids=IDS, labels=IDS).loss.backward()
    trained = rw.adapter_parameters(model)
    names = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def loss(parameters):
        return torch.func.functional_call(model, parameters, kwargs={"input_ids": IDS, "labels": IDS}).loss

    grads = torch.func.grad(loss)(names)
    assert len(grads) == len(trained)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, names[name].grad, rtol=1e-3, atol=1e-5)

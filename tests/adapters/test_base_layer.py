"""Adapters over layers that another library quantized: stand-ins for HQQ, gptqmodel and torchao.

Each holds its weight in 8 bits and gives its product without a gradient, as most kernels of such libraries do.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise.adapters.base_layer import ForeignLinear, make_dense

SCALE = 1 / 64


def packed(layer: nn.Linear) -> Tensor:
    return (layer.weight.detach() / SCALE).round().clamp(-127, 127).to(torch.int8)


class HQQLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features, self.bias = layer.in_features, layer.out_features, layer.bias
        self.W_q = nn.Parameter(packed(layer), requires_grad=False)

    def dequantize(self) -> Tensor:
        return self.W_q.float() * SCALE

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(x, self.dequantize(), self.bias)


class TorchQuantLinear(nn.Module):
    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_buffer("qweight", packed(layer).T.contiguous())
        self.register_buffer("bias", layer.bias.detach().clone())

    def dequantize_weight(self) -> Any:
        return self.qweight.float() * SCALE

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return F.linear(x, self.dequantize_weight().T, self.bias)


class Int8Tensor(Tensor):
    """A weight of another dtype than its bytes."""

    @staticmethod
    def __new__(cls, codes: Tensor) -> Any:
        found = Tensor._make_wrapper_subclass(cls, codes.shape, dtype=torch.float32)  # type: ignore[attr-defined]
        found.codes = codes
        return found

    def __init__(self, codes: Tensor) -> None: ...

    def dequantize(self) -> Tensor:  # type: ignore[override]
        return self.codes.float() * SCALE  # type: ignore[attr-defined]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].codes)
        plain = [one.dequantize() if isinstance(one, cls) else one for one in args]
        return func(*plain, **(kwargs or {}))


Int8Tensor.__module__ = "torchao.dtypes"


def of_torchao(layer: nn.Linear) -> nn.Linear:
    found = copy.deepcopy(layer)
    found.weight = nn.Parameter(Int8Tensor(packed(layer)), requires_grad=False)
    return found


KINDS = {"hqq": HQQLinear, "gptqmodel": TorchQuantLinear, "torchao": of_torchao}


@pytest.fixture(params=KINDS)
def models(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The foreign model, and a dense one of the same values."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 20), nn.Linear(20, 8)]
    dense = nn.Sequential(*map(copy.deepcopy, layers))
    for layer, one in zip(layers, dense):
        one.weight.data = packed(layer).float() * SCALE
    return nn.Sequential(*(KINDS[request.param](layer) for layer in layers)), dense


@pytest.mark.parametrize("use_dora", [False, True])
def test_adapters_are_those_of_the_dense_values(models: Any, use_dora: bool, tmp_path: Path) -> None:
    x, config = torch.randn(3, 12), rw.LoraConfig(r=4, use_dora=use_dora)
    before = list(models[0])
    base = models[0](x)
    found = []
    for model in models:
        torch.manual_seed(1)
        rw.add_adapter(model, config)
        torch.testing.assert_close(model(x), base)
        optimizer = torch.optim.SGD(rw.adapter_parameters(model).values(), lr=0.3)
        for _ in range(3):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
        found.append({key: value.detach().clone() for key, value in rw.adapter_parameters(model).items()})
    assert found[0].keys() == found[1].keys()
    for key, value in found[0].items():
        torch.testing.assert_close(value, found[1][key], rtol=1e-4, atol=1e-6)
    foreign, after = models[0], models[0](x)
    assert (after - base).abs().max() > 1e-3
    rw.save_adapter(foreign, tmp_path)
    rw.remove_adapter(foreign)
    assert list(foreign) == before
    assert torch.equal(foreign(x), base)
    rw.load_adapter(foreign, tmp_path)
    assert torch.equal(foreign(x), after)
    rw.merge_adapter(foreign)
    assert all(type(layer) is nn.Linear for layer in foreign)
    torch.testing.assert_close(foreign(x), after, rtol=1e-4, atol=1e-5)
    rw.unmerge_adapter(foreign)
    assert torch.equal(foreign(x), after)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("kind", ["hqq", "torchao"])
def test_biases_train(kind: str, use_dora: bool, tmp_path: Path) -> None:
    x, learnt = torch.randn(2, 3, 12), []
    torch.manual_seed(0)
    layer = nn.Linear(12, 20)
    foreign = KINDS[kind](layer)
    layer.weight.data = packed(layer).float() * SCALE
    for model in (nn.Sequential(layer), nn.Sequential(foreign)):
        torch.manual_seed(1)
        rw.add_adapter(model, rw.LoraConfig(r=4, bias="all", use_dora=use_dora, init_lora_weights=False))
        model(x).square().mean().backward()
        learnt.append({key: value.grad for key, value in rw.adapter_parameters(model).items()})
    torch.testing.assert_close(*learnt, rtol=1e-4, atol=1e-6)
    rw.adapter_parameters(model)["base_model.model.0.base_layer.bias"].data += 1
    expected = model(x)
    rw.save_adapter(model, tmp_path)
    rw.remove_adapter(model)
    rw.load_adapter(model, tmp_path)
    torch.testing.assert_close(model(x), expected)


def test_a_merge_leaves_other_layers_as_they_were(models: Any) -> None:
    names, untouched = models[0].state_dict().keys(), models[0][1]
    rw.add_adapter(models[0], rw.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
    rw.merge_adapter(models[0])
    assert models[0][1] is untouched
    assert {name for name in names if name.startswith("1.")} <= models[0].state_dict().keys()
    rw.unmerge_adapter(models[0])
    models[0](torch.randn(3, 12)).sum().backward()
    assert all(one.grad.abs().max() > 0 for one in rw.adapter_parameters(models[0]).values())


def test_gradients_pass_through_layers_without_an_adapter(models: Any) -> None:
    x, gradients = torch.randn(3, 12), []
    for model in models:
        torch.manual_seed(1)
        rw.add_adapter(model, rw.LoraConfig(r=4, target_modules=["0"], init_lora_weights=False))
        model(x).square().mean().backward()
        gradients.append([parameter.grad for parameter in rw.adapter_parameters(model).values()])
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-6)
    assert [item.name for item in rw.adapters.plan_adapter(models[0], rw.LoraConfig(r=2), "other")] == ["0", "1"]


def test_what_has_no_adapter_becomes_dense_too(models: Any) -> None:
    x = torch.randn(3, 12)
    base = models[0](x)
    make_dense(models[0])
    assert all(type(layer) is nn.Linear for layer in models[0])
    torch.testing.assert_close(models[0](x), base)


def test_a_model_that_merging_made_dense_forgets_its_quantizer(models: Any) -> None:
    """Else its library would save plain layers as packed ones."""
    forgotten: list[nn.Module] = []

    class Quantizer:
        remove_quantization_config = staticmethod(forgotten.append)

    model = models[0]
    model.hf_quantizer = Quantizer()
    rw.add_adapter(model, rw.LoraConfig(r=2))
    rw.merge_adapter(model, reversible=False)
    make_dense(model)
    assert forgotten == [model]


def test_the_dtype_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A packed weight does not tell it, and DoRA asks in every forward pass."""
    base, read = ForeignLinear(HQQLinear(nn.Linear(8, 8))), []
    dequantize = HQQLinear.dequantize
    monkeypatch.setattr(HQQLinear, "dequantize", lambda layer: read.append(1) or dequantize(layer))
    assert (base.dtype, base.dtype, len(read)) == (torch.float32, torch.float32, 1)

"""Layers that hold a weight and cannot adapt are refused by name and reason, never adapted to no effect."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import AdapterError


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.conv1 = nn.Conv1d(8, 8, 3)
        self.conv2 = nn.Conv2d(8, 8, 3)
        self.attention = nn.MultiheadAttention(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.attention(*[self.linear(x)] * 3)[0]


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("conv1", "convolution"),
        ("conv2", "convolution"),
        ("attention", "MultiheadAttention"),
        ("attention.out_proj", "without calling a layer's forward"),
    ],
)
def test_what_no_adapter_fits_is_refused_with_its_reason(target: str, reason: str) -> None:
    with pytest.raises(AdapterError, match=rf"RW402.*{target}.*{reason}"):
        rw.add_adapter(Mixed(), rw.LoraConfig(r=2, target_modules=[target]))


def test_all_linear_leaves_torch_s_attention_out() -> None:
    model = Mixed()
    rw.add_adapter(model, rw.LoraConfig(r=2))
    assert [item.name for item in rw.adapters.report(model).modules] == ["linear"]


class Packed(nn.Module):
    """As GPTQ's and AWQ's layers look."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features = self.out_features = 8
        self.register_buffer("qweight", torch.zeros(1, 8, dtype=torch.int32))


class Eight(nn.Linear):
    """As transformers' FP8 layers look."""

    def __init__(self) -> None:
        super().__init__(8, 8, bias=False)
        self.weight = nn.Parameter(torch.zeros(8, 8).to(torch.float8_e4m3fn), requires_grad=False)


class Subclass(torch.Tensor):
    """As torchao's weights look."""


Subclass.__module__ = "torchao.dtypes"


def of_subclass() -> nn.Linear:
    layer = nn.Linear(8, 8)
    layer.weight = nn.Parameter(torch.zeros(8, 8).as_subclass(Subclass), requires_grad=False)
    return layer


@pytest.mark.parametrize(
    ("layer", "named"), [(Packed, "qweight"), (Eight, "float8"), (of_subclass, "torchao's Subclass")]
)
@pytest.mark.parametrize("targets", ["all-linear", ["0"], r"\d"])
def test_what_another_library_quantized_is_refused(layer, named, targets) -> None:
    model = nn.Sequential(layer(), nn.Linear(8, 8))
    with pytest.raises(AdapterError, match=rf"RW402.*{named}"):
        rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=targets))
    rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["1"]))

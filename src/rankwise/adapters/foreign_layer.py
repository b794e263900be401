"""Linear layers that another library quantized, as bases of adapters: torchao, HQQ, GPTQ and AWQ.

forward     y = layer(x)    by the library's own kernel
backward    dx = dy W       W (out, in) is dequantized again, since most of these kernels have no gradient
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rankwise.compat.torch import Ctx

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Attributes in which such layers keep their packed weight, if not in ``weight``.
PACKED = ("qweight", "W_q", "weight_packed")


def dequantizer(layer: nn.Module) -> Callable[[], Tensor] | None:
    """A function that returns the layer's dense weight (out, in); None for a module of no known format."""
    known: Any = layer
    weight = getattr(layer, "weight", None) if "weight" in dict(layer.named_parameters(recurse=False)) else None
    if weight is not None and type(weight).dequantize is not Tensor.dequantize:
        return weight.dequantize
    if type(layer).__name__ == "HQQLinear":
        return known.dequantize
    if hasattr(layer, "qweight") and hasattr(layer, "dequantize_weight"):
        # gptqmodel gives (in, out).
        return lambda: known.dequantize_weight().T
    return None


class ForeignLinear(nn.Module):
    """``layer`` with the interface that adapters need of a quantized base."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.in_features, self.out_features = int(layer.in_features), int(layer.out_features)  # type: ignore[arg-type]

    @property
    def weight(self) -> Tensor:
        """The packed weight as the library stores it. Caches compare it to notice that the weight was replaced."""
        name = next((name for name in PACKED if hasattr(self.layer, name)), "weight")
        found = getattr(self.layer, name)
        assert isinstance(found, Tensor), f"{name} of a quantized layer"
        return found

    @property
    def bias(self) -> Tensor | None:
        found = getattr(self.layer, "bias", None)
        return found if isinstance(found, Tensor) else None

    @functools.cached_property
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes, cached since every forward pass of DoRA needs it."""
        return self.dequantize().dtype

    def dequantize(self) -> Tensor:
        """W (out, in)."""
        read = dequantizer(self.layer)
        assert read is not None, "chosen so"
        return read().detach()

    def forward(self, x: Tensor) -> Tensor:
        return _OwnForward.apply(x, self)


def make_readable(model: nn.Module) -> None:
    """Wrap every layer of another library's format in a ``ForeignLinear``, so that gradients pass through it."""
    inner = {id(module.layer) for module in model.modules() if isinstance(module, ForeignLinear)}
    for path, module in list(model.named_modules()):
        if id(module) not in inner and dequantizer(module) is not None:
            model.set_submodule(path, ForeignLinear(module))


def make_foreign(model: nn.Module) -> None:
    """Undo ``make_readable``."""
    for path, module in list(model.named_modules()):
        if isinstance(module, ForeignLinear):
            model.set_submodule(path, module.layer)


def make_dense(model: PreTrainedModel) -> None:
    """Replace layers that another library quantized by ``nn.Linear``, and remove the model's quantization config."""
    make_foreign(model)
    found = {name: read for name, module in model.named_modules() if (read := dequantizer(module)) is not None}
    for name, read in found.items():
        old, W = model.get_submodule(name), read().detach()
        plain = nn.Linear(W.shape[1], W.shape[0], bias=False, device="meta")
        plain.weight, bias = nn.Parameter(W, requires_grad=False), getattr(old, "bias", None)
        if bias is not None:
            plain.bias = nn.Parameter(bias.detach(), requires_grad=False)
        model.set_submodule(name, plain)
    # Merging may have replaced every quantized layer already.
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)


class _OwnForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Ctx[ForeignLinear], x: Tensor, base: ForeignLinear) -> Tensor:
        ctx.kept = base
        return base.layer(x)

    @staticmethod
    def backward(ctx: Ctx[ForeignLinear], dy: Tensor) -> tuple[Tensor, None]:
        return dy @ ctx.kept.dequantize().to(dy.dtype), None

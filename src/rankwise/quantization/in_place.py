"""Quantize the linear layers and the stacked experts of a model in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.compat.torch import is_fake
from rankwise.errors import QuantizationError, some_of
from rankwise.ops.checks import DTYPES
from rankwise.quantization.config import METHOD, FourBitConfig
from rankwise.quantization.experts import quantize_stack, replace_layer
from rankwise.quantization.linear import Linear4bit, is_conv1d
from rankwise.quantization.targets import (
    dense_linear_names,
    expert_tensors,
    four_bit_modules,
    target_names,
    target_stacks,
    warn_about_experts,
)


@dataclass(frozen=True)
class QuantizationReport:
    """The result of ``quantize``."""

    # Names of the layers that are 4-bit now.
    layers: tuple[str, ...]
    # Names of the stacked expert tensors that are 4-bit now.
    stacks: tuple[str, ...]
    # Linear layers that stay dense.
    dense: tuple[str, ...]
    # Stacked expert tensors that stay dense.
    experts: tuple[str, ...]
    # Bytes of the dense weights before quantization.
    bytes_before: int
    # Bytes of their codes and scales.
    bytes_after: int

    def __str__(self) -> str:
        kept = ", ".join(self.dense[:3]) + (", ..." if len(self.dense) > 3 else "")
        stacks = f" and {len(self.stacks)} tensors of experts" if self.stacks else ""
        return (
            f"{len(self.layers)} layers{stacks} quantized "
            f"({self.bytes_before / 1e6:,.1f} MB -> {self.bytes_after / 1e6:,.1f} MB); "
            f"{len(self.dense)} stay dense{f' ({kept})' if kept else ''}"
        )


@torch.no_grad()
def quantize(model: nn.Module, config: FourBitConfig) -> QuantizationReport:
    """Replace the linear layers of ``model`` by 4-bit ones, in place, one at a time, freeing each dense weight.

    Stacked experts are quantized too, and then computed one expert at a time. The output head, embeddings and
    ``config.modules_to_not_convert`` stay dense. transformers then regards the model as quantized: adapters can be
    trained on it, and ``save_pretrained`` writes bitsandbytes' format.

    Raises:
        QuantizationError: RW603 for NaN or infinity in a weight, RW605 for a weight of a different dtype, RW610 where
            nothing can be quantized, or the model is quantized or has adapters, RW615 for a different config. The model
            is then unchanged.

    Warns (RW613) of experts that cannot be quantized, with the reason.
    """
    _check_model(model, config)
    targets, stacks = target_names(model, config), target_stacks(model, config)
    _check_weights(model, [*(f"{names[0]}.weight" for names in targets), *stacks])
    weight_format: dict[str, Any] = {
        "quant_type": config.quant_type,
        "block_size": config.block_size,
        "double_quant": config.double_quant,
        "compute_dtype": config.compute_dtype,
    }
    bytes_before = bytes_after = 0
    for names in targets:
        bytes_before += model.get_parameter(f"{names[0]}.weight").nbytes
        layer = Linear4bit.from_linear(model.get_submodule(names[0]), **weight_format)
        bytes_after += layer.weight.nbytes + sum(buffer.nbytes for buffer in layer.buffers())
        for name in names:
            replace_layer(model, name, layer)
    for name in stacks:
        path, _, leaf = name.rpartition(".")
        bytes_before += model.get_parameter(name).nbytes
        stack = quantize_stack(model.get_submodule(path), leaf, **weight_format)
        bytes_after += stack.codes.nbytes + sum(buffer.nbytes for buffer in stack.scales.buffers())
    warn_about_experts(model, config)
    _mark(model, config)
    layers = tuple(names[0] for names in targets)
    dense, experts = tuple(dense_linear_names(model)), tuple(expert_tensors(model))
    return QuantizationReport(layers, tuple(stacks), dense, experts, bytes_before, bytes_after)


def _check_model(model: nn.Module, config: FourBitConfig) -> None:
    if not isinstance(config, FourBitConfig) or not config.quant_type:
        raise QuantizationError(
            "RW615", f"quantize needs an Nf4Config or Fp4Config, and got a {type(config).__name__}."
        )
    if isinstance(model, Linear4bit) or is_conv1d(model) or type(model) is nn.Linear:
        raise QuantizationError(
            "RW610", "quantize replaces layers inside a model; use Linear4bit.from_linear for a single layer."
        )
    if getattr(getattr(model, "rankwise_adapters", None), "configs", None):
        raise QuantizationError(
            "RW610",
            "the model has adapters; quantize it before adding adapters, or merge them with reversible=False.",
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is None:
        return
    method = quantizer.quantization_config.quant_method
    if method != METHOD or any(four_bit_modules(model)):
        raise QuantizationError("RW610", f"the model is quantized already ({getattr(method, 'value', method)}).")


def _check_weights(model: nn.Module, names: list[str]) -> None:
    weights = [(name.removesuffix(".weight"), model.get_parameter(name)) for name in names]
    wrong = [f"{name} ({W.dtype})" for name, W in weights if W.dtype not in DTYPES]
    if wrong:
        raise QuantizationError(
            "RW605",
            f"4-bit quantization takes float32, bfloat16 or float16, and not the weights of {some_of(wrong)}: convert "
            "them first, or name them in modules_to_not_convert.",
        )
    broken = [name for name, W in weights if not (W.is_meta or is_fake(W) or is_finite(W))]
    if broken:
        raise QuantizationError(
            "RW603",
            f"NaN or infinity in the weights of {some_of(broken)}: 4-bit types have no code for them. "
            "The checkpoint is damaged or the training that made it diverged; use a different one.",
        )


def is_finite(weight: Tensor) -> bool:
    """Whether the weight holds no NaN and no infinity."""
    # One cheap pass, and a second one only where the sum overflows or the weight is not finite.
    return bool(weight.sum(dtype=torch.float32).isfinite()) or bool(weight.isfinite().all())


def _mark(model: nn.Module, config: FourBitConfig) -> None:
    """Mark the model as quantized, for transformers' Trainer, ``save_pretrained`` and ``dequantize``."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        from rankwise.quantization.transformers_plugin import mark_quantized

        mark_quantized(model, config)

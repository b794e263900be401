"""Which layers become 4-bit and which stay dense, for a model in memory and for one that is about to load alike."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from rankwise.errors import QuantizationError, warn
from rankwise.quantization.config import FourBitConfig
from rankwise.quantization.linear import Linear4bit, is_dense_linear

HEAD_NAMES = ("lm_head", "embed_out")


def target_names(model: nn.Module, config: FourBitConfig) -> list[list[str]]:
    """The linear layers to quantize, each with all its names (a module may stand at several places).

    Output head, embeddings, what is tied to one of them, and ``modules_to_not_convert`` stay out.

    Raises:
        QuantizationError: RW610 when nothing is left, RW615 for a pattern that is no regular expression.
    """
    from transformers.quantizers.quantizers_utils import should_convert_module

    _check_patterns(model, config)
    patterns = [*dense_patterns(model), *(config.modules_to_not_convert or ())]
    tied = _tied_modules(model)
    chosen: dict[nn.Module, list[str]] = {}
    left_out: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if is_dense_linear(module):
            chosen.setdefault(module, []).append(name)
            if module in tied or not should_convert_module(name, patterns):
                left_out.add(module)
    names = [found for module, found in chosen.items() if module not in left_out]
    if not names:
        raise QuantizationError("RW610", _why_nothing(model, len(chosen)))
    return names


def _why_nothing(model: nn.Module, dense: int) -> str:
    kind = type(model).__name__
    if any(isinstance(module, Linear4bit) for module in model.modules()):
        return f"the linear layers of this {kind} are 4-bit already."
    if dense:
        return f"all {dense} linear layers of this {kind} are its head or excluded; shorten modules_to_not_convert."
    return f"this {kind} has no linear layers (nn.Linear or Conv1D); nothing can become 4-bit."


def dense_patterns(model: nn.Module) -> list[str]:
    """Names of what stays dense in any model, in the notation of transformers' ``should_convert_module``."""
    from transformers import PreTrainedModel
    from transformers.quantizers.base import get_keys_to_not_convert

    if isinstance(model, PreTrainedModel):
        found = [*get_keys_to_not_convert(model), *(model._keep_in_fp32_modules or ())]
    else:
        find: Any = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        found = [name for name, module in model.named_modules() if head is not None and module is head]
    return sorted({*found, *HEAD_NAMES})


def _check_patterns(model: nn.Module, config: FourBitConfig) -> None:
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.modules_to_not_convert or ():
        try:
            hit = re.compile(pattern)
        except re.error as error:
            raise QuantizationError(
                "RW615", f"modules_to_not_convert holds {pattern!r}, which is no regular expression: {error}."
            ) from None
        if not any(hit.match(name) or name.endswith(pattern) for name in names):
            warn("RW614", f"modules_to_not_convert names {pattern!r}, and the model has no such module.", stacklevel=3)


def _tied_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that share a parameter with another one."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def dense_linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_dense_linear(module)]


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def expert_tensors(model: nn.Module) -> list[str]:
    """Names of three-dimensional expert weights: no linear layer holds them, so they stay as they are."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name.lower()]


def warn_about_experts(model: nn.Module) -> None:
    experts = expert_tensors(model)
    if experts:
        size_bytes = sum(model.get_parameter(name).nbytes for name in experts)
        warn(
            "RW613",
            f"{len(experts)} expert tensors ({size_bytes / 1e9:.1f} GB, {experts[0]}, ...) stay in their dtype: "
            "experts stacked into one tensor are not quantized.",
            stacklevel=3,
        )

"""Which layers become 4-bit and which stay dense. The same rules hold for a model in memory and one being loaded."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from rankwise.compat.torch import own_parameters
from rankwise.compat.transformers import dense_by_default, heads_of_labels, is_converted
from rankwise.errors import QuantizationError, warn
from rankwise.quantization.config import FourBitConfig
from rankwise.quantization.experts import obstacle
from rankwise.quantization.linear import FourBitModule, Linear4bit, is_dense_linear
from rankwise.reports.numbers import byte_size

HEAD_NAMES = ("lm_head", "embed_out")


def target_names(model: nn.Module, config: FourBitConfig) -> list[list[str]]:
    """The linear layers to quantize, each with all its names (a module may have several).

    The output head, embeddings, modules tied to one of them, and ``modules_to_not_convert`` stay out.

    Raises:
        QuantizationError: RW610 when neither a layer nor a stack of experts (``target_stacks``) is left.
    """
    patterns = [*dense_patterns(model), *(config.modules_to_not_convert or ())]
    tied = _tied_modules(model)
    chosen: dict[nn.Module, list[str]] = {}
    left_out: set[nn.Module] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        # A weight that is not a parameter is recomputed in each forward pass (weight norm, pruning).
        if is_dense_linear(module) and "weight" in own_parameters(module):
            chosen.setdefault(module, []).append(name)
            if module in tied or not is_converted(name, patterns):
                left_out.add(module)
    names = [found for module, found in chosen.items() if module not in left_out]
    if not names and not target_stacks(model, config):
        raise QuantizationError(
            "RW610",
            f"none of the {len(chosen)} dense linear layers of this {type(model).__name__} can become 4-bit: its head "
            "and modules_to_not_convert stay as they are; give a dense model, or a shorter list.",
        )
    return names


def dense_patterns(model: nn.Module) -> list[str]:
    """Names of the modules that stay dense in any model, in the notation of transformers' ``should_convert_module``."""
    from transformers import PreTrainedModel

    if isinstance(model, PreTrainedModel):
        found = dense_by_default(model)
    else:
        find = getattr(model, "get_output_embeddings", None)
        head = find() if callable(find) else None
        found = [name for name, module in model.named_modules() if head is not None and module is head]
    return sorted({*found, *HEAD_NAMES, *heads_of_labels(model)})


def _tied_modules(model: nn.Module) -> set[nn.Module]:
    """Modules that share a parameter with a different module."""
    owners: dict[Tensor, list[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, []).append(module)
    return {module for modules in owners.values() if len(modules) > 1 for module in modules}


def dense_linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if is_dense_linear(module)]


def four_bit_modules(model: nn.Module) -> Iterator[FourBitModule]:
    """The modules that hold the scales and format of 4-bit weights: linear layers, and scales of stacked experts."""
    for module in model.modules():
        if isinstance(module, FourBitModule):
            yield module


def four_bit_layers(model: nn.Module) -> Iterator[tuple[str, Linear4bit]]:
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            yield name, module


def expert_tensors(model: nn.Module) -> list[str]:
    """Names of the dense stacked experts: three-dimensional parameters with "expert" in their name."""
    return [name for name, parameter in model.named_parameters() if parameter.dim() == 3 and "expert" in name.lower()]


def target_stacks(model: nn.Module, config: FourBitConfig) -> list[str]:
    """Names of the stacked experts to quantize: all that can be 4-bit, except ``modules_to_not_convert``."""
    return [name for name in _wanted_stacks(model, config) if _obstacle(model, name, config.block_size) is None]


def _wanted_stacks(model: nn.Module, config: FourBitConfig) -> list[str]:
    patterns = [*dense_patterns(model), *(config.modules_to_not_convert or ())]
    # A pattern may exclude the parameter or its module.
    return [
        name
        for name in expert_tensors(model)
        if all(is_converted(part, patterns) for part in (name, name.rpartition(".")[0]))
    ]


def _obstacle(model: nn.Module, name: str, block_size: int) -> str | None:
    path, _, leaf = name.rpartition(".")
    return obstacle(model.get_submodule(path), leaf, tuple(model.get_parameter(name).shape), block_size)


def warn_about_experts(model: nn.Module, config: FourBitConfig, *, stored: bool = False) -> None:
    """Warn (RW613) of experts that stay dense though none of them is excluded. ``stored``: read from a checkpoint."""
    reasons: dict[str, list[str]] = {}
    for name in _wanted_stacks(model, config):
        reason = _obstacle(model, name, config.block_size)
        if reason is None and stored:
            reason = "the checkpoint stores them dense"
        if reason is not None:
            reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        size_bytes = sum(model.get_parameter(name).nbytes for name in names)
        warn(
            "RW613",
            f"{len(names)} expert tensors ({byte_size(size_bytes)}, {names[0]}, ...) stay in their dtype: {reason}.",
            stacklevel=3,
        )


def is_finite(weight: Tensor) -> bool:
    """Whether the weight holds no NaN and no infinity."""
    # One cheap pass, and a second one only where the sum overflows or the weight is not finite.
    return bool(weight.sum().isfinite()) or bool(weight.isfinite().all())

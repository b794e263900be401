"""The real model with its real adapters on fake tensors, which have shapes and dtypes but no memory."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.acceleration import flattening_obstacle, optimize_for_training
from rankwise.compat.torch import is_fake, own_buffers, own_parameters
from rankwise.compat.transformers import kept_in_float32
from rankwise.config import DORA, FOUR_BITS
from rankwise.planning.card_attention import use_card_attention
from rankwise.planning.workload import Workload


def materialize(
    model: nn.Module, dtype: torch.dtype, *, fill: bool = False, device: torch.device | str = "cpu"
) -> None:
    """Move a model from the meta device to ``device``, as fake tensors where a fake mode is active.

    Floating parameters get ``dtype``, except in modules that the model keeps in float32; buffers keep their dtype. Tied
    parameters stay tied. ``fill``: use small random values, and zero in tensors that are not floating.
    """
    keep = kept_in_float32(model)
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def remade(tensor: Tensor, wanted: torch.dtype) -> Any:
        if id(tensor) not in made:
            # The reference to the old tensor keeps its id from being reused.
            made[id(tensor)] = (tensor, _empty_like(tensor, wanted, device, fill))
        return made[id(tensor)][1]

    for path, module in model.named_modules():
        for name, parameter in own_parameters(module).items():
            if parameter is not None:
                full = f"{path}.{name}"
                wanted = torch.float32 if any(part in full.split(".") for part in keep) else dtype
                own_parameters(module)[name] = remade(parameter, wanted)
        for name, buffer in own_buffers(module).items():
            if buffer is not None:
                own_buffers(module)[name] = remade(buffer, buffer.dtype)
        for name, value in list(vars(module).items()):
            # Some modules hold tensors that are not buffers, such as rotary embeddings' original frequencies.
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, remade(value, value.dtype))


@torch.no_grad()
def _empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device | str, fill: bool) -> Tensor:
    new = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)
    if fill:
        new = new.normal_(std=0.02) if new.is_floating_point() else new.zero_()
    return nn.Parameter(new, requires_grad=new.is_floating_point()) if isinstance(tensor, nn.Parameter) else new


def weights_dtype(method: str, workload: Workload) -> torch.dtype:
    """The dtype of the base. Full fine-tuning keeps float32 weights, because 16 bits would lose small updates."""
    return torch.float32 if method == "full" else getattr(torch, workload.dtype)


def prepare(model: PreTrainedModel, method: str, workload: Workload) -> bool:
    """Quantize, add the adapter and, with ``fast``, accelerate the model, as the trainer does. Returns whether the
    trainer would concatenate rows."""
    from rankwise.adapters import add_adapter
    from rankwise.adapters.layer import Origin
    from rankwise.adapters.state import DEFAULT_NAME, adapted_layers
    from rankwise.quantization import quantize
    from rankwise.quantization.config import CONFIGS

    if method in FOUR_BITS:
        kind = CONFIGS[workload.quant_type]
        quantize(model, kind(block_size=workload.block_size, double_quant=workload.double_quant))
    if method == "full":
        model.requires_grad_(True)
    else:
        config = workload.lora_config(use_dora=method in DORA)
        # Other initialisations need values, which fake tensors do not have.
        add_adapter(model, dataclasses.replace(config, init_lora_weights=True))
        for _, layer in adapted_layers(model, DEFAULT_NAME) if config.init.kind == "pissa" else ():
            pair = layer.adapter(DEFAULT_NAME)
            layer.origin = Origin(pair.lora_A.detach().clone(), pair.lora_B.detach().clone(), pair.scaling)
    if workload.gradient_checkpointing:
        with warnings.catch_warnings():
            # transformers renames it in 5.2x; the old name works in every version that we admit.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    flat = _accelerate(model, workload)
    model.train()
    return flat or workload.packing


def _accelerate(model: PreTrainedModel, workload: Workload) -> bool:
    done = optimize_for_training(model) if workload.fast else None
    stands_for_card = workload.device_type == "cuda" and next(model.parameters()).device.type == "cpu"
    if done is None or not done.attention:
        if stands_for_card:
            use_card_attention(model)
        return False
    # The CPU attention kernel does not support float16, to which autocast casts.
    if workload.dtype == "float16" and workload.device_type == "cpu":
        return False
    if is_fake(next(model.parameters())):
        # flattening_obstacle compares values; here the signature decides.
        names = inspect.signature(type(model).forward).parameters
        return {"position_ids", "logits_to_keep"} <= set(names) and not drops_attention(model)
    return flattening_obstacle(model) is None and not drops_attention(model)


def drops_attention(model: PreTrainedModel) -> bool:
    """Whether the model has dropout on attention weights. Training then uses a kernel that saves all weights, so rows
    are not concatenated, which would need the square of all tokens."""
    config = model.config
    return any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop"))

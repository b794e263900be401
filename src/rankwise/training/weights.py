"""Save and load the weights that a run trains: an adapter in PEFT's format, or a whole model."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from rankwise.adapters import adapter_parameters, has_adapter, load_tensors, save_adapter
from rankwise.adapters.inject import guest_of
from rankwise.adapters.saving import WEIGHTS_FILE
from rankwise.compat.torch import class_of, is_sharded, is_unit, own_part, own_rows
from rankwise.errors import RunError
from rankwise.training.checkpoints import check_no_pickles


def save_weights(model: nn.Module, folder: Path, gathered: dict[str, Tensor] | None = None) -> None:
    """Write the active adapter, what another distribution added, or the whole model (method full).

    ``gathered``: the state of a model whose shards train (``sharding.whole_weights``).
    """
    if has_adapter(model):
        save_adapter(model, folder)
    elif (guest := guest_of(model)) is not None:
        guest.save(model, folder)
    else:
        model.save_pretrained(folder, state_dict=gathered)  # type: ignore[operator]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy what ``save_weights`` wrote into the model's parameters, bit for bit.

    Raises RunError: RW512 for pickles, RW517 where the tensors do not fit this model.
    """
    check_no_pickles(folder)
    try:
        if has_adapter(model):
            load_tensors(model, safetensors.torch.load_file(folder / WEIGHTS_FILE))
        elif (guest := guest_of(model)) is not None:
            guest.load_weights(model, folder)
        else:
            _load_model(model, folder)
    except (OSError, KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise RunError("RW517", f"the weights in {folder} do not fit this run: {reason}.") from None


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything that trains; names as in the adapter's file where there is an adapter."""
    named = adapter_parameters(model).items() if has_adapter(model) else model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def weights_digest(model: nn.Module) -> str:
    """The sha256 of the bytes of all trained tensors that are not shards."""
    digest = hashlib.sha256()
    for parameter in trainable_tensors(model).values():
        if not is_sharded(parameter):
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_bytes(model: nn.Module) -> int:
    """The approximate size of a checkpoint: the trained weights and two float32 moments of each."""
    return sum(value.numel() * (value.element_size() + 8) for value in trainable_tensors(model).values())


@torch.no_grad()
def _load_model(model: nn.Module, folder: Path) -> None:
    # from_pretrained reads every layout that save_pretrained writes: split files, tied weights, renamed experts.
    stored: Any = class_of(model).from_pretrained(folder, dtype="auto", local_files_only=True)  # type: ignore[attr-defined]
    values = dict(stored.named_parameters())
    for unit in filter(is_unit, model.modules()):
        # After a forward pass without a backward pass, the model's parameters are gathered copies of its shards.
        unit.reshard()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if values[name].shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(values[name].shape)} and the model has {tuple(parameter.shape)}")
        value = own_rows(values[name], parameter) if is_sharded(parameter) else values[name]
        own_part(parameter).copy_(value)

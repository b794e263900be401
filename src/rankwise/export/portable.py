"""An adapter for any server: plain LoRA of one rank, with every scale folded into B.

dW = s B A is written as A' = A and B' = s B with r' = lora_alpha' = R, so that every reader's scale is 1; A' and B' are
padded with zeros to the rank R of all modules. Shapes: A (r, in), B (out, r); of E stacked experts (E, r, in) and
(E, out, r).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn

from rankwise.adapters.checkpoint import BELONGS_ON_FOUR_BITS, AdapterFile, load_tensors, stack_keys
from rankwise.adapters.experts import peft_A, peft_B
from rankwise.adapters.inject import attach
from rankwise.adapters.peft_config import CONFIG_FILE, to_peft
from rankwise.adapters.saving import (
    PREFIX,
    WEIGHTS_FILE,
    adapter_tensors,
    is_transposed,
    shortest_targets,
    tensor_keys,
)
from rankwise.adapters.state import AdapterReport, base_modules, report, state_and_name
from rankwise.errors import AdapterError, some_of
from rankwise.export.pairs import Pairs
from rankwise.lora_config import LoraConfig
from rankwise.records import write_bytes, write_json
from rankwise.serving import SERVERS, VLLM_RANKS


def live_adapter(model: nn.Module, name: str | None) -> AdapterFile:
    """An adapter of a model in memory (by default the active one), as if it had been read from a folder."""
    state, name = state_and_name(model, name)
    return AdapterFile(state.configs[name], list(report(model, name).modules), adapter_tensors(model, name))


def refuse_loftq(file: AdapterFile) -> None:
    if file.config.init.kind == "loftq":
        raise AdapterError(
            "RW433",
            f"the adapter started by loftq, {BELONGS_ON_FOUR_BITS}; write a merged model with rankwise merge --onto "
            "quantized.",
        )


def refuse_unserved(file: AdapterFile, target: str) -> None:
    """Raise AdapterError: RW730 for trained weights outside of low-rank pairs, and for stacked experts where the server
    does not support them; RW433 for LoftQ adapters."""
    refuse_loftq(file)
    whole = sorted(key.removeprefix(PREFIX) for key in file.tensors if ".lora_" not in key)
    stacks = [item.name for item in file.planned if item.experts is not None]
    if whole or (stacks and "experts" in SERVERS[target].refuses):
        what = f"holds more than pairs ({some_of(whole)})" if whole else f"adapts the stacked experts {some_of(stacks)}"
        raise AdapterError(
            "RW730",
            f"the adapter {what}, and {SERVERS[target].name} supports low-rank pairs of layers only; write a merged "
            "model with --merged, or with rankwise merge.",
        )


def check_rank(r: int, target: str) -> None:
    """Raise AdapterError (RW731) for a rank that the server cannot take."""
    if target == "vllm" and r > VLLM_RANKS[-1]:
        raise AdapterError(
            "RW731",
            f"vLLM supports ranks up to {VLLM_RANKS[-1]}, and this adapter has {r}; give a lower --rank, whose error "
            "is then stated, or write a merged model with --merged.",
        )


def attach_pairs(
    model: nn.Module, file: AdapterFile, pairs: Pairs, name: str, *, trainable: bool = True
) -> AdapterReport:
    """Add pairs of one rank to the model as the adapter ``name``, which becomes active."""
    r = next(iter(pairs.values())).r
    planned = [
        dataclasses.replace(item, kind="LoRA", r=r, lora_alpha=r, parts=None) for item in file.planned if item.is_pair
    ]
    made = attach(model, _portable_config(model, file, r), planned, name, trainable=trainable)
    load_tensors(model, _portable_tensors(model, file, pairs), name)
    return made


def _portable_config(model: nn.Module, file: AdapterFile, r: int) -> LoraConfig:
    """The configuration of the exported adapter: one rank, scale 1, the same modules."""
    names = [item.name for item in file.planned if item.experts is None and item.is_pair]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=shortest_targets(model, names),
        target_parameters=file.config.target_parameters,
    )


def _portable_tensors(model: nn.Module, file: AdapterFile, pairs: Pairs) -> dict[str, Tensor]:
    """The tensors of PEFT's file for pairs of one rank."""
    modules = dict(base_modules(model))
    tensors: dict[str, Tensor] = {}
    for item in file.planned:
        if not item.is_pair:
            continue
        pair = pairs[item.name]
        if item.experts is not None:
            by_name = {"lora_A": peft_A(pair.A), "lora_B": peft_B(pair.B)}
            keys = stack_keys(modules[item.path], item, file.planned)
        else:
            by_name = {"lora_A": pair.A, "lora_B": pair.B}
            keys = tensor_keys(item.name, modules[item.path], False)
        tensors |= {key: by_name[name].contiguous() for key, name in keys.items()}
    return dict(sorted(tensors.items()))


def write_portable(folder: Path, model: nn.Module, file: AdapterFile, pairs: Pairs, base_model: str | None) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` for pairs of one rank."""
    r = next(iter(pairs.values())).r
    config = _portable_config(model, file, r)
    modules = dict(base_modules(model))
    adapted = [modules[item.path] for item in file.planned if item.experts is None and item.is_pair]
    document = to_peft(config, config.target_modules or (), base_model, is_transposed(adapted))
    tensors = _portable_tensors(model, file, pairs)
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG_FILE, document)

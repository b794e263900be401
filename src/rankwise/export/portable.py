"""An adapter that every server reads: plain LoRA of one rank, with every scale folded into B.

dW = s B A is written as A' = A and B' = s B with r' = lora_alpha' = R, so that each reader's scale is 1; A' and B' are
padded with zeros to the rank R of all modules. Shapes: A (r, in), B (out, r); of E stacked experts (E, r, in) and
(E, out, r).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.attached import AdaptedModule, report
from rankwise.adapters.checkpoint import BELONGS_ON_FOUR_BITS, AdapterFile, stack_keys
from rankwise.adapters.experts import from_peft_A, from_peft_B, peft_A, peft_B
from rankwise.adapters.peft_config import CONFIG_FILE, to_peft
from rankwise.adapters.saving import (
    PREFIX,
    WEIGHTS_FILE,
    adapter_tensors,
    is_transposed,
    shortest_targets,
    tensor_keys,
)
from rankwise.adapters.state import base_modules, state_and_name
from rankwise.config import LoraConfig
from rankwise.errors import AdapterError
from rankwise.quantization.listing import some_of
from rankwise.records import write_bytes, write_json
from rankwise.serving import SERVERS, VLLM_RANKS


@dataclasses.dataclass(frozen=True)
class Pair:
    """``dW = B A`` of one module, or of each expert of a stack, in float32 on the CPU."""

    A: Tensor
    B: Tensor

    @property
    def r(self) -> int:
        return self.A.shape[-2]

    def padded(self, r: int) -> Pair:
        more = r - self.r
        return Pair(F.pad(self.A, (0, 0, 0, more)), F.pad(self.B, (0, more)))


Pairs = Mapping[str, Pair]
"""By the name of the module, or of the stack's parameter."""


def live_adapter(model: nn.Module, name: str | None) -> AdapterFile:
    """An adapter of a living model (by default the active one), as if it had been read from a folder."""
    state, name = state_and_name(model, name)
    return AdapterFile(state.configs[name], list(report(model, name).modules), adapter_tensors(model, name))


def refuse_unserved(file: AdapterFile, target: str) -> None:
    """Raise AdapterError: RW730 for trained weights that no low-rank pair can carry, and for experts' where the server
    takes none; RW433 for LoftQ's."""
    if file.config.init.kind == "loftq":
        raise AdapterError(
            "RW433",
            f"the adapter started by loftq, {BELONGS_ON_FOUR_BITS}; write a merged model with rankwise merge --onto "
            "quantized.",
        )
    whole = sorted(key.removeprefix(PREFIX) for key in file.tensors if ".lora_" not in key)
    stacks = [item.name for item in file.planned if item.experts is not None]
    if whole or (stacks and "experts" in SERVERS[target].refuses):
        what = f"trains {some_of(whole)} whole" if whole else f"adapts the stacked experts {some_of(stacks)}"
        raise AdapterError(
            "RW730",
            f"the adapter {what}, and {SERVERS[target].name} takes low-rank pairs of layers alone; write a merged "
            "model with --merged, or with rankwise merge.",
        )


def folded_pairs(model: nn.Module, file: AdapterFile) -> dict[str, Pair]:
    """The pairs of an adapter, scales folded into B; of DoRA's these are not the whole update. ``model`` may lie on
    the meta device."""
    return {name: Pair(pair.A, pair.B * s) for name, (pair, s) in scaled_pairs(model, file).items()}


def scaled_pairs(model: nn.Module, file: AdapterFile) -> dict[str, tuple[Pair, float]]:
    """The pairs of an adapter and their scales s."""
    modules = dict(base_modules(model))
    found = {}
    for item in file.planned:
        s = file.config.scaling(item.r, item.lora_alpha)
        if item.experts is not None:
            keys = {name: key for key, name in stack_keys(modules[item.path], item, file.planned).items()}
            A = from_peft_A(file.tensors[keys["lora_A"]], item.experts)
            B = from_peft_B(file.tensors[keys["lora_B"]], item.experts)
        elif not item.is_pair:
            continue
        else:
            A, B = (file.tensors[key] for key in tensor_keys(item.name, modules[item.path], False))
        found[item.name] = (Pair(A.float(), B.float()), s)
    return found


def check_rank(r: int, target: str) -> None:
    """Raise AdapterError (RW731) for a rank that the server cannot take."""
    if target == "vllm" and r > VLLM_RANKS[-1]:
        raise AdapterError(
            "RW731",
            f"vLLM takes ranks up to {VLLM_RANKS[-1]}, and this adapter has {r}; give a lower --rank, whose error is "
            "then stated, or write a merged model with --merged.",
        )


def portable_config(model: nn.Module, file: AdapterFile, r: int) -> LoraConfig:
    """The configuration of the exported adapter: one rank, scale 1, the same modules."""
    names = [item.name for item in file.planned if item.experts is None and item.is_pair]
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=shortest_targets(model, names),
        target_parameters=file.config.target_parameters,
    )


def portable_modules(file: AdapterFile, r: int) -> list[AdaptedModule]:
    return [
        dataclasses.replace(item, kind="LoRA", r=r, lora_alpha=r, parts=None) for item in file.planned if item.is_pair
    ]


def portable_tensors(model: nn.Module, file: AdapterFile, pairs: Pairs) -> dict[str, Tensor]:
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
    config = portable_config(model, file, r)
    modules = dict(base_modules(model))
    adapted = [modules[item.path] for item in file.planned if item.experts is None and item.is_pair]
    document = to_peft(config, config.target_modules or (), base_model, is_transposed(adapted))
    tensors = portable_tensors(model, file, pairs)
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, {"format": "pt"}))
    write_json(folder / CONFIG_FILE, document)


def to_one_rank(pairs: Pairs, r: int | None = None) -> dict[str, Pair]:
    """Padded with zeros to ``r``, by default to the largest rank."""
    largest = max(pair.r for pair in pairs.values())
    return {name: pair.padded(r or largest) for name, pair in pairs.items()}

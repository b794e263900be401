"""The low-rank pairs of adapters: read, written as plain LoRA for any server, and combined.

Shapes: W (out, in), A (r, in), B (out, r); of E stacked experts A (E, r, in) and B (E, out, r). For servers dW = s B A
is written as A' = A and B' = s B with r' = lora_alpha' = R, so that every reader's scale is 1; A' and B' are padded
with zeros to the rank R of all modules.

Several adapters are combined as by PEFT's ``add_weighted_adapter``. With weight w, scale s and pair (A, B) of each
adapter, and for each module over those that adapt it:

- cat     A = [w s A; ...], B = [B, ...]: exactly the weighted sum of the updates; its rank is the sum of the ranks
- svd     B = U_r S_r, A = V_r^T of the weighted sum  dW = sum w s B A: the closest of rank r
- linear  A = sum sign(w) sqrt(|w| s) A, B = sum sqrt(|w| s) B: cheap, and not the sum of the updates
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.checkpoint import BELONGS_ON_FOUR_BITS, AdapterFile, load_tensors, stack_keys
from rankwise.adapters.experts import from_peft_A, from_peft_B, peft_A, peft_B
from rankwise.adapters.folder import CONFIG_FILE, scaled_alpha, to_peft
from rankwise.adapters.inject import attach, check_name
from rankwise.adapters.saving import (
    PREFIX,
    adapter_tensors,
    is_transposed,
    mark_labels,
    shortest_targets,
    tensor_keys,
    write_tensors,
)
from rankwise.adapters.state import AdapterReport, base_modules, report, state_and_name
from rankwise.compat.transformers import heads_of_labels
from rankwise.errors import AdapterError, ConfigError, some_of
from rankwise.lora_config import LoraConfig
from rankwise.methods import METHODS
from rankwise.records import write_json
from rankwise.serving import EXPERT_PARTS, SERVERS, VLLM_EXPERTS, VLLM_RANKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


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


# {name of the module, or of the stack's parameter: pair}.
Pairs = Mapping[str, Pair]


def folded_pairs(model: nn.Module, file: AdapterFile) -> dict[str, Pair]:
    """The pairs of an adapter with scales folded into B, which for DoRA are not the whole update. ``model`` may be on
    the meta device."""
    return {name: Pair(pair.A, pair.B * s) for name, (pair, s) in scaled_pairs(model, file).items()}


def scaled_pairs(model: nn.Module, file: AdapterFile) -> dict[str, tuple[Pair, float]]:
    """The pairs of an adapter and their scales s."""
    modules = dict(base_modules(model))
    found = {}
    for item in file.planned:
        if not item.is_pair:
            continue
        if item.experts is not None:
            keys = {name: key for key, name in stack_keys(modules[item.path], item, file.planned).items()}
            A = from_peft_A(file.tensors[keys["lora_A"]], item.experts)
            B = from_peft_B(file.tensors[keys["lora_B"]], item.experts)
        else:
            A, B = (file.tensors[key] for key in tensor_keys(item.name, modules[item.path]))
        found[item.name] = Pair(A.float(), B.float()), file.config.scaling(item.r, item.lora_alpha)
    return found


def to_one_rank(pairs: Pairs, r: int | None = None) -> dict[str, Pair]:
    """The pairs, padded with zeros to rank ``r`` (default: the largest rank)."""
    largest = max(pair.r for pair in pairs.values())
    return {name: pair.padded(r or largest) for name, pair in pairs.items()}


def live_adapter(model: nn.Module, name: str | None) -> AdapterFile:
    """An adapter of a model in memory (by default the active one), as if it had been read from a folder."""
    state, name = state_and_name(model, name)
    config, modules = state.configs[name], list(report(model, name).modules)
    if config.init.kind == "pissa":
        # Its file holds twice the rank, for the weights that it started from.
        alpha = scaled_alpha(config)
        modules = [dataclasses.replace(item, r=2 * item.r, lora_alpha=alpha(item.lora_alpha, 2)) for item in modules]
    return AdapterFile(config, modules, adapter_tensors(model, name))


def refuse_apart(file: AdapterFile) -> None:
    """Raise AdapterError (RW433) for an adapter that is right only over the weights on which it was trained."""
    if file.config.for_merge is not None:
        raise AdapterError(
            "RW433",
            f"the adapter was trained for a merged file in {file.config.for_merge}, whose rounding it counts on; write "
            "that with rankwise merge.",
        )
    if file.config.init.kind == "loftq":
        raise AdapterError(
            "RW433",
            f"the adapter started by loftq, {BELONGS_ON_FOUR_BITS}; write a merged model with rankwise merge --onto "
            "quantized.",
        )


def head_tensors(model: nn.Module, file: AdapterFile) -> dict[str, Tensor]:
    """The trained head of labels, which an adapter's file holds whole."""
    heads = tuple(f"{PREFIX}{name}." for name in heads_of_labels(model))
    return {key: tensor for key, tensor in file.tensors.items() if key.startswith(heads)}


def refuse_unserved(model: PreTrainedModel, file: AdapterFile, target: str) -> None:
    """Raise AdapterError: RW730 for trained weights outside of low-rank pairs and of a head that the server takes, and
    for stacked experts where it does not support them; RW433 for adapters that are right over
    their own base only."""
    refuse_apart(file)
    heads, taken = head_tensors(model, file), SERVERS[target].heads
    is_taken = target == "peft" or all(key.removeprefix(PREFIX).rpartition(".")[0] in taken for key in heads)
    ours = heads if is_taken else {}
    whole = sorted(key.removeprefix(PREFIX) for key in file.tensors if ".lora_" not in key and key not in ours)
    stacks = [item for item in file.planned if item.experts is not None]
    supported, refused = "low-rank pairs of layers", "experts" in SERVERS[target].refuses
    if target == "vllm":
        supported += f", and of experts on gate, up and down together, in {', '.join(VLLM_EXPERTS)},"
        both = len(stacks) == 2 * len({item.path for item in stacks})
        refused = not (both and model.config.model_type in VLLM_EXPERTS)
    if whole or (stacks and refused):
        names = some_of([item.name for item in stacks])
        what = f"holds more than pairs ({some_of(whole)})" if whole else f"adapts the stacked experts {names}"
        raise AdapterError(
            "RW730",
            f"the adapter {what}, and {SERVERS[target].name} supports {supported} only; write a merged model with "
            "--merged, or with rankwise merge.",
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
        modules_to_save=heads_of_labels(model) or None,
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
            keys = tensor_keys(item.name, modules[item.path])
        tensors |= {key: by_name[name].contiguous() for key, name in keys.items()}
    return dict(sorted(tensors.items()))


def write_portable(
    folder: Path, model: PreTrainedModel, file: AdapterFile, pairs: Pairs, base_model: str | None, target: str = "peft"
) -> None:
    """``adapter_config.json`` and ``adapter_model.safetensors`` for pairs of one rank."""
    r = next(iter(pairs.values())).r
    config = _portable_config(model, file, r)
    modules = dict(base_modules(model))
    adapted = [modules[item.path] for item in file.planned if item.experts is None and item.is_pair]
    apart: dict[str, Tensor] = {}
    if target == "vllm" and VLLM_EXPERTS.get(model.config.model_type) == "one by one":
        apart = _experts_apart(file, pairs)
        file = dataclasses.replace(file, planned=[item for item in file.planned if item.experts is None])
    document = to_peft(config, config.target_modules or (), base_model, is_transposed(adapted))
    if apart:
        document |= {"target_parameters": None, "target_modules": [*document["target_modules"], *EXPERT_PARTS]}
    tensors = {**_portable_tensors(model, file, pairs), **apart, **head_tensors(model, file)}
    metadata = {"format": "pt"}
    mark_labels(model, document, metadata)
    write_tensors(folder, tensors, metadata)
    write_json(folder / CONFIG_FILE, document)


def _experts_apart(file: AdapterFile, pairs: Pairs) -> dict[str, Tensor]:
    """The tensors of stacks as of a linear layer of each expert: gate and up share A, and have half of B each."""
    tensors = {}
    for item in file.planned:
        if item.experts is not None:
            pair = pairs[item.name]
            parts = EXPERT_PARTS[:2] if item.leaf == "gate_up_proj" else EXPERT_PARTS[2:]
            for part, B in zip(parts, pair.B.chunk(len(parts), dim=1)):
                for index in range(item.experts):
                    start = f"{PREFIX}{item.path}.{index}.{part}"
                    tensors[f"{start}.lora_A.weight"] = pair.A[index].clone()
                    tensors[f"{start}.lora_B.weight"] = B[index].clone()
    return tensors


Way = Literal["linear", "cat", "svd"]


@dataclasses.dataclass(frozen=True)
class Combination:
    """How adapters are combined. ``rank`` (svd): by default the adapters' largest."""

    weights: Sequence[float]
    way: Way = "linear"
    rank: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.way not in get_args(Way):
            problems.append(f"there is no way {self.way!r} to combine; give one of {', '.join(get_args(Way))}")
        if self.rank is not None and (self.way != "svd" or self.rank < 1):
            problems.append(f"a rank ({self.rank}) is only for svd, from 1")
        if not all(math.isfinite(weight) for weight in self.weights):
            problems.append(f"the weights are {list(self.weights)}; give numbers")
        if problems:
            raise ConfigError("RW750", "; ".join(problems) + ".")


def combine_adapters(
    model: PreTrainedModel,
    adapters: Sequence[str],
    weights: Sequence[float],
    *,
    name: str = "combined",
    combine: Way = "linear",
    rank: int | None = None,
) -> AdapterReport:
    """Combine loaded adapters into a new one, which becomes active, as PEFT's ``add_weighted_adapter`` does.

    Args:
        model: A model with several loaded LoRA adapters.
        adapters: The names of the adapters to combine.
        weights: A factor for each adapter.
        name: The name of the new adapter.
        combine: ``linear``, ``cat`` or ``svd`` (PEFT's ``combination_type``).
        rank: The rank of the result of ``svd`` (PEFT's ``svd_rank``).

    Returns:
        The modules of the new adapter, as ``add_adapter`` does.

    Raises:
        ConfigError: RW750, options that do not belong together.
        AdapterError: RW405 a name that is taken, RW407 an adapter that is not loaded, RW751 DoRA, experts, trained
            weights, or ranks that cannot be added.
    """
    files = [live_adapter(model, each) for each in adapters]
    pairs, file = combined(model, files, Combination(weights, combine, rank))
    check_name(model, file.config, name)
    return attach_pairs(model, file, pairs, name)


@torch.no_grad()
def combined(
    model: nn.Module, files: Sequence[AdapterFile], wanted: Combination
) -> tuple[dict[str, Pair], AdapterFile]:
    """The pairs of the combination, padded to one rank, and the modules that it adapts. ``model`` may be on the meta
    device."""
    if not files or len(files) != len(wanted.weights):
        raise ConfigError("RW750", f"{len(files)} adapters and {len(wanted.weights)} weights; give one for each.")
    for file in files:
        _refuse(file)
    found = [scaled_pairs(model, file) for file in files]
    items = {item.name: item for file in files for item in file.planned}
    ranks = [max(item.r * sum(item.parts or (1,)) for item in file.planned) for file in files]
    r = sum(ranks) if wanted.way == "cat" else wanted.rank or max(ranks)
    pairs = {}
    for path in [path for path, _ in base_modules(model) if path in items]:
        here = [(*one[path], w) for one, w in zip(found, wanted.weights) if path in one]
        pairs[path] = _pair(here, wanted, r, path)
    planned = [items[path] for path in pairs]
    return to_one_rank(pairs, r), AdapterFile(LoraConfig(r=r, lora_alpha=r), planned, {})


def _refuse(file: AdapterFile) -> None:
    refuse_apart(file)
    other = sorted(key for key in file.tensors if ".lora_" not in key)
    stacks = [item.name for item in file.planned if item.experts is not None]
    if (kind := file.config.kind) != "lora" or other or stacks:
        what = f"is {METHODS[kind].words}" if kind != "lora" else f"trains {some_of(other or stacks)}"
        raise AdapterError(
            "RW751",
            f"one of the adapters {what}, and only plain LoRA of layers can be combined; write DoRA as LoRA first "
            "(rankwise export --for peft), or merge them one after the other.",
        )


# (pair, s, w) of one adapter on one module.
Scaled = tuple[Pair, float, float]


def _pair(here: Sequence[Scaled], wanted: Combination, r: int, path: str) -> Pair:
    if wanted.way == "cat":
        A = torch.cat([pair.A * w * s for pair, s, w in here], dim=0)
        return Pair(A, torch.cat([pair.B for pair, _, _ in here], dim=1))
    if wanted.way == "svd":
        dW = torch.stack([w * s * (pair.B @ pair.A) for pair, s, w in here]).sum(dim=0)
        U, S, Vh = torch.linalg.svd(dW, full_matrices=False)
        return Pair(Vh[:r].contiguous(), U[:, :r] * S[:r])
    if len({pair.r for pair, _, _ in here}) > 1:
        ranks = ", ".join(str(pair.r) for pair, _, _ in here)
        raise AdapterError(
            "RW751", f"{path} has adapters of the ranks {ranks}, which {wanted.way} cannot add; take cat or svd."
        )
    roots = [math.sqrt(abs(w) * s) for _, s, w in here]
    signed = [math.copysign(root, w) for root, (_, _, w) in zip(roots, here)]
    return Pair(_sum([pair.A for pair, _, _ in here], signed), _sum([pair.B for pair, _, _ in here], roots))


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return (torch.stack(list(tensors)) * torch.tensor(weights)[:, None, None]).sum(dim=0)

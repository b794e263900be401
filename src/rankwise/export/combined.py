"""Combine several adapters into one, as PEFT's ``add_weighted_adapter`` does.

With weight w, scale s and pair (A, B) of each adapter, and for each module over those that adapt it:

- cat     A = [w s A; ...], B = [B, ...]: exactly the weighted sum of the updates; its rank is the sum of the ranks
- svd     B = U_r S_r, A = V_r^T of the weighted sum  dW = sum w s B A: the closest of rank r
- linear  A = sum sign(w) sqrt(|w| s) A, B = sum sqrt(|w| s) B: cheap, and not the sum of the updates
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import Tensor, nn

from rankwise.adapters.checkpoint import BELONGS_ON_FOUR_BITS, AdapterFile
from rankwise.adapters.inject import check_name
from rankwise.adapters.state import AdapterReport, base_modules
from rankwise.errors import AdapterError, ConfigError, some_of
from rankwise.export.pairs import Pair, scaled_pairs, to_one_rank
from rankwise.export.portable import attach_pairs, live_adapter, write_portable
from rankwise.lora_config import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
            problems.append(f"a rank ({self.rank}) is chosen for svd alone, from 1")
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
        AdapterError: RW405 a name that is taken, RW407 an adapter that is not loaded, RW751 DoRA, experts or trained
            weights, RW752 ranks that cannot be added.
    """
    files = [live_adapter(model, each) for each in adapters]
    pairs, file = combined(model, files, Combination(weights, combine, rank))
    check_name(model, file.config, name)
    return attach_pairs(model, file, pairs, name)


def combine_folders(
    model: nn.Module, files: Sequence[AdapterFile], wanted: Combination, folder: Path, base_model: str | None
) -> int:
    """Write the combination of adapters as one PEFT folder and return its rank. ``model`` may be on the meta device."""
    pairs, file = combined(model, files, wanted)
    write_portable(folder, model, file, pairs, base_model)
    return next(iter(pairs.values())).r


@torch.no_grad()
def combined(
    model: nn.Module, files: Sequence[AdapterFile], wanted: Combination
) -> tuple[dict[str, Pair], AdapterFile]:
    """The pairs of the combination, padded to one rank, and the modules that it adapts."""
    if not files or len(files) != len(wanted.weights):
        raise ConfigError("RW750", f"{len(files)} adapters and {len(wanted.weights)} weights; give one for each.")
    for file in files:
        _refuse(file)
    found = [scaled_pairs(model, file) for file in files]
    items = {item.name: item for file in files for item in file.planned}
    r = _rank(files, wanted)
    pairs = {}
    for path in [path for path, _ in base_modules(model) if path in items]:
        here = [(*one[path], w) for one, w in zip(found, wanted.weights) if path in one]
        pairs[path] = _pair(here, wanted, r, path)
    planned = [items[path] for path in pairs]
    return to_one_rank(pairs, r), AdapterFile(LoraConfig(r=r, lora_alpha=r), planned, {})


def _refuse(file: AdapterFile) -> None:
    if file.config.init.kind == "loftq":
        raise AdapterError(
            "RW433", f"one of the adapters started by loftq, {BELONGS_ON_FOUR_BITS}; merge it with --onto quantized."
        )
    other = sorted(key for key in file.tensors if ".lora_" not in key)
    stacks = [item.name for item in file.planned if item.experts is not None]
    if file.config.use_dora or other or stacks:
        what = "is DoRA" if file.config.use_dora else f"trains {some_of(other or stacks)}"
        raise AdapterError(
            "RW751",
            f"one of the adapters {what}, and only plain LoRA of layers can be combined; write DoRA as LoRA first "
            "(rankwise export --for peft), or merge them one after the other.",
        )


def _rank(files: Sequence[AdapterFile], wanted: Combination) -> int:
    ranks = [max(item.r * sum(item.parts or (1,)) for item in file.planned) for file in files]
    if wanted.way == "cat":
        return sum(ranks)
    return wanted.rank or max(ranks)


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
            "RW752", f"{path} has adapters of the ranks {ranks}, which {wanted.way} cannot add; take cat or svd."
        )
    roots = [math.sqrt(abs(w) * s) for _, s, w in here]
    signed = [math.copysign(root, w) for root, (_, _, w) in zip(roots, here)]
    return Pair(_sum([pair.A for pair, _, _ in here], signed), _sum([pair.B for pair, _, _ in here], roots))


def _sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    return (torch.stack(list(tensors)) * torch.tensor(weights)[:, None, None]).sum(dim=0)

"""The low-rank pairs of an adapter's file, and the changes of the base's weights that they give.

Shapes: W (out, in), A (r, in), B (out, r); of E stacked experts A (E, r, in) and B (E, out, r).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.adapters.checkpoint import AdapterFile, stack_keys
from rankwise.adapters.experts import from_peft_A, from_peft_B
from rankwise.adapters.low_rank import enabled_rows, merged_weight
from rankwise.adapters.saving import PREFIX, tensor_keys
from rankwise.adapters.state import AdaptedModule, base_modules


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
            A, B = (file.tensors[key] for key in tensor_keys(item.name, modules[item.path], False))
        found[item.name] = Pair(A.float(), B.float()), file.config.scaling(item.r, item.lora_alpha)
    return found


def to_one_rank(pairs: Pairs, r: int | None = None) -> dict[str, Pair]:
    """The pairs, padded with zeros to rank ``r`` (default: the largest rank)."""
    largest = max(pair.r for pair in pairs.values())
    return {name: pair.padded(r or largest) for name, pair in pairs.items()}


# A function from a weight to its new value.
Change = Callable[[Tensor], Tensor]


def merging(item: AdaptedModule, file: AdapterFile, scaled: tuple[Pair, float], order: Change | None = None) -> Change:
    """The change W -> ``W + s B A``, or DoRA's, of a layer's weight W (out, in), whose rows are in ``order``."""
    (pair, s), m = scaled, file.tensors.get(f"{PREFIX}{item.name}.lora_magnitude_vector")
    B, rows = pair.B, None if item.parts is None else enabled_rows(item.parts, item.out_features)
    if order is not None:
        B, m = order(B), None if m is None else order(m)
    return partial(merged_weight, A=pair.A, B=B, s=s, m=m, adapted_rows=rows)


def transposed(change: Change) -> Change:
    """``change`` applied to a weight that is stored transposed."""
    return lambda W: change(W.T).T


def replaced_by(value: Tensor) -> Change:
    """The change of a weight to the trained ``value``, in the weight's layout."""
    return lambda W: value.to(W.dtype).reshape(W.shape)

"""Change a base's stacked experts as whole stacks, whatever tensors its files hold.

Training quantizes and adapts the stack (E, N, K) that transformers makes of a layer's experts, with one mean over all
its scales, and with gate and up in one matrix; files mostly hold a tensor for each expert. So a stack is built as in
loading, changed, and split as in saving, both by transformers' rules for the family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from rankwise.compat.transformers import Conversion, collected, converted, taken_apart
from rankwise.errors import ModelError
from rankwise.export.pairs import Change
from rankwise.ops import dequantize_weight, quantize_weight
from rankwise.quantization.config import FourBitConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Number of stacks in memory: files are ordered by expert within a layer, so two stacks are read together.
KEPT = 2


class Weights(Protocol):
    """The tensors of a folder, by their names there."""

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor: ...


def rounding(config: FourBitConfig, dtype: torch.dtype | None) -> Change:
    """The change that rounds a stack to 4 bits as in training. ``dtype``: that of the weights in training, None for the
    stored one."""

    def rounded(W: Tensor) -> Tensor:
        W = W.to(dtype or W.dtype).contiguous()
        return dequantize_weight(quantize_weight(W, config.quant_type, config.block_size, config.double_quant))

    return rounded


class StackedExperts:
    """The tensors in the files that become stacks of ``skeleton``, a transformers model on the meta device, with what
    becomes of each stack: {name of its parameter: change}.
    """

    def __init__(self, skeleton: PreTrainedModel, weights: Weights, wanted: Mapping[str, Change]) -> None:
        self._skeleton, self._weights, self._wanted = skeleton, weights, wanted
        self._sources = _sources(skeleton, weights.names(), set(wanted))
        self._made: dict[str, dict[str, Tensor]] = {}

    def changes(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """(name in the files, what becomes of it). Raises ModelError (RW308) for stacks that the files do not hold; and
        then, for one of which a part is missing, or is not there under the name that transformers gives it."""
        missing = [stack for stack in self._wanted if stack not in self._sources]
        if missing:
            raise ModelError("RW308", f"the files hold no tensor for {', '.join(missing)}; give the whole model.")
        for stack, parts in self._sources.items():
            for name, _ in parts:
                yield name, partial(self._part, stack, name)

    def _part(self, stack: str, name: str, stored: Tensor) -> Tensor:
        if stack not in self._made:
            while len(self._made) >= KEPT:
                del self._made[next(iter(self._made))]
            self._made[stack] = self._parts(stack)
        found = self._made[stack].get(name)
        if found is None:
            raise ModelError(
                "RW308",
                f"the files hold {name} for {stack}, which transformers saves as {', '.join(self._made[stack])}; "
                "load the model and save it once.",
            )
        return found.to(stored.dtype)

    def _parts(self, stack: str) -> dict[str, Tensor]:
        parts = self._sources[stack]
        name, conversion = parts[0]
        if conversion is None:
            return {name: self._changed(stack, self._weights.tensor(name))}
        readers = [(found, partial(self._weights.tensor, name)) for name, found in parts if found is not None]
        whole = converted(self._skeleton, stack, readers)
        return taken_apart(self._skeleton, stack, self._changed(stack, whole))

    def _changed(self, stack: str, W: Tensor) -> Tensor:
        shape = self._skeleton.get_parameter(stack).shape
        if W.shape != shape:
            raise ModelError(
                "RW308",
                f"the files hold {tuple(W.shape)} for {stack}, which is {tuple(shape)}; give the whole model.",
            )
        return self._wanted[stack](W)


# Name in the files; the conversion that takes the tensor, or None where it is the stack itself.
Part = tuple[str, Conversion | None]


def _sources(skeleton: PreTrainedModel, names: Collection[str], stacks: set[str]) -> dict[str, list[Part]]:
    """{stack: what it is made of}, in the order in which loading collects it."""
    found: dict[str, list[Part]] = {}
    for name, stack, conversion in collected(skeleton, names) if stacks else ():
        if stack in stacks:
            found.setdefault(stack, []).append((name, conversion))
    return found

"""A base's experts rounded to 4 bits as training rounded them, whatever tensors its files keep them in.

Training quantizes the stack (E, N, K) that transformers makes of a layer's experts, with one mean over all its scales;
files mostly hold a tensor for each expert. So a stack is made as loading makes it, rounded, and taken apart as saving
does, both by transformers' own rules for the family.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from rankwise.errors import ModelError
from rankwise.quantization.config import FourBitConfig
from rankwise.quantization.linear import rounded_to_4bit
from rankwise.quantization.targets import target_stacks

KEPT = 2
# Stacks at a time: files go through a layer expert by expert, and so through two stacks at once.


class Weights(Protocol):
    """The tensors of a folder, by their names there."""

    def names(self) -> list[str]: ...

    def tensor(self, name: str) -> Tensor: ...


class RoundedExperts:
    """The tensors in the files that become 4-bit experts of ``skeleton``, a transformers model on the meta device.

    ``dtype``: that of the weights when training quantized them; None: as they are stored.
    """

    def __init__(self, skeleton: Any, weights: Weights, config: FourBitConfig, dtype: torch.dtype | None) -> None:
        self._skeleton, self._weights, self._config, self._dtype = skeleton, weights, config, dtype
        self._sources = _sources(skeleton, weights.names(), set(target_stacks(skeleton, config)))
        self._made: dict[str, dict[str, Tensor]] = {}

    def changes(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """(name in the files, what becomes of it). Raises ModelError (RW308), then, where a part of a stack is not in
        the files under the name that transformers gives it."""
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
        from transformers.core_model_loading import revert_weight_conversion

        parts = self._sources[stack]
        if parts[0][1] is None:
            return {parts[0][0]: self._rounded(self._weights.tensor(parts[0][0]))}
        converter = copy.deepcopy(parts[0][1][0])
        for name, found in parts:
            assert found is not None
            converter.add_tensor(stack, name, found[1], partial(self._weights.tensor, name))
        made = converter.convert(stack, model=self._skeleton, config=self._skeleton.config)
        whole = next(iter(made.values()))
        return revert_weight_conversion(self._skeleton, {stack: self._rounded(whole)})

    def _rounded(self, W: Tensor) -> Tensor:
        config = self._config
        return rounded_to_4bit(W.to(self._dtype or W.dtype), config.quant_type, config.block_size, config.double_quant)


Part = tuple[str, tuple[Any, str] | None]
"""Name in the files; the converter that takes it and its pattern for it, or None where it is the stack itself."""


def _sources(skeleton: Any, names: Collection[str], stacks: set[str]) -> dict[str, list[Part]]:
    """{stack: what it is made of}, in the order in which loading collects it."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping = get_model_conversion_mapping(skeleton)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    converters = [item for item in mapping if isinstance(item, WeightConverter)]
    owners = {pattern: item for item in converters for pattern in item.source_patterns}
    state = skeleton.state_dict()
    found: dict[str, list[Part]] = {}
    for name in sorted(names, key=dot_natural_key) if stacks else ():
        stack, pattern = rename_source_key(name, renamings, converters, skeleton.base_model_prefix, state)
        if stack in stacks:
            found.setdefault(stack, []).append((name, None if pattern is None else (owners[pattern], pattern)))
    return found

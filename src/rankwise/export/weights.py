"""The tensors of a model folder, read and written one at a time: plain, or converted.

Training quantizes and adapts the stack (E, N, K) that transformers makes of a layer's experts, with one mean over all
its scales, and with gate and up in one matrix; files mostly hold a tensor for each expert. Other files hold one tensor
for several layers (q, k and v). So parameters are made as in loading, changed, and taken apart as in saving, both by
transformers' rules for the family.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from rankwise.compat.transformers import Conversion, collected, converted, made_together, taken_apart
from rankwise.disk import whole_file
from rankwise.errors import ModelError
from rankwise.export.pairs import Change
from rankwise.models.folder import existing_weights, read_config
from rankwise.ops import dequantize_weight, quantize_weight
from rankwise.quantization.config import FourBitConfig
from rankwise.weights_file import TensorInfo, read_header

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class ShardedWeights:
    """Tensors of ``model.safetensors`` or of the shards that its index names, by the names in the files. Raises
    ModelError: RW302, RW305, RW306 a folder that holds no whole model."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, TensorInfo]] = {
            file: dict(read_header(folder / file).tensors) for file in existing_weights(folder, read_config(folder))
        }
        self._home = {name: file for file, tensors in self.files.items() for name in tensors}

    def __contains__(self, name: str) -> bool:
        return name in self._home

    def names(self) -> list[str]:
        return list(self._home)

    def info(self, name: str) -> TensorInfo:
        return self.files[self._home[name]][name]

    def tensor(self, name: str) -> Tensor:
        """A copy-on-write view into the mapped file: nothing is held once the caller lets go of it."""
        with safe_open(self.folder / self._home[name], framework="pt") as file:
            return file.get_tensor(name)


ALIGNMENT = 8

# {name: (dtype as safetensors names it, shape)}, in the order in which the tensors are written.
Shapes = Mapping[str, tuple[str, tuple[int, ...]]]


def write_safetensors(path: Path, shapes: Shapes, tensor: Callable[[str], Tensor], metadata: Mapping[str, str]) -> None:
    """Write the tensors that ``shapes`` announces, asking ``tensor(name)`` for one at a time.

    The file appears under its name only when it is whole.
    """
    with whole_file(path) as file:
        file.write(_header(shapes, metadata))
        for name in shapes:
            file.write(_bytes(tensor(name)))


def bytes_of(shapes: Iterable[tuple[str, tuple[int, ...]]]) -> int:
    """Bytes of the data of tensors of these dtypes and shapes."""
    return sum(_size(dtype, shape) for dtype, shape in shapes)


def _header(shapes: Shapes, metadata: Mapping[str, str]) -> bytes:
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    end = 0
    for name, (dtype, shape) in shapes.items():
        begin, end = end, end + _size(dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def _size(dtype: str, shape: tuple[int, ...]) -> int:
    return TensorInfo(dtype, shape).size_bytes


def _bytes(tensor: Tensor) -> memoryview:
    # The library knows every dtype's bytes (bfloat16 has no numpy type); its own header is cut off.
    whole = save({"t": tensor.contiguous()})
    (length,) = struct.unpack("<Q", whole[:8])
    return memoryview(whole)[8 + length :]


# Number of conversions in memory: files are ordered by expert within a layer, so two stacks are read together.
KEPT = 2


def rounding(config: FourBitConfig, dtype: torch.dtype | None) -> Change:
    """The change that rounds a stack to 4 bits as in training. ``dtype``: that of the weights in training, None for the
    stored one."""

    def rounded(W: Tensor) -> Tensor:
        W = W.to(dtype or W.dtype).contiguous()
        return dequantize_weight(quantize_weight(W, config.quant_type, config.block_size, config.double_quant))

    return rounded


class ConvertedParameters:
    """The tensors in the files of which loading makes parameters of ``skeleton``, a transformers model on the meta
    device, with what becomes of each parameter: {its name: change}.
    """

    def __init__(self, skeleton: PreTrainedModel, weights: ShardedWeights, wanted: Mapping[str, Change]) -> None:
        self._skeleton, self._weights, self._wanted = skeleton, weights, wanted
        self._sources = _sources(skeleton, weights.names(), set(wanted))
        self._made: dict[str, dict[str, Tensor]] = {}

    def changes(self) -> Iterator[tuple[str, Callable[[Tensor], Tensor]]]:
        """(name in the files, what becomes of it). Raises ModelError (RW308) for parameters that the files do not hold;
        and then, for one of which a part is missing, or is not there under the name that transformers gives it."""
        there = {one for first, parts in self._sources.items() for one in made_together(first, parts[0][1])}
        missing = [parameter for parameter in self._wanted if parameter not in there]
        if missing:
            raise ModelError("RW308", f"the files hold no tensor for {', '.join(missing)}; give the whole model.")
        for first, parts in self._sources.items():
            for name, _ in parts:
                yield name, partial(self._part, first, name)

    def _part(self, first: str, name: str, stored: Tensor) -> Tensor:
        if first not in self._made:
            while len(self._made) >= KEPT:
                del self._made[next(iter(self._made))]
            self._made[first] = self._parts(first)
        found = self._made[first].get(name)
        if found is None:
            raise ModelError(
                "RW308",
                f"the files hold {name} for {first}, which transformers saves as {', '.join(self._made[first])}; "
                "load the model and save it once.",
            )
        return found.to(stored.dtype)

    def _parts(self, first: str) -> dict[str, Tensor]:
        parts = self._sources[first]
        name, conversion = parts[0]
        if conversion is None:
            return {name: self._changed(first, self._weights.tensor(name))}
        readers = [(found, partial(self._weights.tensor, name)) for name, found in parts if found is not None]
        made = converted(self._skeleton, first, readers)
        return taken_apart(self._skeleton, {parameter: self._changed(parameter, W) for parameter, W in made.items()})

    def _changed(self, parameter: str, W: Tensor) -> Tensor:
        shape = self._skeleton.get_parameter(parameter).shape
        if W.shape != shape:
            raise ModelError(
                "RW308",
                f"the files hold {tuple(W.shape)} for {parameter}, which is {tuple(shape)}; give the whole model.",
            )
        return self._wanted[parameter](W) if parameter in self._wanted else W


# Name in the files; the conversion that takes the tensor, or None if it is the parameter itself.
Part = tuple[str, Conversion | None]


def _sources(skeleton: PreTrainedModel, names: Collection[str], wanted: set[str]) -> dict[str, list[Part]]:
    """{first parameter that a conversion makes: what it is made of}, in the order in which loading collects it."""
    found: dict[str, list[Part]] = {}
    for name, first, conversion in collected(skeleton, names) if wanted else ():
        if wanted.intersection(made_together(first, conversion)):
            found.setdefault(first, []).append((name, conversion))
    return found

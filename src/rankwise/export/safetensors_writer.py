"""Write a safetensors file tensor by tensor, so that a model larger than memory can be changed while it is copied."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from rankwise.disk import whole_file
from rankwise.weights_file import BITS

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
    return prod(shape) * BITS[dtype] // 8


def _bytes(tensor: Tensor) -> memoryview:
    # The library knows every dtype's bytes (bfloat16 has no numpy type); its own header is cut off.
    whole = save({"t": tensor.contiguous()})
    (length,) = struct.unpack("<Q", whole[:8])
    return memoryview(whole)[8 + length :]

"""Read a bitsandbytes checkpoint as a dense model, one tensor at a time."""

from __future__ import annotations

from collections.abc import Collection
from math import prod
from pathlib import Path

from torch import Tensor

from rankwise.export.shards import ShardedWeights
from rankwise.ops import dequantize_weight
from rankwise.quantization.bitsandbytes_format import PARTS, StoredWeight, from_bitsandbytes
from rankwise.quantization.checkpoint import stored_weights
from rankwise.weights_file import TensorInfo

_CODES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


class DequantizedWeights:
    """`ShardedWeights` of the same files, with every 4-bit weight as one dense tensor in its original dtype.

    ``transposed`` names the weights that the dense model stores as (in, out). Raises QuantizationError (RW611) for a
    damaged checkpoint.
    """

    def __init__(self, folder: Path, transposed: Collection[str] = ()) -> None:
        self.folder = folder
        self._raw, self._transposed = ShardedWeights(folder), transposed
        self._stored = stored_weights(folder / file for file in self._raw.files)
        parts = {f"{name}.{part}" for name in self._stored for part in PARTS}
        self.files = {
            file: {name: self._info(name, info) for name, info in tensors.items() if name not in parts}
            for file, tensors in self._raw.files.items()
        }
        self._infos = {name: info for tensors in self.files.values() for name, info in tensors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self._infos

    def names(self) -> list[str]:
        return list(self._infos)

    def info(self, name: str) -> TensorInfo:
        return self._infos[name]

    def tensor(self, name: str) -> Tensor:
        """W' of a 4-bit weight, any other tensor as it is stored."""
        if name not in self._stored:
            return self._raw.tensor(name)
        keys = [name, *(key for part in PARTS if (key := f"{name}.{part}") in self._raw)]
        W = dequantize_weight(from_bitsandbytes({key: self._raw.tensor(key) for key in keys}, name))
        return W.T.contiguous() if name in self._transposed else W

    def _info(self, name: str, info: TensorInfo) -> TensorInfo:
        stored: StoredWeight | None = self._stored.get(name)
        if stored is None:
            return info
        shape = stored.shape[::-1] if name in self._transposed else stored.shape
        code = _CODES[str(stored.dtype).removeprefix("torch.")]
        return TensorInfo(code, shape, 0, prod(shape) * stored.dtype.itemsize)

"""The weights of a model folder, one tensor at a time, independent of the files that hold them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from rankwise.errors import ModelError
from rankwise.foreign import read_json
from rankwise.models.folder import INDEX_FILE
from rankwise.weights_file import TensorInfo, read_header

SINGLE_FILE = "model.safetensors"


class ShardedWeights:
    """Tensors of ``model.safetensors`` or of the shards that its index names, by the names in the files."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: dict[str, dict[str, TensorInfo]] = {
            file: dict(read_header(folder / file).tensors) for file in _file_names(folder)
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


def _file_names(folder: Path) -> list[str]:
    index = folder / INDEX_FILE
    # As in transformers, an index beside the one file is left over from another model.
    if (folder / SINGLE_FILE).is_file() or not index.exists():
        return [SINGLE_FILE]
    try:
        names = sorted({str(name) for name in read_json(index)["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError("RW305", f"{index} is not an index of weight files: {error}.") from None
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise ModelError("RW305", f"{index} names files outside its folder: {', '.join(outside)}.")
    return names

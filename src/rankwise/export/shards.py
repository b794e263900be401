"""The weights of a model folder, one tensor at a time, independent of the files that hold them."""

from __future__ import annotations

from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from rankwise.models.folder import existing_weights, read_config
from rankwise.weights_file import TensorInfo, read_header


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

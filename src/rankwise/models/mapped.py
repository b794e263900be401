"""The files from which a model's weights are mapped: how much they hold, and whether they are as they were."""

from __future__ import annotations

import bisect
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from rankwise.compat.torch import own_part
from rankwise.errors import ModelError

# Inode, size and time of the last change.
Version = tuple[int, int, int]


class MappedFiles(NamedTuple):
    """Files, and how many bytes of a model's frozen weights are views of them."""

    bytes: int
    versions: dict[Path, Version]

    def check(self) -> None:
        """Raise ModelError (RW305) for a file that was written to. One that was deleted or replaced does no harm, since
        the mapping keeps the old one."""
        for path, version in self.versions.items():
            if path.exists() and (now := _version(path)) != version and now[0] == version[0]:
                raise ModelError(
                    "RW305",
                    f"{path} was changed while its weights were in use, so the model is not the one that was loaded; "
                    "start again, and resume from the last checkpoint if there is one.",
                )


def mapped_files(model: nn.Module) -> MappedFiles:
    """The files behind the frozen tensors of ``model`` on a CPU (on Linux; none elsewhere).

    Trained tensors do not count: writing to them makes their pages the process's own memory.
    """
    regions = _mapped_regions()
    starts = [start for start, _, _ in regions]
    found: dict[int, tuple[int, Path]] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        held = own_part(tensor.detach())
        # Tensor subclasses of other libraries (packed weights) may have no storage of their own.
        if type(held) is not Tensor or held.device.type != "cpu" or tensor.requires_grad or not held.numel():
            continue
        region = bisect.bisect_right(starts, held.data_ptr()) - 1
        if region >= 0 and held.data_ptr() < regions[region][1]:
            found[held.data_ptr()] = held.nbytes, regions[region][2]
    paths = {path for _, path in found.values() if path.exists()}
    return MappedFiles(sum(size for size, _ in found.values()), {path: _version(path) for path in paths})


def _version(path: Path) -> Version:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


def _mapped_regions() -> list[tuple[int, int, Path]]:
    """(first address, end, file) of each file that this process maps, by address."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    # ``7f00-7f80 rw-p 00000000 08:02 135522 /file``: no file where the inode is 0.
    fields = [line.split(maxsplit=5) for line in lines]
    files = [(field[0].split("-"), field[5]) for field in fields if field[4] != "0" and len(field) == 6]
    return sorted((int(start, 16), int(end, 16), Path(path)) for (start, end), path in files)

"""The files from which a model's weights are mapped: how much they hold, and whether they are still what was mapped."""

from __future__ import annotations

import bisect
import os
from pathlib import Path

from torch import Tensor, nn

from rankwise.compat.torch import own_part
from rankwise.errors import ModelError


class MappedFiles:
    """The files behind the frozen tensors of ``model`` on a CPU (on Linux; none elsewhere).

    Trained tensors do not count: writing to them makes their pages the process's own memory. A deleted or replaced file
    does no harm, since the mapping keeps the old one; a file that is written to or shortened changes the weights of a
    run, and ``check`` notices it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.bytes = 0
        self._opened: dict[Path, tuple[int, tuple[int, int]]] = {}
        regions = _mapped_regions()
        starts = [start for start, _, _ in regions]
        seen = set()
        for tensor in (*model.parameters(), *model.buffers()):
            held = own_part(tensor.detach())
            # Tensor subclasses of other libraries (packed weights) may have no storage of their own.
            if type(held) is not Tensor or held.device.type != "cpu" or tensor.requires_grad or not held.numel():
                continue
            region = bisect.bisect_right(starts, held.data_ptr()) - 1
            if region < 0 or held.data_ptr() >= regions[region][1] or held.data_ptr() in seen:
                continue
            seen.add(held.data_ptr())
            self.bytes += held.nbytes
            self._open(regions[region][2])

    @property
    def paths(self) -> list[Path]:
        return list(self._opened)

    def _open(self, path: Path) -> None:
        # One deleted since is shown as "PATH (deleted)"; nobody can open it any more.
        if path not in self._opened and path.exists():
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._opened[path] = handle, _version(handle)

    def check(self) -> None:
        """Raise ModelError (RW305) where a file was changed since the model was loaded."""
        for path, (handle, version) in self._opened.items():
            if _version(handle) != version:
                raise ModelError(
                    "RW305",
                    f"{path} was changed while its weights were in use, so the model is not the one that was loaded; "
                    "start again, and resume from the last checkpoint if there is one.",
                )

    def __del__(self) -> None:
        for handle, _ in self._opened.values():
            os.close(handle)


def _version(handle: int) -> tuple[int, int]:
    status = os.fstat(handle)
    return status.st_size, status.st_mtime_ns


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

"""What `hostile.py` tries: a reader with the files that it gets, which are sound ones damaged by their structure."""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable
from pathlib import Path

from damage import cut

# A template may compute for five seconds by design (rankwise.data.bounded); everything else is read in one.
SECONDS, TEMPLATE_SECONDS = 1.0, 8.0
Draw = random.Random


@dataclasses.dataclass
class Reader:
    """``write`` puts a hostile file into a folder, ``read`` reads it."""

    write: Callable[[Draw, Path], None]
    read: Callable[[Path], object]
    seconds: float = SECONDS
    # Share of the inputs that are asked for: those of templates fork a process each.
    share: float = 1.0


def damaged(sound: bytes, name: str, *how: Callable[[Draw, bytes], bytes]) -> Callable[[Draw, Path], None]:
    """One file, damaged by one to three of ``how`` in turn; what has no structure any more is cut."""

    def write(draw: Draw, folder: Path) -> None:
        content = sound
        for _ in range(draw.choice([1, 1, 2, 3])):
            try:
                content = draw.choice(how)(draw, content)
            except (ValueError, IndexError, struct.error, RecursionError):
                content = cut(draw, content)
        (folder / name).write_bytes(content)

    return write

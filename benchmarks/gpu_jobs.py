"""What `gpu.py` does, job by job: checks, warming, rows. No torch: the process that starts the jobs stays light.

A row is one contender (ours, PEFT, Unsloth) of one shape in one form of a step:

- ``loop``: a plain loop, every token a label, no mask;
- ``padded`` and ``packed``: our step as `rankwise train` runs it, half of the tokens scored, padded on the right or
  laid end to end, with clipping and fused AdamW.
"""

from __future__ import annotations

import ctypes
import dataclasses
import signal
import sys
from collections.abc import Iterator
from typing import Any

METHODS = ("lora", "dora", "qlora", "qdora")
CHECKS = ("weights", "elementwise", "card", "layers", "loss")
FORMS = ("loop", "padded", "packed")
# Unsloth has kernels for these; its DoRA is PEFT's.
UNSLOTH_METHODS = ("lora", "qlora")
# After which a job is ended: a model that compiles, warms up and is timed, and one of Unsloth's, which goes through a
# disk.
SECONDS = {"check": 240, "warm": 240, "model": 180, "layer": 120, "four-bits": 180, "unsloth": 240}
# Tokens at which PEFT's 8B fits a card of 80 GB: it keeps what each operation read, and all logits.
FEW_TOKENS = 2048


@dataclasses.dataclass(frozen=True)
class Job:
    kind: str
    # "Llama 8B", "layer 4096", or the group of checks.
    what: str
    method: str = ""
    side: str = "ours"
    form: str = "loop"
    batch: int = 4
    length: int = 2048
    device: str = "cuda"
    # Of square layers.
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, given: dict[str, Any]) -> Job:
        return cls(**{**given, "sizes": tuple(given.get("sizes", ()))})

    @property
    def key(self) -> str:
        """Under which its result is kept."""
        return " | ".join((self.kind, self.what, self.method, self.side, self.form, f"{self.batch} x {self.length}"))

    @property
    def shape(self) -> str:
        """``8B`` of ``Llama 8B``."""
        return self.what.rpartition(" ")[2]

    @property
    def is_tiny(self) -> bool:
        return self.length < 64

    @property
    def seconds(self) -> int:
        return SECONDS["unsloth" if self.side == "unsloth" else self.kind]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What was asked of `gpu.py`."""

    sections: tuple[str, ...]
    shapes: tuple[str, ...]
    sizes: tuple[int, ...]
    methods: tuple[str, ...]
    # Ours, and the others that are installed.
    sides: tuple[str, ...]
    batch: int
    length: int
    device: str

    def _job(self, kind: str, what: str, **more: Any) -> Job:
        return Job(kind, what, **{"batch": self.batch, "length": self.length, "device": self.device, **more})

    def first(self) -> list[Job]:
        """Checks and warming, which run side by side: they compile what the timings need."""
        checks = [self._job("check", group, method=group) for group in CHECKS] if "checks" in self.sections else []
        if "models" not in self.sections:
            return checks
        shapes = [self._job("warm", f"Llama {shape}", method=m) for shape in self.shapes for m in self.methods]
        return [*checks, *shapes]

    def rows(self) -> Iterator[Job]:
        """The dearest shape first and ours before the others, so that the goals' numbers exist when time runs out."""
        if "models" in self.sections:
            for shape in self.shapes:
                yield from self._model_rows(shape)
        if "layers" in self.sections:
            for size in self.sizes:
                for side in self.sides:
                    if side != "unsloth":
                        yield from (
                            self._job("layer", f"layer {size}", method=m, side=side, sizes=(size,))
                            for m in self.methods
                        )
        if "four-bits" in self.sections and self.device == "cuda":
            yield self._job("four-bits", "4-bit kernels", sizes=self.sizes)

    def _model_rows(self, shape: str) -> Iterator[Job]:
        what = f"Llama {shape}"
        for form in FORMS:
            yield from (self._job("model", what, method=m, form=form) for m in self.methods)
        few: dict[str, Any] = {"batch": 1, "length": min(self.length, FEW_TOKENS)}
        for side in self.sides:
            methods = [m for m in self.methods if side != "unsloth" or m in UNSLOTH_METHODS]
            if side != "ours":
                yield from (self._job("model", what, method=m, side=side) for m in methods)
            # Where everybody fits.
            yield from (self._job("model", what, method=m, side=side, **few) for m in methods)


def end_with_parent() -> None:
    """End this process when `gpu.py` is killed: it would compute on beside the jobs of the next call."""
    if sys.platform == "linux":
        # PR_SET_PDEATHSIG of sys/prctl.h.
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

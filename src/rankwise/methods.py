"""The methods of training, a row each. Imports no torch.

A method with adapters names their kind, whose class is in ``adapters.lora.KINDS``. A method of another distribution, a
guest, is an entry point of the group ``rankwise.methods``: a name and its MethodType. Nothing plans, merges or serves
its results.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

METHODS_GROUP = "rankwise.methods"
# The attribute of a model that says by which method of another distribution it trains.
GUEST = "rankwise_method"
# The kinds of adapters that PEFT has too, and reads.
PEFT_KINDS = ("lora", "dora")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """What the rest of rankwise must know of a method."""

    name: str
    # Its name for people.
    words: str
    # The kind of its adapters, which is the name of the method that trains them over a dense base. None: no adapters.
    kind: str | None = None
    four_bits: bool = False
    # The method to take in its place where the memory does not suffice.
    lighter: str | None = None
    # (forward, backward): kernels that the host launches for one layer of a micro-batch, with adapters on all seven
    # linear layers, without DoRA's gains, which are computed once in an optimizer step. `benchmarks/gpu_paper.py`
    # counts them, and tests/test_gpu_benchmarks.py compares the two. LoRA's where they were not counted.
    launches: tuple[int, int] = (26, 43)
    # Whether the method is of another distribution.
    is_guest: bool = False

    @property
    def has_adapter(self) -> bool:
        return self.kind is not None

    @property
    def trains_all(self) -> bool:
        """Whether it trains the weights of the model itself."""
        return not self.has_adapter and not self.is_guest


# {name: method}, in the order of lists.
METHODS: dict[str, Method] = {
    row.name: row
    for row in (
        Method(name="lora", words="LoRA", kind="lora", lighter="qlora"),
        Method(name="qlora", words="QLoRA", kind="lora", four_bits=True, launches=(33, 50)),
        Method(name="dora", words="DoRA", kind="dora", lighter="qdora", launches=(33, 45)),
        Method(name="qdora", words="QDoRA", kind="dora", four_bits=True, launches=(40, 52)),
        Method(name="full", words="Full", lighter="lora"),
    )
}


def method_of(name: str) -> Method:
    """The row of a method, with variants (``lora+pissa``) or without. A name that is not ours is a guest's."""
    name = name.partition("+")[0]
    return METHODS.get(name) or Method(name=name, words=name, is_guest=True)


def methods_with(**facts: object) -> tuple[str, ...]:
    """The methods of ours with these facts: ``methods_with(four_bits=True)``."""
    return tuple(name for name, row in METHODS.items() if all(getattr(row, fact) == facts[fact] for fact in facts))


def kinds() -> tuple[str, ...]:
    return methods_with(four_bits=False, has_adapter=True)


def other_kinds() -> tuple[str, ...]:
    """Those that PEFT does not have."""
    return tuple(kind for kind in kinds() if kind not in PEFT_KINDS)


def either(words: Iterable[str]) -> str:
    """``lora, dora or full``."""
    *first, last = words
    return f"{', '.join(first)} or {last}" if first else last


def is_known(name: str) -> bool:
    return name in METHODS or bool(entry_points(group=METHODS_GROUP, name=name))


# --- guests ---


@dataclasses.dataclass(frozen=True)
class MethodType:
    """What training and ``compare`` need of a guest. Its parameters train in one process, in a frozen base; a model is
    an ``nn.Module``."""

    # (model, --r) -> number of trained parameters; adds them to the model, which it freezes.
    add: Callable[[Any, int], int]
    # Writes them, as adapter_model.safetensors and adapter_config.json, into a folder.
    save: Callable[[Any, Path], None]
    # Copies what a folder holds into the parameters that are there.
    load_weights: Callable[[Any, Path], None]
    # Adds to a base what a folder holds, frozen.
    load: Callable[[Any, Path], None]


def method_type(name: str) -> MethodType:
    """The installed method ``name``, which the settings have checked."""
    [entry] = entry_points(group=METHODS_GROUP, name=name)
    found: MethodType = entry.load()
    return found


def add_by(name: str, model: Any, size: int) -> int:
    """Add the parameters of the method ``name`` to the model. Returns their number."""
    kind = method_type(name)
    setattr(model, GUEST, kind)
    return kind.add(model, size)


def guest_of(model: Any) -> MethodType | None:
    """The guest by which the model trains."""
    return getattr(model, GUEST, None)

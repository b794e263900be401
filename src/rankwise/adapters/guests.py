"""Methods of other distributions: an entry point of the group ``rankwise.methods`` is a name and its MethodType."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path

from torch import nn

from rankwise.config import METHODS_GROUP

# The attribute of the model that says by which method its parameters were added.
ATTRIBUTE = "rankwise_method"


@dataclasses.dataclass(frozen=True)
class MethodType:
    """What training and ``compare`` need of a method. Its parameters train in one process, in a frozen base."""

    # (model, --r) -> number of trained parameters; adds them to the model, which it freezes.
    add: Callable[[nn.Module, int], int]
    # Writes them, as adapter_model.safetensors and adapter_config.json, into a folder.
    save: Callable[[nn.Module, Path], None]
    # Copies what a folder holds into the parameters that are there.
    load_weights: Callable[[nn.Module, Path], None]
    # Adds to a base what a folder holds, frozen.
    load: Callable[[nn.Module, Path], None]


def method_type(name: str) -> MethodType:
    """The installed method ``name``, which the settings have checked."""
    [entry] = entry_points(group=METHODS_GROUP, name=name)
    found: MethodType = entry.load()
    return found


def add_by(name: str, model: nn.Module, size: int) -> int:
    """Add the parameters of the method ``name`` to the model. Returns their number."""
    kind = method_type(name)
    setattr(model, ATTRIBUTE, kind)
    return kind.add(model, size)


def guest_of(model: nn.Module) -> MethodType | None:
    """The method of another distribution by which the model trains."""
    return getattr(model, ATTRIBUTE, None)

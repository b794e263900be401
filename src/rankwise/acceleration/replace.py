"""Replace the forward of single modules, and put everything back.

A replacement stands on the instance, as a bound method, so that classes stay what they are and a deep copy of the model
carries its own.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

from torch import nn

ATTRIBUTE = "rankwise_acceleration"


class Undo:
    """What has to be called to make a model plain again, the newest change first."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


def replace_forward(module: nn.Module, forward: Callable[..., Any], undo: Undo, **notes: Any) -> None:
    """Let ``module`` compute by ``forward(module, ...)``, which finds ``notes`` as attributes.

    A forward that already stood on the instance comes back with ``undo``.
    """
    before = module.__dict__.get("forward")
    module.__dict__.update(notes)
    module.forward = types.MethodType(forward, module)

    def put_back() -> None:
        for name in notes:
            module.__dict__.pop(name, None)
        if before is None:
            module.__dict__.pop("forward", None)
        else:
            module.forward = before

    undo.add(put_back)


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the module's class defines, bound to it."""
    return types.MethodType(type(module).forward, module)


def is_free(module: nn.Module) -> bool:
    """Whether nothing else stands in the module's way: a forward of its own, or hooks that must see its call."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)

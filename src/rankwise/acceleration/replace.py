"""Replace the forward of single modules, undo it, and probe a model before training.

A replacement is a bound method on the instance, so that classes stay unchanged and a deep copy of the model has its own
methods.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from rankwise.adapters.base_layer import REPLACED, has_hooks, put_back
from rankwise.errors import RankwiseError, is_out_of_memory

ATTRIBUTE = "rankwise_acceleration"


class Undo:
    """The calls that restore a model, run in reverse order of the changes. None is a closure, so that a copy of a
    model has its own.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []

    def add(self, step: Callable[[], None]) -> None:
        self._steps.append(step)

    def __call__(self) -> None:
        while self._steps:
            self._steps.pop()()


def replace_forward(module: nn.Module, forward: Callable[..., object], undo: Undo, **notes: Any) -> None:
    """Replace the forward of ``module`` by ``forward(module, ...)``, and set ``notes`` as attributes of the module.

    ``undo`` restores a forward that was on the instance before.
    """
    module.__dict__[REPLACED] = (module.__dict__.get("forward"), tuple(notes))
    module.__dict__.update(notes)
    module.forward = types.MethodType(forward, module)
    undo.add(functools.partial(put_back, module))


def class_forward(module: nn.Module) -> Callable[..., Any]:
    """The forward that the module's class defines, bound to it."""
    return types.MethodType(type(module).forward, module)


def is_free(module: nn.Module) -> bool:
    """Whether the forward may be replaced: no forward on the instance, and no hooks, which need the module's call."""
    return "forward" not in module.__dict__ and not has_hooks(module)


Answer = TypeVar("Answer")


def probe(model: nn.Module, ask: Callable[[], Answer], *, grad: bool = False) -> tuple[Answer | None, str | None]:
    """(result of ``ask`` with the model in evaluation mode, None), or (None, why the model cannot run it).

    ``grad``: with gradients enabled, as in a training step. RankwiseErrors and out-of-memory errors are raised.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(grad):
            return ask(), None
    except Exception as error:
        if isinstance(error, RankwiseError) or is_out_of_memory(error):
            raise
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    finally:
        for module, mode in modes:
            module.training = mode

"""Recognise accelerate's hooks, on the modules of a model on several devices, without importing it."""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


def only_moves_inputs(module: nn.Module) -> bool:
    """Whether the forward on the instance is accelerate's (``device_map`` over several devices) and only moves the
    inputs to the module's device."""
    hook = module.__dict__.get("_hf_hook")
    wrapper = getattr(module.__dict__.get("forward"), "func", None)
    if hook is None or not getattr(wrapper, "__qualname__", "").startswith("add_hook_to_module."):
        return False
    return type(hook).__name__ == "AlignDevicesHook" and not hook.offload and not hook.io_same_device


def loads_weights(module: nn.Module) -> bool:
    """Whether accelerate loads the module's weights for each call, from a CPU or a disk."""
    return getattr(module.__dict__.get("_hf_hook"), "offload", False)


def hook_again(copied: nn.Module) -> None:
    """Bind accelerate's forward of a shallow copy, which is bound to the original, to the copy."""
    hook = copied.__dict__.get("_hf_hook")
    if hook is None or loads_weights(copied):
        return
    module: Any = copied
    module._old_forward = types.MethodType(type(copied).forward, copied)
    module.forward = functools.partial(module.forward.func, copied)

"""The private parts of accelerate that rankwise uses."""

from __future__ import annotations

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

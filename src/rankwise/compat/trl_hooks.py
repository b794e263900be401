"""Recognise trl's hooks by the module in which they were defined, without importing trl."""

from __future__ import annotations

from collections.abc import Callable


def bars_offloading(hook: Callable[..., object]) -> bool:
    """Whether the hook is trl's on the output head, which only exempts the head's saved tensors from offloading."""
    return getattr(hook, "__module__", None) == "trl.models.activation_offloading"

"""Hooks of trl's, known by where they were made: imports no trl."""

from __future__ import annotations

from collections.abc import Callable


def bars_offloading(hook: Callable[..., object]) -> bool:
    """Whether trl put the hook on an output head so that what the head saves is not offloaded. It looks at nothing."""
    return getattr(hook, "__module__", None) == "trl.models.activation_offloading"

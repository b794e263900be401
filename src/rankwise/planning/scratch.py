"""Memory that CPU kernels take inside one operation, where no trace sees it, by the operation's name."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

Scratch = Callable[[Any, Any], int]


def dense_weight(args: Any, kwargs: Any) -> int:
    """A 4-bit product makes the dense weight in the dtype of its input: N K s bytes."""
    x, shape = args[0], args[3]
    return prod(shape) * x.element_size()


SCRATCH: dict[str, Scratch] = {
    "rankwise::linear_4bit": dense_weight,
    "rankwise::linear_4bit_input_grad": dense_weight,
}

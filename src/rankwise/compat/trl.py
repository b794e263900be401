"""The private parts of trl that we use."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, SupportsFloat

# Of all of trl's trainers; it sends telemetry and writes cards.
from trl.trainer.base_trainer import _BaseTrainer as TrlTrainer
from trl.trainer.utils import RepeatSampler

__all__ = ["RepeatSampler", "TrlTrainer", "heads_by", "metrics_of"]


@contextmanager
def heads_by(kind: type[TrlTrainer], give: Callable[..., None]) -> Iterator[None]:
    """While a trainer of trl's class ``kind`` is made, call ``give(model, ...)`` in place of the function that gives
    policy and reference trl's own output head.
    """
    module: Any = sys.modules[kind.__module__]
    before = module.add_fused_lm_head
    module.add_fused_lm_head = give
    try:
        yield
    finally:
        module.add_fused_lm_head = before


class Metered(Protocol):
    """A trainer of trl with metrics."""

    _metrics: dict[str, dict[str, list[SupportsFloat]]]


def metrics_of(trainer: Metered, mode: str) -> dict[str, list[SupportsFloat]]:
    """The values that the trainer averages and logs beside the loss, in mode "train" or "eval"; our own losses add
    to them.
    """
    return trainer._metrics[mode]

"""The private parts of trl that rankwise uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, SupportsFloat

# The base class of trl's trainers, which sends telemetry and writes model cards.
from trl.trainer.base_trainer import _BaseTrainer as TrlTrainer
from trl.trainer.utils import RepeatSampler

__all__ = ["RepeatSampler", "TrlTrainer", "heads_by", "metrics_of"]


@contextmanager
def heads_by(kind: type[TrlTrainer], give: Callable[..., None]) -> Iterator[None]:
    """A context in which trainers of trl's class ``kind`` call ``give(model, ...)`` instead of the function that puts
    trl's output head on policy and reference.
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
    """{name: values} that the trainer averages and logs with the loss, in mode "train" or "eval"."""
    return trainer._metrics[mode]

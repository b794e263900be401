"""The private parts of trl that we use."""

from __future__ import annotations

from typing import Protocol, SupportsFloat

# Of all of trl's trainers; it sends telemetry and writes cards.
from trl.trainer.base_trainer import _BaseTrainer as TrlTrainer
from trl.trainer.utils import RepeatSampler

__all__ = ["RepeatSampler", "TrlTrainer", "metrics_of"]


class Metered(Protocol):
    """A trainer of trl's."""

    _metrics: dict[str, dict[str, list[SupportsFloat]]]


def metrics_of(trainer: Metered, mode: str) -> dict[str, list[SupportsFloat]]:
    """What the trainer averages and logs beside the loss, in mode "train" or "eval"; our own losses add to it."""
    return trainer._metrics[mode]

"""The private parts of trl that we use."""

from __future__ import annotations

from typing import TYPE_CHECKING, SupportsFloat

if TYPE_CHECKING:
    from trl.trainer.sft_trainer import SFTTrainer


def metrics_of(trainer: SFTTrainer, mode: str) -> dict[str, list[SupportsFloat]]:
    """What the trainer averages and logs beside the loss, in mode "train" or "eval"; our own losses add to it."""
    return trainer._metrics[mode]

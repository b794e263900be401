"""The objectives of a run. Each has a module, whose ``learning()`` returns the parts that depend on the objective:

    sft.py              demonstrations, by trl's SFTTrainer
    preferences.py      pairs, by trl's DPOTrainer; answers marked good or bad, by trl's KTOTrainer
    grpo.py             rewards, by trl's GRPOTrainer

All objectives share reading, the checks before training, checkpoints, resuming and the record (run.py, spine.py).
"""

from __future__ import annotations

from rankwise.config import TrainSettings
from rankwise.training.learning import Learning


def learning_of(given: TrainSettings) -> Learning:
    """The parts of the run's objective. Raises ConfigError for settings that the objective does not support."""
    if given.objective == "sft":
        from rankwise.training.objectives import sft

        return sft.learning()
    if given.objective == "grpo":
        from rankwise.training.objectives import grpo

        return grpo.learning(given)
    from rankwise.training.objectives import preferences

    return preferences.learning(given)

"""The objectives of a run. Each has a module, whose ``learning()`` gives a run all that it needs:

    sft.py              demonstrations, by trl's SFTTrainer
    images.py           demonstrations with images, by the same trainer and trl's collator
    preferences.py      pairs, by its DPOTrainer; answers marked good or bad, by its KTOTrainer
    grpo.py             rewards, by its GRPOTrainer

Reading, checks before training, checkpoints, resuming and the record are shared by all (run.py, spine.py).
"""

from __future__ import annotations

from rankwise.config import TrainSettings
from rankwise.training.learning import Learning


def learning_of(given: TrainSettings) -> Learning:
    """Raises ConfigError for settings that the objective cannot have, as each says."""
    if given.objective == "sft":
        from rankwise.training.objectives import sft

        return sft.learning()
    if given.objective == "grpo":
        from rankwise.training.objectives import grpo

        return grpo.learning(given)
    from rankwise.training.objectives import preferences

    return preferences.learning(given)

"""What a run can learn from. Each objective has a module, whose ``learning()`` is all that a run needs of it:

    sft.py      demonstrations, by trl's SFTTrainer
    grpo.py     rewards, by trl's GRPOTrainer

Reading, checks before training, checkpoints, resuming and the record are the run's own (run.py, spine.py).
"""

from __future__ import annotations

from rankwise.config import TrainSettings
from rankwise.errors import ConfigError
from rankwise.training.learning import Learning


def learning_of(given: TrainSettings) -> Learning:
    """Raises ConfigError: RW761 for an objective that is not built in yet; for its settings as each objective says."""
    if given.objective == "sft":
        from rankwise.training.objectives import sft

        return sft.learning()
    if given.objective == "grpo":
        from rankwise.training.objectives import grpo

        return grpo.learning(given)
    raise ConfigError("RW761", f"--objective {given.objective} is not built in yet; give sft or grpo.")

"""What a run can learn from. Each objective has a module, whose ``learning()`` is all that a run needs of it:

    sft.py      demonstrations, by trl's SFTTrainer

Reading, checks before training, checkpoints, resuming and the record are the run's own (run.py, spine.py).
"""

from __future__ import annotations

from rankwise.config import Objective
from rankwise.errors import ConfigError
from rankwise.training.learning import Learning


def learning_of(objective: Objective) -> Learning:
    """Raises ConfigError (RW761) for an objective that is not built in yet."""
    if objective == "sft":
        from rankwise.training.objectives import sft

        return sft.learning()
    raise ConfigError("RW761", f"--objective {objective} is not built in yet; give sft.")

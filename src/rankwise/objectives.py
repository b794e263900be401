"""The objectives of ``rankwise train``: a row for each, with what is known of it without torch.

``rows`` names its data formats (``data.objectives.FORMATS``); training/learning.py says how an objective is made.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

ObjectiveName = Literal["sft", "dpo", "kto", "grpo", "classify"]
# trl's defaults: answers to a prompt, and their tokens.
GENERATIONS, MAX_COMPLETION_LENGTH = 8, 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class ObjectiveFacts:
    """What a run learns from, and how it is judged."""

    # What a row of the data is.
    rows: Literal["demonstration", "pair", "mark", "prompt", "label"]
    # What a model card says after "trained"; {reference} is the model with which answers are compared.
    words: str = ""
    # The options that apply to it but not to every objective.
    options: tuple[str, ...] = ("activation_offloading",)
    # Its losses, the default first; trl's names.
    losses: tuple[str, ...] = ()
    # The default of --beta; 0: no reference.
    beta: float = 0.0
    # The default learning rate as a share of that for demonstrations.
    rate_share: float = 1.0
    # The metric by which `compare` judges by default; None: it is not compared.
    metric: str | None = None
    # What a loss is of, in plots. Those of most objectives are means over answers or pairs.
    loss_name: str = "loss"

    @property
    def of_demonstrations(self) -> bool:
        return self.rows == "demonstration"

    @property
    def has_answers(self) -> bool:
        """Whether the data hold answers to learn from."""
        return self.of_demonstrations or self.of_preferences

    @property
    def of_preferences(self) -> bool:
        """Whether answers are judged against a reference, the base or the adapter with which training began."""
        return self.rows in ("pair", "mark")

    @property
    def sequences(self) -> int:
        """Of a row: a pair of answers is two."""
        return 2 if self.rows == "pair" else 1

    @property
    def of_rewards(self) -> bool:
        """Whether rewards score answers to prompts; the loss of an evaluation is the negative mean reward."""
        return self.rows == "prompt"

    @property
    def of_labels(self) -> bool:
        """Whether a head of labels answers."""
        return self.rows == "label"


# TRL's default rates: 2e-5 for SFT, and 1e-6 for DPO, KTO and GRPO. Its beta of DPO and KTO is 0.1.
OBJECTIVES: Mapping[ObjectiveName, ObjectiveFacts] = {
    "sft": ObjectiveFacts(
        rows="demonstration",
        options=("label_smoothing", "packing", "prompt_column", "completion_column", "activation_offloading"),
        metric="eval_loss",
        loss_name="loss per token",
    ),
    "dpo": ObjectiveFacts(
        rows="pair",
        words=" from pairs of a better and a worse answer (DPO), against {reference} as the reference",
        options=("beta", "loss_type", "label_smoothing", "activation_offloading"),
        losses=("sigmoid", "ipo", "hinge", "robust", "apo_zero"),
        beta=0.1,
        rate_share=1 / 20,
        metric="preference.reward_accuracy",
    ),
    "kto": ObjectiveFacts(
        rows="mark",
        words=" from answers marked good or bad (KTO), against {reference} as the reference",
        options=("beta", "loss_type", "desirable_weight", "undesirable_weight", "activation_offloading"),
        losses=("kto", "apo_zero_unpaired"),
        beta=0.1,
        rate_share=1 / 20,
        metric="preference.reward_accuracy",
    ),
    "grpo": ObjectiveFacts(
        rows="prompt",
        words=" from rewards (GRPO)",
        options=(
            *("beta", "loss_type", "reward", "reward_weights", "num_generations", "max_completion_length"),
            *("temperature", "prompt_column", "completion_column"),
        ),
        losses=("dapo", "grpo", "dr_grpo", "bnpo"),
        rate_share=1 / 20,
        loss_name="loss; of evaluations the negative mean reward",
    ),
    "classify": ObjectiveFacts(rows="label", words=" to answer texts with labels", metric="labels.accuracy"),
}

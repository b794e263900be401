"""Training on demonstrations: predict each token of an answer from the tokens before it."""

from __future__ import annotations

from rankwise.config import TrainSettings
from rankwise.training.arguments import sft_arguments
from rankwise.training.learning import Common, Learning
from rankwise.training.setup import Data, encode_data
from rankwise.training.trainer import RankwiseTrainer


def learning() -> Learning:
    return Learning(encode_data, sft_arguments, _trainer)


def _trainer(given: TrainSettings, data: Data, common: Common) -> RankwiseTrainer:
    return RankwiseTrainer(label_smoothing=given.label_smoothing, **common)

"""The differences between the objectives of a run, and the options of each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers import TrainingArguments

from rankwise.config import TrainSettings
from rankwise.data import Rows
from rankwise.data.formats import Format
from rankwise.training.arguments import Surroundings
from rankwise.training.foresight import MicroBatch, largest_batch, largest_evaluation
from rankwise.training.setup import Data
from rankwise.training.spine import RunTrainer

# Called with the settings, the tokenizer, the rows to train and to evaluate on, and the text of a chat template.
Encode = Callable[[TrainSettings, Any, Rows, Rows | None, str | None], Data]


@dataclasses.dataclass(frozen=True)
class Learning:
    """The parts of a run that depend on its objective."""

    # Rows to token ids.
    encode: Encode
    # Those of the trainer's class.
    arguments: Callable[[TrainSettings, Surroundings], TrainingArguments]
    # Takes the settings, the data and what every trainer takes: model, args, data sets, tokenizer, progress.
    trainer: Callable[[TrainSettings, Data, Mapping[str, Any]], RunTrainer]
    # Layouts of the data; None for those of training data.
    formats: Collection[Format] | None = None
    # Whether rows hold the tokens to learn.
    has_labels: bool = True
    # Whether the fast operators were compared on such rows of this model; what they do not take, it says.
    takes_fast: Callable[[Any], bool] = lambda model: True
    # What memory depends on: of the largest micro-batch, ``flat`` where rows are laid end to end, and of evaluations.
    largest_batch: Callable[..., MicroBatch] = largest_batch
    largest_evaluation: Callable[[Any], MicroBatch | None] = largest_evaluation

"""The parts of a run that differ between objectives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainingArguments

from rankwise.config import TrainSettings
from rankwise.data import Rows
from rankwise.data.formats import Format
from rankwise.training.arguments import Surroundings
from rankwise.training.foresight import MicroBatch, largest_batch, largest_evaluation
from rankwise.training.setup import Data
from rankwise.training.spine import RunTrainer

# What every trainer takes: model, args, data sets, tokenizer, progress.
Common = Mapping[str, Any]
# (settings, tokenizer, training rows, evaluation rows, chat template's source) -> encoded data.
Encode = Callable[[TrainSettings, PreTrainedTokenizerBase, Rows, Rows | None, str | None], Data]


@dataclasses.dataclass(frozen=True)
class Learning:
    """The parts of a run that depend on its objective."""

    # Encodes rows to token ids.
    encode: Encode
    # Makes the arguments of the trainer's class.
    arguments: Callable[[TrainSettings, Surroundings], TrainingArguments]
    # Makes the trainer from the settings, the data and what every trainer takes.
    trainer: Callable[[TrainSettings, Data, Common], RunTrainer]
    # The data formats of the objective; None for those of demonstrations.
    formats: Collection[Format] | None = None
    # Whether the rows have labels.
    has_labels: bool = True
    # Whether the fast operators were tested on such rows of this model; warns where they were not.
    # The largest micro-batch (``flat``: of concatenated rows) and the largest evaluation batch, for the memory plan.
    largest_batch: Callable[..., MicroBatch] = largest_batch
    largest_evaluation: Callable[..., MicroBatch | None] = largest_evaluation

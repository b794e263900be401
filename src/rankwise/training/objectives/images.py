"""Training on demonstrations with images: trl's collator makes the batches; the language part gets the adapters."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig

from rankwise.config import FOUR_BITS, TrainSettings
from rankwise.data import Rows
from rankwise.data.images import encode_images
from rankwise.errors import ConfigError, warn
from rankwise.models import load_processor
from rankwise.training import ranks
from rankwise.training.arguments import Surroundings, sft_arguments
from rankwise.training.foresight import MicroBatch, largest_batch, longest_row
from rankwise.training.learning import Common, Learning
from rankwise.training.setup import Data, encode_data
from rankwise.training.spine import RunTrainer
from rankwise.training.trainer import RankwiseTrainer

# Model types for which the losses with the fast operators were compared with those of trl and PEFT.
COMPARED = ("idefics3", "smolvlm", "qwen2_5_vl")


def learning(given: TrainSettings, eval_rows: Rows | None) -> Learning:
    """The parts of a run on images. Raises ConfigError (RW183) for options that do not support images."""
    refused = list(_refused(given))
    if eval_rows is not None and eval_rows.kind != "images":
        refused.append(f"--eval-data {given.eval_data} without images")
    if refused:
        raise ConfigError(
            "RW183", f"the rows hold images, which {'; '.join(refused)} does not support; leave it or the images out."
        )
    return Learning(
        _encode,
        _arguments,
        _trainer,
        takes_fast=_takes_fast,
        largest_batch=_largest_batch,
        largest_evaluation=_largest_evaluation,
    )


def _refused(given: TrainSettings) -> Iterator[str]:
    if given.method not in ("lora", "dora", *FOUR_BITS):
        yield f"--method {given.method}"
    if given.packing:
        yield "--packing"
    if given.searched_rates:
        yield f"--learning-rate {given.learning_rate}"
    if given.new_tokens is not None:
        yield "--new-tokens"
    if given.sample_prompt is not None:
        yield "--sample-prompt"
    if ranks.count() > 1:
        yield "training in several processes"


def _takes_fast(model: PreTrainedModel) -> bool:
    kind = model.config.model_type
    if kind not in COMPARED:
        warn(
            "RW186",
            f"with images, the fast operators were tested on {', '.join(COMPARED)} only, so this {kind} trains without "
            "them.",
        )
    return kind in COMPARED


def _encode(
    given: TrainSettings, tokenizer: PreTrainedTokenizerBase, rows: Rows, eval_rows: Rows | None, template: str | None
) -> Data:
    processor = load_processor(
        given.model, tokenizer, trust_remote_code=given.trust_remote_code, revision=given.revision
    )
    data = encode_data(given, processor, rows, eval_rows, template, encode_images)
    return dataclasses.replace(data, processor=processor)


def _arguments(given: TrainSettings, around: Surroundings) -> SFTConfig:
    arguments = sft_arguments(given, around)
    # trl's collator truncates rows.
    arguments.max_length = given.max_length
    return arguments


def _largest_batch(trainer: RunTrainer, *, flat: bool) -> MicroBatch:
    batch = largest_batch(trainer, flat=flat)
    return dataclasses.replace(batch, image_tokens=_image_tokens(trainer, trainer.train_dataset))


def _largest_evaluation(trainer: RunTrainer) -> MicroBatch | None:
    """The largest possible batch: each row as long as the longest, with all tokens in the loss."""
    rows = trainer.eval_dataset
    if rows is None:
        return None
    size = min(len(rows), trainer.args.per_device_eval_batch_size)
    return MicroBatch(size, longest_row(rows), 1.0, _image_tokens(trainer, rows))


def _image_tokens(trainer: Any, rows: Dataset) -> int:
    """The largest number of image tokens of a row."""
    return max(ids.count(trainer.processing_class.image_token_id) for ids in rows["input_ids"])


def _trainer(given: TrainSettings, data: Data, common: Common) -> RankwiseTrainer:
    own = {"processing_class": data.processor, "evaluates_batches": True}
    return RankwiseTrainer(label_smoothing=given.label_smoothing, **{**common, **own})

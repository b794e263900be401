"""The rows of ``rankwise plan --data``, laid as ``train`` would: how many, how long, which micro-batch is largest."""

from __future__ import annotations

import dataclasses
import itertools
import math
import statistics
from pathlib import Path

import torch
from transformers import PreTrainedModel

from rankwise.acceleration import Acceleration
from rankwise.acceleration.attention import config_obstacle, head_width, obstacle
from rankwise.acceleration.layouts import Layout
from rankwise.acceleration.log_probs import config_obstacle_to_sharing
from rankwise.compat.transformers import attention_of
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError
from rankwise.models import ModelSource, load_skeleton
from rankwise.models.load import load_tokenizer
from rankwise.objectives import OBJECTIVES
from rankwise.planning.workload import SHARED, PlanSettings, Workload
from rankwise.training.batches import MicroBatch
from rankwise.training.learning import LEARNING, paced
from rankwise.training.loop import coming_batches
from rankwise.training.parts import Pace, Reading, learned_of, part_of
from rankwise.training.setup import LoadedBase, read_data
from rankwise.training.step import Computing, why_padded

# The mean of a micro-batch is of so many.
COUNTED = 64


@dataclasses.dataclass(frozen=True)
class Counted:
    """``tokens``: those of the whole run, of common beginnings once where these are laid once."""

    rows: int
    largest: MicroBatch
    tokens: int
    labels: int


def count(settings: PlanSettings, source: ModelSource, workload: Workload) -> Counted:
    """Read and encode the rows of ``settings.data``, with the model's tokenizer and without its weights.

    Raises ConfigError (RW112) for prompts of rewards, whose answers are not there yet; RW115 without a tokenizer;
    DataError as ``train`` does.
    """
    asked = _as_asked(settings)
    remote = settings.trust_remote_code
    tokenizer = load_tokenizer(source, trust_remote_code=remote)
    if tokenizer is None:
        raise ConfigError("RW115", f"{settings.model} has no tokenizer, which counts the rows of --data; give --rows.")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    learned, reading = learned_of(asked), part_of(Reading, asked)
    texts = read_data(reading, asked.objective, None)
    labels = 0 if texts.labels is None else len(texts.labels.names)
    learning = LEARNING[asked.objective](learned)
    data = learning.encode(reading, tokenizer, texts)
    model = load_skeleton(source, trust_remote_code=remote)
    base = LoadedBase(
        source=source,
        model=model,
        tokenizer=tokenizer,
        device=torch.device("meta"),
        dtype=torch.bfloat16,
        autocast=None,
        device_reason="",
        facts={},
    )
    pace = part_of(Pace, asked)
    objective = learning.objective(base, data, pace, layout_of(model, workload))
    pace = paced(objective, pace)
    largest = objective.largest_batch(coming_batches(objective, pace))
    if asked.packing:
        largest = dataclasses.replace(largest, rows=pace.batch_size, tokens=reading.max_length)
    sizes = []
    for batch in itertools.islice(coming_batches(objective, pace), COUNTED):
        own = objective.largest_batch([batch])
        sizes.append(own.rows * own.tokens * OBJECTIVES[asked.objective].sequences)
    # An epoch's batches are those of all devices; --max-steps are steps of each.
    batches = pace.total_steps * pace.gradient_accumulation * (settings.devices if settings.max_steps else 1)
    return Counted(len(data.train.dataset), largest, math.ceil(statistics.mean(sizes) * batches), labels)


def _as_asked(settings: PlanSettings) -> TrainSettings:
    if OBJECTIVES[settings.objective].of_rewards:
        raise ConfigError("RW112", "--data counts rows, and the answers of --objective grpo are not written yet.")
    if idle := {"rows", "trained_share"} & settings.model_fields_set:
        names = " and ".join(f"--{name.replace('_', '-')}" for name in sorted(idle))
        raise ConfigError("RW112", f"{names}: --data says it; leave one of them out.")
    shared = {name: getattr(settings, name) for name in SHARED if name in settings.model_fields_set}
    return TrainSettings(**{**shared, "model": str(settings.model), "data": settings.data, "output": Path()})


def layout_of(model: PreTrainedModel, workload: Workload) -> Layout:
    """How ``train`` lays rows, as far as it is known without weights: a run also tries it on the model."""
    computing = part_of(Computing, workload, products="bfloat16")
    text, dtype = model.config.get_text_config(), getattr(torch, workload.dtype)
    why_not = config_obstacle(text) or obstacle(dtype, torch.empty(0), head_width(text))
    replaced = workload.fast and workload.device_type == "cpu" and attention_of(model.config) == "sdpa"
    attention = replaced and why_not is None
    if why_padded(model, workload.objective, computing, Acceleration(attention=attention)) is not None:
        return "flat" if computing.packing else "padded"
    shares = computing.share_prompts
    drops = workload.lora_dropout > 0 and shares == "auto"
    apart = shares == "off" or drops or config_obstacle_to_sharing(text) is not None
    return "flat" if apart else "shared"

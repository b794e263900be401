"""What a run was asked, in small values: a function of training takes those that it uses.

Each is picked from the run's settings by the names of its fields; ``resolved`` values replace what was asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rankwise.config import Device, Dtype, ObjectiveOptions
from rankwise.foreign import Dataclass
from rankwise.objectives import GENERATIONS, MAX_COMPLETION_LENGTH, OBJECTIVES, ObjectiveName
from rankwise.quantization.config import FourBitConfig
from rankwise.training.watch import Callbacks

Part = TypeVar("Part", bound=Dataclass)


def part_of(kind: type[Part], given: object, **resolved: Any) -> Part:
    """A ``kind`` with ``given``'s values of the same names, but for those that are ``resolved``."""
    names = (field.name for field in dataclasses.fields(kind) if field.name not in resolved)
    return kind(**{name: getattr(given, name) for name in names}, **resolved)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Given:
    """What a caller in Python gives to a run itself, where the settings only describe it."""

    model: PreTrainedModel | None = None
    # Goes with the model.
    tokenizer: PreTrainedTokenizerBase | None = None
    # A datasets.Dataset or a list of dicts for ``data`` and ``eval_data``.
    rows: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    callbacks: Callbacks = dataclasses.field(default_factory=Callbacks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Base:
    """The model that a run trains, and how it is loaded."""

    model: str
    revision: str | None
    trust_remote_code: bool
    device: Device
    dtype: Dtype
    cache: Path | None
    mmap: bool
    method: str
    # None: the base is dense.
    quantization: FourBitConfig | None
    strategy: str | None
    # The adapter to continue.
    adapter: Path | None
    seed: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reading:
    """The data of a run, and how rows are read and cut."""

    data: str
    eval_data: str | None
    eval_limit: int | None
    chat_template: Path | None
    prompt_column: str | None
    completion_column: str | None
    max_length: int
    skip_bad_rows: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Learned:
    """The objective and its options, with their defaults."""

    objective: ObjectiveName
    # Empty for an objective with one loss.
    loss_type: str
    # 0: no reference.
    beta: float
    label_smoothing: float
    packing: bool
    desirable_weight: float
    undesirable_weight: float
    temperature: float
    max_completion_length: int
    num_generations: int
    reward: Sequence[str]
    reward_weights: Sequence[float]


def learned_of(asked: ObjectiveOptions) -> Learned:
    facts = OBJECTIVES[asked.objective]
    return part_of(
        Learned,
        asked,
        loss_type=asked.loss_type or next(iter(facts.losses), ""),
        beta=asked.beta or facts.beta,
        desirable_weight=asked.desirable_weight or 1.0,
        undesirable_weight=asked.undesirable_weight or 1.0,
        temperature=asked.temperature or 1.0,
        max_completion_length=asked.max_completion_length or MAX_COMPLETION_LENGTH,
        num_generations=asked.num_generations or GENERATIONS,
        reward=asked.reward or (),
        reward_weights=asked.reward_weights or (1.0,) * len(asked.reward or ()),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pace:
    """How long a run trains, and how often it evaluates, saves and logs. None: the default for its length, which
    ``learning.paced`` fills in; where it evaluates never, ``eval_steps`` stays None."""

    batch_size: int
    gradient_accumulation: int
    max_steps: int | None
    epochs: float
    eval_steps: int | None
    save_steps: int | None
    logging_steps: int | None
    early_stopping: int | None
    save_total_limit: int
    lr_scheduler_type: str
    warmup_steps: int
    seed: int

    @property
    def total_steps(self) -> int:
        assert self.max_steps is not None, "the length is not known yet"
        return self.max_steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Updates:
    """How an optimizer step moves the parameters. ``rate``: the peak learning rate."""

    optimizer: str
    rate: float
    weight_decay: float
    loraplus_ratio: float | None
    max_grad_norm: float

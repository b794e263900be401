"""The options of ``rankwise compare``: its own, and those of ``rankwise train`` that are equal for all runs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, get_args

import pydantic
from pydantic import BeforeValidator, Field

from rankwise.config import LARGEST_NUMBER, MANY, Method, Settings, TrainSettings, comma_list, text_list
from rankwise.errors import ConfigError
from rankwise.evaluation.settings import task_list
from rankwise.planning.sizes import parse_size

METHODS: tuple[str, ...] = get_args(Method)
NOT_SHARED = {
    "model",
    "data",
    "output",
    "eval_data",
    "method",
    "learning_rate",
    "seed",
    "sample_prompt",
    "tensorboard",
    "cache",
    "skip_bad_rows",
    "devices",
    "strategy",
    "resume",
    "overwrite",
}
# Options of `train` that are another option here, or differ from run to run, or mean nothing in a comparison.
SAME_RUNS = ("search_steps", "minutes", "memory_budget")
# Of the options of `compare`, those that say what a run is; with the shared ones they must stay as they were.


def size_in_bytes(value: Any) -> Any:
    """``24GB``, ``16GiB`` or a number of GB as bytes."""
    return None if value is None else parse_size(value)


class CompareOptions(Settings):
    """What ``compare`` adds to the options of training."""

    model: str = Field(description="Hub id, folder, .gguf file, or `demo`.")
    data: str = Field(description="Training data: hub id, folder, or .jsonl/.json/.csv/.parquet file (also .gz).")
    output: Path = Field(description="Folder of the comparison; the same command continues what is in it.")
    eval_data: str | None = Field(
        None, description="Evaluation data; default: the data's own validation part, else a tenth of its prompts."
    )
    methods: Annotated[tuple[str, ...], BeforeValidator(comma_list)] = Field(
        ("lora", "qlora", "dora", "qdora", "full"), description=f"Methods to compare, of {', '.join(METHODS)}."
    )
    seeds: int = Field(
        3, ge=1, le=1000, description="Runs per method, with the seeds 0, 1, ...; with one, no interval."
    )
    learning_rates: Annotated[tuple[Annotated[float, Field(le=LARGEST_NUMBER)], ...], BeforeValidator(comma_list)] = (
        Field(
            (2e-4,),
            description="Rates that every method tries on seed 0; the best by evaluation loss runs on all seeds.",
        )
    )
    search_steps: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="Steps of the runs that try a learning rate; default: as many as the final runs.",
    )
    minutes: float | None = Field(
        None,
        gt=0,
        le=MANY,
        description="Equal time instead of equal steps: each run takes the steps that fit, as measured.",
    )
    memory_budget: Annotated[int | None, BeforeValidator(size_in_bytes)] = Field(
        None,
        gt=0,
        description="Equal memory instead of equal micro-batches: each method takes the largest micro-batch that is "
        "planned to fit in so much; the rows of a step stay the same.",
    )
    task: Annotated[tuple[str, ...], BeforeValidator(task_list)] = Field(
        (),
        description="Also evaluate this task of `rankwise evaluate`; several times.",
        json_schema_extra={"repeated": True},
    )
    task_data: Annotated[tuple[str, ...], BeforeValidator(text_list)] = Field(
        (), description="TASK=DATA, as in `rankwise evaluate`; several times.", json_schema_extra={"repeated": True}
    )
    task_limit: int | None = Field(None, ge=1, le=MANY, description="Examples per task.")
    metric: str = Field("eval_loss", description="What decides: eval_loss, or TASK.METRIC such as e2e.BLEU.")
    margin: float = Field(0.01, gt=0, lt=1, description="Methods closer than this share of the metric are equivalent.")
    seed_sd: float = Field(
        0.005, gt=0, lt=1, description="Spread over seeds, as a share of the metric, assumed before there are runs."
    )
    row_sd: float = Field(
        0.04,
        ge=0,
        lt=10,
        description="Spread from row to row of two methods' difference, as a share of the evaluation loss, assumed "
        "before there are runs.",
    )
    memory: Annotated[int | None, BeforeValidator(size_in_bytes)] = Field(
        None, gt=0, description="Recommend only what trains in so much memory: 24GB."
    )
    max_hours: float | None = Field(None, gt=0, le=MANY, description="Recommend only what trains in so many hours.")
    merge: bool = Field(False, description="Also write the recommended model merged.")
    merged_check: bool = Field(True, description="Measure merged against unmerged: logits and generation speed.")
    jobs: int = Field(1, ge=1, le=1000, description="Runs at a time: one per device, or CPU processes.")
    retry: bool = Field(False, description="Run again what failed.")


def _shared_fields() -> dict[str, Any]:
    names = [name for name in TrainSettings.model_fields if name not in NOT_SHARED]
    return {name: (TrainSettings.model_fields[name].annotation, TrainSettings.model_fields[name]) for name in names}


SHARED = tuple(_shared_fields())
CompareSettings = pydantic.create_model("CompareSettings", __base__=CompareOptions, **_shared_fields())


def check_compare(given: CompareOptions) -> None:
    """Cross-field checks.

    Raises ConfigError: RW165 unknown methods, RW166 duplicates of methods or rates, RW167 options that exclude
    each other.
    """
    unknown = [name for name in given.methods if name not in METHODS]
    if unknown or not given.methods:
        named = ", ".join(map(repr, unknown)) or "nothing"
        raise ConfigError("RW165", f"--methods names {named}; the methods are {', '.join(METHODS)}.")
    for option, values in (("--methods", given.methods), ("--learning-rates", given.learning_rates)):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError("RW166", f"{option} names {', '.join(twice)} more than once; name each once.")
    if not given.learning_rates or any(not 0 < rate < math.inf for rate in given.learning_rates):
        raise ConfigError("RW167", f"--learning-rates is {given.learning_rates}; give rates above 0.")
    shared = given.model_dump()
    if given.minutes is not None and (shared["max_steps"] is not None or given.search_steps is not None):
        raise ConfigError("RW167", "--minutes sets the steps of every run; leave --max-steps and --search-steps out.")
    if given.metric != "eval_loss" and given.metric.partition(".")[0] not in given.task:
        raise ConfigError(
            "RW167", f"--metric is {given.metric!r}, which no --task measures; it is eval_loss or TASK.METRIC."
        )


def shared_training(given: CompareOptions) -> dict[str, Any]:
    """The options of ``train`` that every run gets, as JSON values."""
    return {name: value for name, value in given.model_dump(mode="json").items() if name in SHARED}

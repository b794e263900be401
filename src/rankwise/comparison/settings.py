"""The options of ``rankwise compare``: its own, and those of ``rankwise train`` that all runs share."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from rankwise.comparison.stages import LABELS
from rankwise.config import (
    MODEL,
    TRAINING_DATA,
    VARIANTS,
    PreferenceOptions,
    RetainOptions,
    RunOptions,
    keeps_file_bits,
    variant_of,
)
from rankwise.conflicts import NO_RETAIN
from rankwise.errors import ConfigError
from rankwise.evaluation.settings import task_list
from rankwise.foreign import Fields, JsonObject
from rankwise.methods import METHODS, methods_with
from rankwise.objectives import OBJECTIVES
from rankwise.options import LARGEST_NUMBER, Count, Names, Panel, Positive, comma_list, option, text_list
from rankwise.reports.comparison import EVAL_LOSS

# If labels are numbers.
OF_NUMBERS = f"{LABELS}.pearson"
TIME = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")
SHARED = (*PreferenceOptions.model_fields, *RunOptions.model_fields)
# Options of `compare` that define the runs. With the shared options they must not change when a comparison continues.
SAME_RUNS = ("budget",)


_model = functools.partial(option, Panel.MODEL)
_compared = functools.partial(option, Panel.COMPARED)
_measured = functools.partial(option, Panel.MEASURED)


def _usual_methods(given: Fields) -> tuple[str, ...]:
    """All of rankwise's methods; for preferences those with a frozen base, which is the reference."""
    of_preferences = OBJECTIVES[given.get("objective", "sft")].of_preferences
    return methods_with(has_adapter=True) if of_preferences else tuple(METHODS)


def _usual_budget(given: Fields) -> float | None:
    """With --time short runs, where there are several rates and rows that can be set aside."""
    rates, facts = given.get("learning_rates"), OBJECTIVES[given.get("objective", "sft")]
    is_searched = given.get("time") is not None and facts.of_demonstrations and (rates is None or len(rates) > 1)
    return 0.25 if is_searched else None


def _checked_time(value: object) -> object:
    if value is not None and not (isinstance(value, str) and TIME.fullmatch(value) and seconds_of(value)):
        raise ValueError("write a time such as 40m, 8h or 1h30m")
    return value


def seconds_of(time: str) -> int:
    """The seconds of ``1h30m``."""
    hours, minutes, seconds = (int(part or 0) for part in TIME.fullmatch(time).groups())  # type: ignore[union-attr]
    return 3600 * hours + 60 * minutes + seconds


class CompareSettings(PreferenceOptions, RetainOptions, RunOptions):
    """The options of ``rankwise compare``."""

    model: Annotated[str, _model(MODEL, metavar="M")]
    data: Annotated[str, _model(TRAINING_DATA, metavar="D")]
    output: Annotated[
        Path,
        _model(
            "Folder of the comparison. The same command, given again, continues an interrupted comparison.",
            metavar="DIR",
        ),
    ]
    eval_data: Annotated[
        str | None,
        _model(
            "Evaluation data; default: the validation part of the training data, or else a tenth of its prompts.",
            metavar="E",
        ),
    ] = None
    methods: Annotated[
        Names,
        _compared(
            f"Methods to compare: {', '.join(METHODS)}. A + adds a variant, as in qlora+loftq: {', '.join(VARIANTS)}, "
            "or rN: rank N with alpha = 2 N."
        ),
        Field(default_factory=_usual_methods),
    ]
    time: Annotated[
        str | None,
        BeforeValidator(_checked_time),
        _compared(
            "Time for this call, such as 40m or 8h, instead of a number of seeds: rates in short runs, then seeds for "
            "the methods that may still be best, until it is decided. Given again, it continues.",
            metavar="T",
        ),
    ] = None
    seeds: Annotated[
        int, _compared("Runs per method, with the seeds 0, 1, ...; a single run gives no interval.", ge=1, le=1000)
    ] = 3
    learning_rates: Annotated[
        tuple[Annotated[float, Field(gt=0, le=LARGEST_NUMBER)], ...] | None,
        BeforeValidator(comma_list),
        _compared(
            "Rates that every method tries on seed 0; the best by evaluation loss runs on all seeds. Default: for each "
            "method three, around the default of `train`.",
            metavar="X,...",
            min_length=1,
        ),
    ] = None
    budget: Annotated[
        Positive | None,
        _compared(
            "Find each method's rate by short runs that are judged on training rows, and stop bad rates early. X: the "
            "steps of all short runs together, as a share of one run's steps. Default: 0.25 with --time (not for "
            "preferences and labels); else every rate runs to its end."
        ),
        Field(default_factory=_usual_budget),
    ]
    jobs: Annotated[
        int | None,
        _compared(
            "Runs at a time: one per device, or CPU processes. Default: 1; with Ray, as many as the cluster holds.",
            ge=1,
            le=1000,
        ),
    ] = None
    executor: Annotated[
        Literal["local", "ray"], _compared("Where runs take place: on this machine, or on a Ray cluster.")
    ] = "local"
    address: Annotated[
        str | None, _compared("Address of the Ray cluster; default: RAY_ADDRESS, else the one on this machine.")
    ] = None
    retry: Annotated[bool, _compared("Run again what failed.")] = False

    task: Annotated[
        tuple[str, ...],
        BeforeValidator(task_list),
        _measured(
            "Also evaluate this task of `rankwise evaluate`; may be given several times.", metavar="TASK", repeated=True
        ),
    ] = ()
    task_data: Annotated[
        tuple[str, ...],
        BeforeValidator(text_list),
        _measured(
            "Data of a task, as in `rankwise evaluate`; may be given several times.", metavar="TASK=D", repeated=True
        ),
    ] = ()
    task_limit: Annotated[Count | None, _measured("Examples per task.")] = None
    metric: Annotated[
        str,
        _measured(
            "Metric that decides: eval_loss, or TASK.METRIC such as e2e.BLEU; for dpo and kto also "
            "preference.reward_accuracy (their default) and preference.reward_margin; for classify labels.accuracy "
            "(its default), labels.f1 and labels.mcc, or labels.pearson of numbers.",
            metavar="NAME",
        ),
        Field(default_factory=lambda given: OBJECTIVES[given.get("objective", "sft")].metric or EVAL_LOSS),
    ]
    margin: Annotated[
        float,
        _measured("Methods closer than this share of the metric are equivalent.", gt=0, lt=1),
    ] = 0.01


def check_compare(given: CompareSettings) -> None:
    """Check options against each other.

    Raises ConfigError: RW165 unknown methods, RW167 duplicates, and options that exclude each other,
    RW626 an objective that is not compared.
    """
    facts = OBJECTIVES[given.objective]
    if facts.metric is None:
        raise ConfigError(
            "RW626",
            f"--objective {given.objective} cannot be compared: its evaluations record mean rewards, and a verdict on "
            "two methods needs the reward of each prompt. Train each method with `rankwise train`, then compare the "
            "adapters on one task with `rankwise evaluate --adapter A --adapter B`.",
        )
    try:
        known = [variant_of(name) for name in given.methods]
    except ValueError as error:
        raise ConfigError(
            "RW165",
            f"--methods is {','.join(given.methods)}, and {error}; the methods are {', '.join(METHODS)}, and a + joins "
            f"one of {', '.join(VARIANTS)} or rN (a rank) to a method with an adapter.",
        ) from None
    if not known:
        raise ConfigError("RW165", f"--methods is empty; the methods are {', '.join(METHODS)}.")
    rates = given.learning_rates
    is_file, on_cpu = given.model.lower().endswith(".gguf"), given.device in ("auto", "cpu")
    kept = [keeps_file_bits(given.base_bits, method, is_file=is_file, on_cpu=on_cpu) for method, _ in known]
    if len(set(kept)) > 1:
        others = ", ".join(name for name, keeps in zip(given.methods, kept) if not keeps)
        raise ConfigError(
            "RW167",
            f"{others} would train over other bits than {given.model} holds, and the rest over the file itself, so a "
            "verdict would be about two bases; give --base-bits 16, or leave one side out.",
        )
    for name, values in (("--methods", given.methods), ("--learning-rates", rates or ())):
        twice = sorted({str(value) for value in values if values.count(value) > 1})
        if twice:
            raise ConfigError("RW167", f"{name} names {', '.join(twice)} more than once; name each once.")
    if given.time is not None and "seeds" in given.model_fields_set:
        raise ConfigError("RW167", "--time chooses the number of seeds; leave --seeds out.")
    if given.address is not None and given.executor != "ray":
        raise ConfigError("RW167", "--address names a Ray cluster; add --executor ray.")
    if given.retain is None and given.retain_margin != given.defaults()["retain_margin"]:
        raise ConfigError("RW167", NO_RETAIN)
    if given.budget is not None and rates is not None and len(rates) == 1:
        raise ConfigError("RW167", "--budget needs a search among several --learning-rates; give some.")
    if given.budget is not None and not facts.of_demonstrations:
        raise ConfigError(
            "RW167", f"--budget needs --objective sft, and --objective is {given.objective}; leave --budget out."
        )
    if facts.of_labels and (given.task or given.retain):
        raise ConfigError(
            "RW167", "--task and --retain need models that write text, not labels (--objective classify)."
        )
    own, is_task, _ = facts.metric.partition(".")
    measured = (*([own] if is_task else []), *given.task)
    if given.metric != EVAL_LOSS and given.metric.partition(".")[0] not in measured:
        raise ConfigError(
            "RW167",
            f"--metric is {given.metric!r}, which no --task measures; it is {facts.metric} or TASK.METRIC.",
        )


def shared_training(given: CompareSettings) -> JsonObject:
    """The options of ``train`` that every run gets, as JSON values."""
    return given.model_dump(mode="json", include=set(SHARED))

"""A run's settings as the arguments of trl's trainers. Unknown names are refused, and the closest ones suggested."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import warnings
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from rankwise.compat.transformers import use_one_device
from rankwise.config import TrainSettings
from rankwise.conflicts import LED_BY_EVALUATIONS
from rankwise.errors import ConfigError, one_line
from rankwise.known_names import OPTIMIZERS, close_names
from rankwise.training.memory_savers import OFFLOADED

Arguments = TypeVar("Arguments", bound=TrainingArguments)

# Default interval of checkpoints, and the shortest of evaluations, as a share of the run.
TENTH = 0.1
# An evaluation is at most this share of the run's time in all, where a row costs half of what it costs in training: its
# forward pass alone.
EVALUATING, ROW_COST = 0.2, 0.5
# Schedules that need parameters for which `rankwise train` has no options.
SCHEDULES_WITH_PARAMETERS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}


def implementation_of(optimizer: str, device_type: str) -> str:
    """transformers' name of the optimizer that runs. On a GPU, adamw_torch becomes the fused AdamW: one kernel, without
    copies of the trained tensors.
    """
    if optimizer == OFFLOADED:
        return "adamw_torch"
    return "adamw_torch_fused" if (optimizer, device_type) == ("adamw_torch", "cuda") else optimizer


def evaluation_steps_of(steps: int, rows: int, eval_rows: int) -> int:
    """The default of ``eval_steps`` for ``steps`` steps of ``rows`` rows, from what evaluations and steps cost: as many
    evaluations as fit into their share of the run, but one before the first step, one after the last, and at most ten
    more than the first. Counted in rows, not in seconds, so that a run evaluates at the same steps on every machine.
    """
    affordable = int(steps * rows * EVALUATING / (1 - EVALUATING) / (eval_rows * ROW_COST))
    return math.ceil(steps / min(10, max(1, affordable - 1)))


def follows_evaluations(given: TrainSettings) -> bool:
    """Whether the run's course depends on its evaluations, which then come at every tenth whatever they cost."""
    return given.early_stopping is not None or given.lr_scheduler_type in LED_BY_EVALUATIONS


def check_names(given: TrainSettings) -> None:
    """Raise ConfigError: RW110 for an optimizer, RW111 for a schedule that transformers does not have, RW794 for a
    tracker whose package is missing."""
    _check_name("RW110", "--optimizer", given.optimizer, [*(item.value for item in OptimizerNames), OFFLOADED])
    schedules = {item.value for item in SchedulerType} - SCHEDULES_WITH_PARAMETERS
    _check_name("RW111", "--lr-scheduler-type", given.lr_scheduler_type, schedules)
    missing = [name for name in given.trackers if importlib.util.find_spec(name) is None]
    if missing:
        names = ", ".join(missing)
        raise ConfigError(
            "RW794", f"--report-to {names} needs packages that are missing; run pip install {' '.join(missing)}."
        )


def mixed_precision(method: str, dtype: torch.dtype, device_type: str) -> tuple[torch.dtype, str]:
    """The dtype of the model's weights, and the Trainer's mixed precision: "no", "bf16" or "fp16".

    An adapter trains in float32 over a base in ``dtype``. A full fine-tuning keeps float32 weights, since small
    updates would vanish in 16 bits, and computes in ``dtype``. float16 needs loss scaling: ConfigError (RW113) on a
    device without it.
    """
    if dtype == torch.float16:
        if device_type == "cpu":
            raise ConfigError(
                "RW113", "--dtype float16 needs loss scaling, which CPUs do not have; use bfloat16 or float32."
            )
        return (torch.float32 if method == "full" else dtype), "fp16"
    if method == "full" and dtype == torch.bfloat16:
        return torch.float32, "bf16"
    return dtype, "no"


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """Facts outside of the settings on which a run's arguments depend."""

    device_type: str
    # "no", "bf16" or "fp16".
    precision: str
    # Whether there is evaluation data, and whether the run evaluates before the first step.
    evaluates: bool
    eval_on_start: bool
    # Whether the rows of a batch may be concatenated without padding.
    padding_free: bool = False


def sft_arguments(given: TrainSettings, around: Surroundings) -> SFTConfig:
    """trl's arguments for training on demonstrations."""
    return run_arguments(
        SFTConfig,
        given,
        around,
        packing=given.packing,
        padding_free=around.padding_free,
        eval_packing=False,
        # Rows were cut, counted and reported when they were encoded.
        max_length=given.max_length if given.packing else None,
        shuffle_dataset=given.packing,
        activation_offloading=given.activation_offloading,
    )


def run_arguments(kind: type[Arguments], given: TrainSettings, around: Surroundings, **own: Any) -> Arguments:
    """The Trainer's arguments that all objectives share, together with the objective's ``own``.

    Intervals that are None become a tenth of the run (for logging at most 10 steps), once its length is known; that of
    evaluations becomes longer where these are costly (``evaluation_steps_of``).
    """
    with warnings.catch_warnings():
        # transformers renames gradient_checkpointing in 5.2x; the old name works in every version we admit.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = kind(
            output_dir=str(given.output),
            use_cpu=around.device_type == "cpu",
            bf16=around.precision == "bf16",
            fp16=around.precision == "fp16",
            per_device_train_batch_size=given.batch_size,
            per_device_eval_batch_size=given.batch_size,
            gradient_accumulation_steps=given.gradient_accumulation,
            max_steps=given.max_steps or -1,
            num_train_epochs=given.epochs,
            learning_rate=given.rate,
            lr_scheduler_type=given.lr_scheduler_type,
            warmup_steps=given.warmup_steps,
            weight_decay=given.weight_decay,
            max_grad_norm=given.max_grad_norm,
            neftune_noise_alpha=given.neftune_noise_alpha,
            optim=implementation_of(given.optimizer, around.device_type),
            seed=given.seed,
            data_seed=given.seed,
            gradient_checkpointing=given.gradient_checkpointing,
            # The loss is not part of the model's output, so DDP would count every parameter as unused.
            ddp_find_unused_parameters=False,
            # The only buffers are constants, such as the scales of 4-bit layers.
            ddp_broadcast_buffers=False,
            eval_strategy="steps" if around.evaluates else "no",
            eval_steps=given.eval_steps or TENTH,
            eval_on_start=around.eval_on_start,
            save_strategy="steps",
            save_steps=given.save_steps or given.eval_steps or TENTH,
            logging_steps=given.logging_steps or TENTH,
            metric_for_best_model="loss" if around.evaluates else None,
            greater_is_better=False,
            report_to=given.trackers or "none",
            project="rankwise",
            run_name=given.output.name,
            # Otherwise Trackio uploads a copy of the run to the hub at its end.
            trackio_static_space_id=False,
            disable_tqdm=True,
            log_level="error",
            logging_nan_inf_filter=False,
            dataloader_pin_memory=around.device_type == "cuda",
            **own,
        )
    # Otherwise an environment variable of accelerate decides.
    arguments.mixed_precision = around.precision
    use_one_device(arguments)
    return arguments


def _check_name(code: str, option: str, name: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        close = close_names(name, names, OPTIMIZERS, cutoff=0.4) or names
        raise ConfigError(code, f"{option} is {name!r}, which does not exist; the closest are {', '.join(close)}.")


def check_optimizer(arguments: TrainingArguments, model: PreTrainedModel) -> None:
    """Raise ConfigError (RW110) for an optimizer whose package is missing, or that needs unsupported options."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError, RuntimeError, AttributeError) as error:
        raise ConfigError(
            "RW110",
            f"--optimizer {OptimizerNames(arguments.optim).value} cannot be used here: {one_line(error)}.",
        ) from None

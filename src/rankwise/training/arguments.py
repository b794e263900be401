"""Names and numbers of a run as trl's ``SFTConfig``; names that do not exist are refused with the closest ones."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer
from transformers.trainer_utils import SchedulerType
from transformers.training_args import OptimizerNames
from trl.trainer.sft_config import SFTConfig

from rankwise.compat.transformers import use_one_device
from rankwise.errors import ConfigError
from rankwise.known_names import OPTIMIZERS, close_names
from rankwise.training.memory_savers import OFFLOADED

TENTH = 0.1
# Of the run: how often it is evaluated and saved where the user does not say.
SCHEDULES_WITH_PARAMETERS = {"cosine_with_min_lr", "cosine_warmup_with_min_lr", "warmup_stable_decay"}
# Need values that `rankwise train` has no options for.


def check_names(optimizer: str, schedule: str) -> None:
    """Raise ConfigError: RW110 for an optimizer, RW111 for a schedule that transformers does not have."""
    _check_name("RW110", "--optimizer", optimizer, [*(item.value for item in OptimizerNames), OFFLOADED])
    schedules = {item.value for item in SchedulerType} - SCHEDULES_WITH_PARAMETERS
    _check_name("RW111", "--lr-scheduler-type", schedule, schedules)


def check_combinations(*, eval_data: bool, needs_eval: dict[str, Any], schedule: str, tensorboard: bool) -> None:
    """Raise ConfigError (RW112) for options that mean nothing without another one or without a package."""
    idle = [name for name, value in needs_eval.items() if value is not None]
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        idle.append(f"--lr-scheduler-type {schedule}")
    if idle and not eval_data:
        raise ConfigError("RW112", f"{', '.join(idle)}: needs evaluations; give --eval-data too.")
    if tensorboard and importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("RW112", '--tensorboard needs a package: pip install "rankwise[tensorboard]".')


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


def sft_arguments(
    output: Path,
    *,
    device_type: str,
    precision: str,
    batch_size: int,
    gradient_accumulation: int,
    max_steps: int | None,
    epochs: float,
    learning_rate: float,
    schedule: str,
    warmup_steps: int,
    weight_decay: float,
    max_grad_norm: float,
    optimizer: str,
    seed: int,
    packing: bool,
    padding_free: bool = False,
    max_length: int,
    gradient_checkpointing: bool,
    activation_offloading: bool,
    evaluate: bool,
    eval_steps: int | None,
    eval_on_start: bool,
    save_steps: int | None,
    logging_steps: int | None,
    tensorboard: bool,
) -> SFTConfig:
    """The Trainer's arguments.

    Cadences of None become a tenth of the run (for logging at most 10 steps), counted once its length is known.
    """
    with warnings.catch_warnings():
        # transformers renames gradient_checkpointing in 5.2x; the old name works in every version we admit.
        warnings.simplefilter("ignore", FutureWarning)
        arguments = SFTConfig(
            output_dir=str(output),
            use_cpu=device_type == "cpu",
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            per_device_train_batch_size=batch_size,
            per_device_eval_batch_size=batch_size,
            gradient_accumulation_steps=gradient_accumulation,
            max_steps=max_steps or -1,
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            lr_scheduler_type=schedule,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            max_grad_norm=max_grad_norm,
            optim="adamw_torch" if optimizer == OFFLOADED else optimizer,
            seed=seed,
            data_seed=seed,
            packing=packing,
            padding_free=padding_free,
            eval_packing=False,
            max_length=max_length if packing else None,  # rows were cut, counted and reported when they were encoded
            shuffle_dataset=packing,
            gradient_checkpointing=gradient_checkpointing,
            activation_offloading=activation_offloading,
            # The loss does not come out of the model's output, so DDP would take every parameter for unused.
            ddp_find_unused_parameters=False,
            ddp_broadcast_buffers=False,  # the only buffers are constants, such as the scales of 4-bit layers
            eval_strategy="steps" if evaluate else "no",
            eval_steps=eval_steps or TENTH,
            eval_on_start=eval_on_start,
            save_strategy="steps",
            save_steps=save_steps or eval_steps or TENTH,
            logging_steps=logging_steps or TENTH,
            metric_for_best_model="loss" if evaluate else None,
            greater_is_better=False,
            report_to=["tensorboard"] if tensorboard else "none",
            disable_tqdm=True,
            log_level="error",
            logging_nan_inf_filter=False,
            dataloader_pin_memory=device_type == "cuda",
        )
    # An environment variable of accelerate's would otherwise decide.
    arguments.mixed_precision = precision
    use_one_device(arguments)
    return arguments


def _check_name(code: str, option: str, name: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        close = close_names(name, names, OPTIMIZERS, cutoff=0.4) or names
        raise ConfigError(code, f"{option} is {name!r}, which does not exist; the closest are {', '.join(close)}.")


def check_optimizer(arguments: SFTConfig, model: Any) -> None:
    """Raise ConfigError (RW110) for an optimizer whose package is missing or that needs options we do not have."""
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            "RW110", f"--optimizer {OptimizerNames(arguments.optim).value} cannot be used here: {reason}"
        ) from None

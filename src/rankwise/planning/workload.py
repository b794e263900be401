"""What a plan is asked: the options of ``rankwise plan``, one training step as a ``Workload``, and what each optimizer
keeps. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Protocol

from pydantic import Field, model_validator

from rankwise.config import LengthOptions, ModelOptions, StepOptions, TextOptions, TrainSettings
from rankwise.conflicts import check_objective, check_sharing
from rankwise.constants import BLOCK_SIZES, WRITTEN_ROWS
from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject, wrong_fields
from rankwise.methods import METHODS, either
from rankwise.objectives import GENERATIONS, OBJECTIVES, ObjectiveName
from rankwise.options import Batch, Count, Names, Panel, Whole, option

if TYPE_CHECKING:
    from rankwise.planning.hardware import Hardware

# Labels of a head that no data name.
PLANNED_LABELS = 2

ALL = "all"
# How the lines begin that tell of a trace.
TRACING = "tracing"
Goal = Literal["speed", "quality", "serving"]

_model = functools.partial(option, Panel.MODEL)
_device = functools.partial(option, Panel.DEVICE)
_sure = functools.partial(option, Panel.SURE)
_file = functools.partial(option, Panel.FILES, metavar="FILE")


def planned_methods() -> tuple[str, ...]:
    """The methods with a plan, that of all weights first."""
    return tuple(sorted(METHODS, key=lambda name: not METHODS[name].trains_all))


class PlanSettings(ModelOptions, TextOptions, LengthOptions, StepOptions):
    """The options of ``rankwise plan``. Without ``data``, every row is taken to be ``max_length`` tokens long."""

    # A plan for data that are still elsewhere reads none.
    only_given = ("data",)

    model: Annotated[
        str | None,
        _model("Hub id, folder, .gguf file, or `demo`; its weights are not read.", metavar="M"),
    ] = None
    method: Annotated[Names, _model(f"{either(METHODS)}; several with commas; or all.")] = (ALL,)
    objective: Annotated[
        ObjectiveName,
        _model(
            "Objective of `train`. dpo: a pair counts as two rows; grpo: the keys and values of answers count, too; "
            "classify: a head of two labels in place of the vocabulary's."
        ),
    ] = "sft"
    goal: Annotated[Goal, _model("What decides if several methods fit: speed, quality or serving.")] = "speed"

    gpu: Annotated[str | None, _device("GPU to plan for, by name; default: this machine.", metavar="NAME")] = None
    memory: Annotated[
        str | None,
        _device(
            "Memory to plan for: 24GB (10^9 bytes), 24GiB (2^30), 24 (GB): of a machine like this one, or with --gpu "
            "of such a GPU.",
            metavar="SIZE",
        ),
    ] = None
    devices: Annotated[Batch, _device("Number of devices of this kind.")] = 1
    strategy: Annotated[
        Literal["ddp", "fsdp"] | None,
        _device("With several devices: a copy on each (ddp) or shards (fsdp). Default: ddp."),
    ] = None

    trained_share: Annotated[
        float, Field(gt=0, le=1), option(Panel.TRAINING, "Share of the tokens that have labels.")
    ] = 1.0
    rows: Annotated[
        Count | None,
        option(Panel.TRAINING, "Number of rows of training data; the plan then gives the time of the whole run."),
    ] = None
    data: Annotated[
        str | None,
        _model("Training data, whose rows are counted with the model's tokenizer; default: full rows.", metavar="D"),
    ] = None
    skip_bad_rows: Annotated[Whole, _model("Leave out up to N bad rows of each file of --data.")] = 0

    check: Annotated[
        bool, _sure("Run three real steps here, on random weights, and compare measured and predicted memory.")
    ] = False
    why: Annotated[bool, _sure("Print the reasons of the recommendation, with their sources.")] = False
    save: Annotated[Path | None, _file("Write the recommended settings for `rankwise train --config`.")] = None

    @model_validator(mode="before")
    @classmethod
    def _as_planned(cls, given: JsonObject) -> JsonObject:
        """Without the options that only ``train`` has, so that its settings file can be planned."""
        others = TrainSettings.model_fields.keys() - cls.model_fields.keys()
        return {name: value for name, value in given.items() if name not in others}

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to plan for. Raises ConfigError (RW130) for one that does not exist."""
        planned = planned_methods()
        if not self.method or set(self.method) - {*planned, ALL}:
            given, known = ",".join(self.method), ", ".join(planned)
            raise ConfigError("RW130", f"--method is {given!r}; give {known}, several with commas, or all.")
        return planned if ALL in self.method else tuple(name for name in planned if name in self.method)

    def check_options(self) -> None:
        """Raise ConfigError (RW112) for options that do not go together."""
        check_objective(self, self.objective)
        check_sharing(self.objective, self.strategy, self.devices)


# Options that `rankwise train` has too: --save writes those that were given or chosen. It adds the method itself.
SHARED = tuple(name for name in PlanSettings.model_fields if name in TrainSettings.model_fields and name != "method")


# --- one step ---

Strategy = Literal["single", "ddp", "fsdp"]
DeviceType = Literal["cpu", "cuda"]
Dtype = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Workload(StepOptions):
    """One training step: ``batch_size`` rows a device, each of them ``max_length`` tokens long.

    Raises ConfigError (RW130) with every wrong field in one message.
    """

    # Dtype of the base and of the computation; full fine-tuning also keeps float32 weights.
    dtype: Dtype = "bfloat16"
    device_type: DeviceType = "cuda"
    devices: Batch = 1
    # single: one device; ddp: a whole copy on each; fsdp: FSDP2, parameters sharded over the devices.
    strategy: Strategy = "single"
    # On a GPU: whether Triton is installed, which the fused gated MLPs need; torch for Linux includes it.
    triton: bool = True
    # On a GPU: whether torch's flash attention runs, which needs compute capability 8.0.
    flash: bool = True
    # Share of the tokens that have labels: logits are kept only for these. 1.0 is the worst case.
    trained_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # With dpo a row is a pair of answers, two sequences.
    objective: ObjectiveName = "sft"
    # Whether the batch saves nothing for a backward pass, as in an evaluation.
    evaluation: bool = False
    # Whether gradients of earlier micro-batches of the step are there already.
    accumulates: bool = False
    # Number of answers that are generated together before the step, each with its prompt up to ``max_length`` tokens,
    # and number of their prompts; 0 without generation.
    written: Whole = 0
    prompts: Whole = 0
    # Number of labels of the model's head; 0 for a language model.
    labels: Whole = 0
    # As the objective's options; None: its defaults.
    loss_type: str | None = None
    beta: float | None = None
    # Whether the base's experts are in MXFP4.
    experts_in_mxfp4: bool = False
    # Whether a frozen copy of the adapter with which training began is the reference.
    keeps_reference: bool = False

    def __post_init__(self) -> None:
        self.lora_config("lora")
        problems = [*wrong_fields(self), *_problems(self)]
        if problems:
            raise ConfigError("RW130", "; ".join(problems) + ".")

    @property
    def sequences(self) -> int:
        """The number of sequences of a micro-batch on one device."""
        return self.batch_size * OBJECTIVES[self.objective].sequences

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch on one device."""
        return self.sequences * self.max_length

    @property
    def prompt_tokens(self) -> int:
        """The tokens of a row that are not trained, at least one."""
        return max(1, round(self.max_length * (1 - self.trained_share)))

    @property
    def trained_tokens(self) -> int:
        """The number of scored positions: at most all but the last of each row."""
        positions = max(1, min(self.max_length - 1, round(self.max_length * self.trained_share)))
        return self.sequences * positions


class BatchShape(Protocol):
    """A micro-batch: rows, tokens of a row, and the share of the tokens with labels."""

    @property
    def rows(self) -> int: ...

    @property
    def tokens(self) -> int: ...

    @property
    def trained_share(self) -> float: ...


def of_batch(workload: Workload, batch: BatchShape) -> Workload:
    trained = max(batch.trained_share, 1 / batch.tokens)
    length = max(2, batch.tokens)
    return dataclasses.replace(workload, batch_size=batch.rows, max_length=length, trained_share=trained)


def written_of(
    objective: ObjectiveName, answers: int, generations: int | None, device_type: DeviceType
) -> dict[str, int]:
    """``Workload.written`` and ``prompts`` of a run with ``answers`` a step, ``generations`` for each prompt."""
    written = min(answers, WRITTEN_ROWS[device_type]) if OBJECTIVES[objective].of_rewards else 0
    return {"written": written, "prompts": -(-written // (generations or GENERATIONS))}


def _problems(workload: Workload) -> Iterator[str]:
    """Messages about values that the fields' types admit but that are not possible."""
    if workload.block_size not in BLOCK_SIZES:
        yield f"block_size is {workload.block_size!r} and must be one of {', '.join(map(str, BLOCK_SIZES))}"
    if workload.strategy == "single" and workload.devices != 1:
        yield f"devices is {workload.devices!r} and the strategy is single; choose ddp or fsdp"
    if workload.activation_offloading and workload.device_type == "cpu":
        yield (
            "activation_offloading moves activations out of an accelerator's own memory, which neither a processor nor "
            "an Apple GPU has; take gradient_checkpointing"
        )


def workload_for(settings: PlanSettings, hardware: Hardware) -> Workload:
    """The step to estimate. Raises ConfigError as ``PlanSettings.check_options`` and ``Workload`` do."""
    settings.check_options()
    return workload_of(dict(settings), hardware)


def workload_of(settings: Fields, hardware: Hardware) -> Workload:
    """One step with these options of ``train`` or ``plan``, with all rows at full length; for several processes, the
    step of one. The dtype is the one that ``--dtype auto`` gives on the device."""
    kind: DeviceType = "cuda" if hardware.device_type == "cuda" else "cpu"
    devices, objective = settings.get("devices") or 1, settings["objective"]
    answers = settings["batch_size"] * settings["gradient_accumulation"]
    fields = {name: settings[name] for name in Workload.__dataclass_fields__ if name in settings} | {
        "devices": devices,
        "strategy": (settings.get("strategy") or "ddp") if devices > 1 else "single",
        "dtype": hardware.dtype if settings["dtype"] == "auto" else settings["dtype"],
        "device_type": kind,
        "accumulates": settings["gradient_accumulation"] > 1,
        "keeps_reference": settings.get("adapter") is not None
        and (OBJECTIVES[objective].of_preferences or settings["beta"] is not None),
        "labels": settings.get("labels") or (PLANNED_LABELS if OBJECTIVES[objective].of_labels else 0),
        **written_of(objective, answers, settings.get("num_generations"), kind),
    }
    return on_device(Workload(**fields), hardware)


def on_device(workload: Workload, hardware: Hardware) -> Workload:
    """The workload without operators that do not run on the device. An Apple GPU runs plain PyTorch, counted as on a
    CPU, whose memory it shares; a GPU of this machine without Triton runs the model's own gated MLPs. A GPU has flash
    attention where it has bfloat16.
    """
    if hardware.device_type == "mps":
        return dataclasses.replace(workload, fast=False)
    if hardware.device_type != "cuda":
        return workload
    triton = hardware.kind == "card" or importlib.util.find_spec("triton") is not None
    return dataclasses.replace(workload, triton=triton, flash=hardware.has_bfloat16 is not False)


def run_tokens(settings: PlanSettings) -> int | None:
    """The tokens of the whole run with rows of full length; None where neither its steps nor its rows are known."""
    step_rows = settings.batch_size * settings.gradient_accumulation * settings.devices
    if settings.max_steps is not None:
        return settings.max_steps * step_rows * OBJECTIVES[settings.objective].sequences * settings.max_length
    if settings.rows is not None:
        return (
            math.ceil(settings.rows * settings.epochs) * OBJECTIVES[settings.objective].sequences * settings.max_length
        )
    return None


# --- optimizers: n elements in a tensor, s bytes each ---

Shape = tuple[int, ...]

# bitsandbytes keeps smaller tensors' states in 32 bits.
EIGHT_BIT_LEAST = 4096
EIGHT_BIT_BLOCK = 256
# bitsandbytes keeps smaller tensors' states on the device.
PAGED_LEAST = 100_000
TORCHAO_BLOCK = 256


@dataclasses.dataclass(frozen=True)
class OptimizerRule:
    """``state``: (shape, bytes per element) -> bytes; ``paged``: whether the state is in memory that can leave the GPU.

    ``copies``: whether the step holds a temporary copy of the trained tensors (foreach does, fused does not).
    """

    state: Callable[[Shape, int], int]
    paged: bool = False
    copies: bool = False
    # Whether the optimizer is bitsandbytes', which supports CUDA only.
    cuda_only: bool = False


def two_moments(shape: Shape, element_bytes: int) -> int:
    """AdamW: m and v in the parameter's dtype, and a step count of 4 bytes: 2 n s + 4."""
    return 2 * prod(shape) * element_bytes + 4


def two_moments_8bit(shape: Shape, element_bytes: int) -> int:
    """bitsandbytes' 8-bit AdamW: 2 n bytes and 2 float32 scales per 256; below 4096 elements 2 moments in float32."""
    n = prod(shape)
    if n < EIGHT_BIT_LEAST:
        return 8 * n
    return 2 * n + 2 * 4 * -(-n // EIGHT_BIT_BLOCK)


def two_moments_32bit(shape: Shape, element_bytes: int) -> int:
    """bitsandbytes' 32-bit AdamW: both moments in float32, whatever the parameter: 8 n."""
    return 8 * prod(shape)


def two_moments_torchao(bits: int) -> Callable[[Shape, int], int]:
    """torchao's AdamW of few bits: 2 n bits / 8 and 2 float32 scales per block; small or odd tensors in their dtype."""

    def state(shape: Shape, element_bytes: int) -> int:
        n = prod(shape)
        if n < EIGHT_BIT_LEAST or n % TORCHAO_BLOCK:
            return 2 * n * element_bytes + 4
        return 2 * n * bits // 8 + 2 * 4 * (n // TORCHAO_BLOCK) + 4

    return state


def one_moment(shape: Shape, element_bytes: int) -> int:
    """Momentum or Lion: n s."""
    return prod(shape) * element_bytes


def one_moment_8bit(shape: Shape, element_bytes: int) -> int:
    """bitsandbytes' 8-bit Lion or RMSprop: n bytes and a float32 scale per 256."""
    n = prod(shape)
    return 4 * n if n < EIGHT_BIT_LEAST else n + 4 * -(-n // EIGHT_BIT_BLOCK)


def nothing(shape: Shape, element_bytes: int) -> int:
    """0: plain SGD has no state."""
    return 0


def adafactor(shape: Shape, element_bytes: int) -> int:
    """Adafactor, in float32: of a matrix the row and column means of the squares, of a vector all squares."""
    if len(shape) < 2:
        return 4 * prod(shape)
    return 4 * (prod(shape[:-1]) + prod(shape[:-2]) * shape[-1])


RULES: dict[str, OptimizerRule] = {
    "adamw_torch": OptimizerRule(two_moments),
    "adamw_torch_fused": OptimizerRule(two_moments),
    "adamw_torch_8bit": OptimizerRule(two_moments_torchao(8)),
    "adamw_torch_4bit": OptimizerRule(two_moments_torchao(4)),
    "adamw_8bit": OptimizerRule(two_moments_8bit, cuda_only=True),
    "adamw_bnb_8bit": OptimizerRule(two_moments_8bit, cuda_only=True),
    "paged_adamw_8bit": OptimizerRule(two_moments_8bit, paged=True, cuda_only=True),
    "paged_adamw_32bit": OptimizerRule(two_moments_32bit, paged=True, cuda_only=True),
    "paged_adamw": OptimizerRule(two_moments_32bit, paged=True, cuda_only=True),
    "lion_32bit": OptimizerRule(one_moment, cuda_only=True),
    "lion_8bit": OptimizerRule(one_moment_8bit, cuda_only=True),
    "paged_lion_32bit": OptimizerRule(one_moment, paged=True, cuda_only=True),
    "paged_lion_8bit": OptimizerRule(one_moment_8bit, paged=True, cuda_only=True),
    "rmsprop": OptimizerRule(one_moment, copies=True),
    "rmsprop_bnb": OptimizerRule(one_moment, cuda_only=True),
    "rmsprop_bnb_8bit": OptimizerRule(one_moment_8bit, cuda_only=True),
    "rmsprop_bnb_32bit": OptimizerRule(one_moment, cuda_only=True),
    "sgd": OptimizerRule(nothing),
    "adagrad": OptimizerRule(one_moment, copies=True),
    "adafactor": OptimizerRule(adafactor, copies=True),
}


# Those that need no more than torch, of which a plan makes the real one.
MEASURED_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused")


def rule_of(optimizer: str) -> OptimizerRule:
    """The memory rule of an optimizer. Raises ConfigError (RW132) if it is not known."""
    if optimizer not in RULES:
        raise ConfigError(
            "RW132",
            f"the memory of the optimizer {optimizer!r} is not known; plan with one of {', '.join(RULES)}.",
        )
    return RULES[optimizer]


def check_device(optimizer: str, device_type: str, name: str) -> None:
    """Raise ConfigError (RW116) for an optimizer that ``rankwise train`` refuses on the device called ``name``."""
    if rule_of(optimizer).cuda_only and device_type != "cuda":
        raise ConfigError(
            "RW116",
            f"--optimizer {optimizer} runs on CUDA GPUs only, and this plan is for {name}; take adamw_torch.",
        )


def state_bytes(optimizer: str, shapes: Iterable[tuple[Shape, int]]) -> tuple[int, int]:
    """(bytes on the device, bytes elsewhere) of the state for tensors of (shape, bytes per element)."""
    rule, here, elsewhere = rule_of(optimizer), 0, 0
    for shape, element_bytes in shapes:
        size = rule.state(shape, element_bytes)
        if rule.paged and prod(shape) >= PAGED_LEAST:
            elsewhere += size
        else:
            here += size
    return here, elsewhere


@contextmanager
def uncollected() -> Iterator[None]:
    """Without collections of garbage: in a trace they would free a model's cycles and take an eighth of its time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()

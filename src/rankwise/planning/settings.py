"""The options of ``rankwise plan``. Those that ``rankwise train`` has too carry its names, defaults and meanings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankwise.config import (
    ALL_LINEAR,
    LARGEST_BATCH,
    LARGEST_NUMBER,
    LARGEST_RANK,
    LONGEST_ROW,
    MANY,
    AdapterDtype,
    QuantType,
    Settings,
    TrainSettings,
    comma_list,
    module_list,
)
from rankwise.errors import ConfigError
from rankwise.planning.terms import METHODS
from rankwise.planning.workload import Workload

ALL = "all"
Goal = Literal["speed", "quality", "serving"]

SHARED = (
    *("r", "lora_alpha", "lora_dropout", "target_modules", "target_parameters", "exclude_modules"),
    *("modules_to_save", "use_rslora"),
    *("adapter_dtype", "quant_type", "block_size", "double_quant", "batch_size", "gradient_accumulation"),
    *("max_length", "max_steps", "epochs", "gradient_checkpointing", "activation_offloading", "optimizer", "dtype"),
    *("fast", "devices", "strategy"),
    *("model", "trust_remote_code", "revision"),
)
"""Options that ``rankwise train`` has too; ``--save`` writes those that were given or chosen."""

_TRAIN = TrainSettings.model_fields


def _same(name: str, default: Any = ...) -> Any:
    """A field with the help and the default of ``rankwise train``."""
    field = _TRAIN[name]
    return Field(field.default if default is ... else default, description=field.description)


class PlanSettings(Settings):
    """The options of ``rankwise plan``."""

    model: str | None = Field(
        None, description="Hub id, folder, .gguf file, or `demo`; its weights are not read (--calibrate needs none)."
    )
    method: Annotated[str | tuple[str, ...], BeforeValidator(comma_list)] = Field(
        ALL, description="lora, qlora, dora, qdora or full; several with commas; or all."
    )
    goal: Goal = Field("speed", description="What decides where several methods fit: speed, quality or serving.")

    gpu: str | None = Field(None, description="Card to plan for, by name; default: this machine.")
    memory: str | None = Field(
        None,
        description="Memory to plan for: 24GB (10^9 bytes), 24GiB (2^30), 24 (GB). With --gpu: instead of its own.",
    )
    devices: int = Field(1, ge=1, le=LARGEST_BATCH, description="Number of such devices.")
    strategy: Literal["ddp", "fsdp"] | None = Field(
        None, description="With several devices: a copy on each (ddp) or shards (fsdp). Default: ddp."
    )

    batch_size: int = Field(
        _TRAIN["batch_size"].default, ge=1, le=LARGEST_BATCH, description=_TRAIN["batch_size"].description
    )
    gradient_accumulation: int = Field(
        1, ge=1, le=LARGEST_BATCH, description=_TRAIN["gradient_accumulation"].description
    )
    max_length: int = Field(
        _TRAIN["max_length"].default,
        ge=2,
        le=LONGEST_ROW,
        description="Tokens per row; every row is taken to be this long.",
    )
    trained_share: float = Field(1.0, gt=0, le=1, description="Share of the tokens that have labels.")
    r: int = Field(_TRAIN["r"].default, ge=1, le=LARGEST_RANK, description=_TRAIN["r"].description)
    lora_alpha: float = Field(
        _TRAIN["lora_alpha"].default, gt=0, le=LARGEST_NUMBER, description=_TRAIN["lora_alpha"].description
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description=_TRAIN["lora_dropout"].description)
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(module_list)] = Field(
        ALL_LINEAR, description=_TRAIN["target_modules"].description
    )
    target_parameters: Annotated[tuple[str, ...] | None, BeforeValidator(comma_list)] = _same("target_parameters")
    exclude_modules: Annotated[str | tuple[str, ...] | None, BeforeValidator(module_list)] = _same("exclude_modules")
    modules_to_save: Annotated[tuple[str, ...] | None, BeforeValidator(comma_list)] = _same("modules_to_save")
    use_rslora: bool = _same("use_rslora")
    adapter_dtype: AdapterDtype = _same("adapter_dtype")
    quant_type: QuantType = _same("quant_type")
    block_size: int = _same("block_size")
    double_quant: bool = _same("double_quant")
    gradient_checkpointing: bool = _same("gradient_checkpointing")
    activation_offloading: bool = _same("activation_offloading")
    fast: bool = _same("fast")
    optimizer: str = _same("optimizer")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = _same("dtype")

    rows: int | None = Field(None, ge=1, le=MANY, description="Rows of training data, for the hours of the whole run.")
    max_steps: int | None = Field(None, ge=1, le=MANY, description="Optimizer steps, for the hours of the whole run.")
    epochs: float = Field(1.0, gt=0, le=1e6, description="Passes over --rows.")

    exact: bool = Field(False, description="Run the real step of the real model on fake tensors: slower, nearly exact.")
    check: bool = Field(False, description="Run three real steps here, on random weights, and compare.")
    calibrate: bool = Field(False, description="Time real steps on this machine and remember its speed.")
    svg: Path | None = Field(None, description="Write the stacked bars as an SVG file.")
    save: Path | None = Field(None, description="Write the recommended settings for `rankwise train --config`.")

    trust_remote_code: bool = _same("trust_remote_code")
    revision: str | None = _same("revision")

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to plan for. Raises ConfigError (RW142) for one that does not exist."""
        named = (self.method,) if isinstance(self.method, str) else self.method
        unknown = [name for name in named if name not in (*METHODS, ALL)]
        if unknown or not named:
            known = ", ".join(METHODS)
            raise ConfigError("RW142", f"--method is {','.join(named)!r}; give {known}, several with commas, or all.")
        return METHODS if ALL in named else tuple(name for name in METHODS if name in named)

    def workload(self, device_type: Literal["cpu", "cuda"], dtype: str) -> Workload:
        """One training step with these options. Raises ConfigError (RW130)."""
        if self.strategy is not None and self.devices == 1:
            raise ConfigError(
                "RW130", f"--strategy {self.strategy} is for several devices, and --devices is 1; add --devices N."
            )
        names = [name for name in type(self).model_fields if name in Workload.__dataclass_fields__]
        given = {name: getattr(self, name) for name in names if name not in ("dtype", "strategy")}
        strategy = self.strategy or "ddp" if self.devices > 1 else "single"
        return Workload(**given, dtype=dtype, device_type=device_type, strategy=strategy)  # type: ignore[arg-type]

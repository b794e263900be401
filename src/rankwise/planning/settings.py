"""The options of ``rankwise plan``. Options that ``rankwise train`` also has are the same there."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from rankwise.config import LengthOptions, ModelOptions, StepOptions, TrainSettings
from rankwise.conflicts import check_objective, check_sharing
from rankwise.errors import ConfigError
from rankwise.options import Batch, Count, Names, Panel, option
from rankwise.planning.terms import PLANNED

ALL = "all"
Goal = Literal["speed", "quality", "serving"]

_model = functools.partial(option, Panel.MODEL)
_device = functools.partial(option, Panel.DEVICE)
_sure = functools.partial(option, Panel.SURE)
_file = functools.partial(option, Panel.FILES, metavar="FILE")


class PlanSettings(ModelOptions, LengthOptions, StepOptions):
    """The options of ``rankwise plan``. Every row is taken to be ``max_length`` tokens long."""

    model: Annotated[
        str | None,
        _model(
            "Hub id, folder, .gguf file, or `demo`; its weights are not read (--calibrate needs none).", metavar="M"
        ),
    ] = None
    method: Annotated[Names, _model("lora, qlora, dora, qdora or full; several with commas; or all.")] = (ALL,)
    objective: Annotated[
        Literal["sft", "dpo", "kto", "grpo"],
        _model(
            "Objective of `train`. dpo: a pair counts as two rows; grpo: the keys and values of answers count, too."
        ),
    ] = "sft"
    goal: Annotated[Goal, _model("What decides if several methods fit: speed, quality or serving.")] = "speed"

    gpu: Annotated[str | None, _device("Card to plan for, by name; default: this machine.", metavar="NAME")] = None
    memory: Annotated[
        str | None,
        _device(
            "Memory to plan for: 24GB (10^9 bytes), 24GiB (2^30), 24 (GB). With --gpu, it replaces the card's.",
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
        option(Panel.TRAINING, "Number of rows of training data; the plan then gives the hours of the whole run."),
    ] = None

    exact: Annotated[bool, _sure("Run the real step of the real model on fake tensors: slower, nearly exact.")] = False
    check: Annotated[
        bool, _sure("Run three real steps here, on random weights, and compare measured and predicted memory.")
    ] = False
    calibrate: Annotated[bool, _sure("Time real steps on this machine and remember its speed.")] = False
    svg: Annotated[Path | None, _file("Write the bars of memory as an SVG file.")] = None
    save: Annotated[Path | None, _file("Write the recommended settings for `rankwise train --config`.")] = None

    @property
    def methods(self) -> tuple[str, ...]:
        """The methods to plan for. Raises ConfigError (RW131) for one that does not exist."""
        if not self.method or set(self.method) - {*PLANNED, ALL}:
            given, known = ",".join(self.method), ", ".join(PLANNED)
            raise ConfigError("RW131", f"--method is {given!r}; give {known}, several with commas, or all.")
        return PLANNED if ALL in self.method else tuple(name for name in PLANNED if name in self.method)

    def check_options(self) -> None:
        """Raise ConfigError (RW112) for options that do not go together."""
        check_objective(self, self.objective)
        check_sharing(self.objective, self.strategy, self.devices)


# Options that `rankwise train` has too: --save writes those that were given or chosen. It adds the method itself.
SHARED = tuple(name for name in PlanSettings.model_fields if name in TrainSettings.model_fields and name != "method")

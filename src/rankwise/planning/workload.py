"""The settings of a training step on which its memory depends. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rankwise.config import GENERATIONS, StepOptions
from rankwise.constants import BLOCK_SIZES, WRITTEN_ROWS
from rankwise.errors import ConfigError
from rankwise.foreign import wrong_fields
from rankwise.options import Batch, Whole

Strategy = Literal["single", "ddp", "fsdp"]
DeviceType = Literal["cpu", "cuda"]
Dtype = Literal["bfloat16", "float16", "float32"]
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclasses.dataclass(frozen=True)
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
    # Share of the tokens that have labels: logits are kept for these alone. 1.0 is the worst case.
    trained_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    # Number of sequences in a row: 2 for a pair of answers.
    sides: Batch = 1
    # Whether the batch saves nothing for a backward pass, as in an evaluation (closed form only).
    evaluation: bool = False
    # Number of answers that are generated together before the step, each with its prompt up to ``max_length`` tokens,
    # and number of their prompts; 0 without generation.
    written: Whole = 0
    prompts: Whole = 0

    def __post_init__(self) -> None:
        self.lora_config(use_dora=False)
        problems = [*wrong_fields(self), *_problems(self)]
        if problems:
            raise ConfigError("RW130", "; ".join(problems) + ".")

    @property
    def sequences(self) -> int:
        """The number of sequences of a micro-batch on one device."""
        return self.batch_size * self.sides

    @property
    def tokens(self) -> int:
        """The tokens of a micro-batch on one device."""
        return self.sequences * self.max_length

    @property
    def prompt_tokens(self) -> int:
        """The tokens of a row that are not trained, at least one."""
        return max(1, round(self.max_length * (1 - self.trained_share)))

    @property
    def has_triton_parts(self) -> bool:
        """Whether a step on a GPU uses the fused operators that need Triton."""
        return self.device_type == "cuda" and self.fast and self.triton

    @property
    def trained_tokens(self) -> int:
        """The number of scored positions: at most all but the last of each row."""
        positions = max(1, min(self.max_length - 1, round(self.max_length * self.trained_share)))
        return self.sequences * positions


def sides_of(objective: str) -> int:
    """The number of sequences that a step makes of each row."""
    return 2 if objective == "dpo" else 1


def written_of(objective: str, answers: int, generations: int | None, device_type: DeviceType) -> dict[str, int]:
    """``Workload.written`` and ``prompts`` of a run with ``answers`` a step, ``generations`` for each prompt."""
    written = min(answers, WRITTEN_ROWS[device_type]) if objective == "grpo" else 0
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

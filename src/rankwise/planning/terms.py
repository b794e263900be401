"""The result of a memory estimate and its terms. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rankwise.foreign import JsonObject

Phase = Literal["forward", "backward", "optimizer", "generation"]

# Error code of a dry run that exceeded its time limit.
TOO_SLOW = "RW135"

PLANNED = ("full", "lora", "qlora", "dora", "qdora")

# The terms of a breakdown, in the order in which a bar shows them.
#
# weights_4bit  packed codes and their scales
# weights       everything of the base that stays in 16 or 32 bits
# adapters      A, B, magnitudes, and the row norms that DoRA keeps
# gradients     of the trained parameters
# optimizer     its state, on the device
# activations   saved in the forward pass for the backward pass
# logits        logits, their float32 copy, their gradient and what the loss keeps
# transient     short-lived buffers at the peak: dequantized weights, intermediate gradients
# overhead      memory of the device and its libraries other than tensors
TERMS = (
    "weights_4bit",
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "transient",
    "overhead",
)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each of several devices sends to the others; it receives as many."""

    micro_batch: int = 0
    # Once in an optimizer step.
    step: int = 0

    def of_step(self, accumulation: int) -> int:
        return accumulation * self.micro_batch + self.step


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a training step on one device, in bytes."""

    method: str
    peak_bytes: int
    # {term: bytes} over ``TERMS``, at the moment of the peak; they sum to ``peak_bytes``.
    breakdown: dict[str, int]
    trainable_parameters: int
    # Parameters without the adapter; tied weights count once, 4-bit weights by their elements.
    total_parameters: int
    # Expected relative error of ``peak_bytes``, as measured for this way of estimating.
    error: float
    # True for a dry run of the real model, False for the closed form.
    exact: bool
    # The phase of the step with the peak.
    phase: Phase = "backward"
    # The part of ``overhead`` that torch's allocator does not see: peak_bytes - outside_bytes is comparable with
    # torch.cuda.max_memory_allocated(), and with the growth of anonymous memory on a CPU.
    outside_bytes: int = 0
    # Remarks: a length beyond the model's positions, states in host memory, experts that stay dense.
    notes: tuple[str, ...] = ()
    # Duration of the estimate.
    seconds: float = 0.0
    network: Traffic = Traffic()

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

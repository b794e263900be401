"""The result of a memory plan and its terms. Imports no torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from rankwise.foreign import JsonObject

Phase = Literal["forward", "backward", "optimizer", "generation"]

# The code of a dry run that took longer than it was given.
TOO_SLOW = "RW135"

PLANNED = ("full", "lora", "qlora", "dora", "qdora")

# The terms of a breakdown, in the order in which a bar shows them.
#
# weights_4bit  packed codes and their scales
# weights       everything of the base that stays in 16 or 32 bits
# adapters      A, B, magnitudes, and the row norms that DoRA keeps
# gradients     of what trains
# optimizer     its state, on the device
# activations   saved in the forward pass for the backward pass
# logits        logits, their float32 copy, their gradient and what the loss keeps
# transient     short-lived buffers at the moment of the peak: dequantized weights, gradients on their way
# overhead      what the device and its libraries take besides tensors
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
    """Bytes that each of several devices sends to the others; it gets as many."""

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
    # Without the adapter, tied weights once, 4-bit weights by their elements.
    total_parameters: int
    # Relative error to expect of ``peak_bytes``, as measured for this way of estimating.
    error: float
    # A dry run of the real model, or the closed form.
    exact: bool
    # Of the step, in which the peak lies.
    phase: Phase = "backward"
    # The part of ``overhead`` that torch's allocator does not see: peak_bytes - outside_bytes is comparable with
    # torch.cuda.max_memory_allocated(), and with the growth of anonymous memory on a CPU.
    outside_bytes: int = 0
    # What the reader should know: a length beyond the model's, states that live elsewhere, experts left dense.
    notes: tuple[str, ...] = ()
    # That the estimate itself took.
    seconds: float = 0.0
    network: Traffic = Traffic()

    def to_json(self) -> JsonObject:
        return {**dataclasses.asdict(self), "notes": list(self.notes)}

"""The bytes on the device that each optimizer keeps for a trained tensor. Imports no torch.

n elements in a tensor, s bytes each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from math import prod

from rankwise.errors import ConfigError

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
    # Whether the whole state is in host memory.
    hosted: bool = False
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
    # AdamW tensor by tensor holds sqrt(v) of each.
    "adamw_torch": OptimizerRule(two_moments, copies=True),
    "adamw_torch_fused": OptimizerRule(two_moments),
    "adamw_offload": OptimizerRule(two_moments, hosted=True),
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


def copies_on(device_type: str, optimizer: str) -> bool:
    """Whether a step holds a copy of each tensor; on a card torch's AdamW runs fused, without."""
    return rule_of(optimizer).copies and (device_type, optimizer) != ("cuda", "adamw_torch")


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
            f"--optimizer {optimizer} runs on CUDA cards only, and this plan is for {name}; take adamw_torch, or "
            "adamw_offload, which keeps the optimizer's state in CPU memory.",
        )


def state_bytes(optimizer: str, shapes: Iterable[tuple[Shape, int]]) -> tuple[int, int]:
    """(bytes on the device, bytes elsewhere) of the state for tensors of (shape, bytes per element)."""
    rule, here, elsewhere = rule_of(optimizer), 0, 0
    for shape, element_bytes in shapes:
        size = rule.state(shape, element_bytes)
        if rule.hosted or (rule.paged and prod(shape) >= PAGED_LEAST):
            elsewhere += size
        else:
            here += size
    return here, elsewhere

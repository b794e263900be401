"""Make training steps faster, in addition to the adapters' operators. Changes are in place and can be undone."""

from rankwise.acceleration.attention import flattening_obstacle
from rankwise.acceleration.loss import Head, LossOptions, fused_head, head_in_eight_bits
from rankwise.acceleration.memory import (
    anonymous_memory_bytes,
    give_back_freed_memory,
    grow_segments,
    limit_generated_kernels,
    offloaded,
    share_one_heap,
)
from rankwise.acceleration.optimize import (
    Acceleration,
    accelerate_peft,
    calibrate_products,
    keep_rounded,
    optimize_for_training,
    restore,
    rounded_bytes,
)
from rankwise.acceleration.parts import use_native_products

__all__ = [
    "Acceleration",
    "Head",
    "LossOptions",
    "accelerate_peft",
    "anonymous_memory_bytes",
    "calibrate_products",
    "flattening_obstacle",
    "fused_head",
    "give_back_freed_memory",
    "grow_segments",
    "head_in_eight_bits",
    "keep_rounded",
    "limit_generated_kernels",
    "offloaded",
    "optimize_for_training",
    "restore",
    "rounded_bytes",
    "share_one_heap",
    "use_native_products",
]

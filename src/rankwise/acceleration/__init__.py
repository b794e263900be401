"""Make a training step fast, beyond the adapters' own operators. Changes are made in place and can be undone."""

from rankwise.acceleration.allocator import give_back_freed_memory, grow_segments, limit_generated_kernels
from rankwise.acceleration.linears import use_native_products
from rankwise.acceleration.loss import LossOptions
from rankwise.acceleration.optimize import Acceleration, fused_head, optimize_for_training, restore
from rankwise.acceleration.peft_layers import accelerate_peft
from rankwise.acceleration.rows import flattening_obstacle

__all__ = [
    "Acceleration",
    "LossOptions",
    "accelerate_peft",
    "flattening_obstacle",
    "fused_head",
    "give_back_freed_memory",
    "grow_segments",
    "limit_generated_kernels",
    "optimize_for_training",
    "restore",
    "use_native_products",
]

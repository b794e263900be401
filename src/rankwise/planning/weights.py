"""Bytes of weights, adapters, gradients and optimizer state: the terms that do not depend on the batch. No torch.

n parameters, s bytes per element, b weights per 4-bit block.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from math import ceil, prod
from pathlib import Path

from rankwise.config import DORA, FOUR_BITS
from rankwise.constants import ALIGNED, NESTED_BLOCK
from rankwise.planning.adapted import Adaptation, Adapted, AdaptedStack
from rankwise.planning.hardware import cpu_flags
from rankwise.planning.optimizers import Shape as TensorShape
from rankwise.planning.parallel import Group, layer_and_root
from rankwise.planning.shape import Module, Shape
from rankwise.planning.workload import Workload

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# The shape of a trained tensor, and its bytes per element.
Tensor = tuple[TensorShape, int]


def packed_bytes(weights: int, block_size: int, *, double_quant: bool) -> int:
    """One 4-bit weight: n / 2 bytes of codes; n / b scales of 4 bytes, or of 1 byte with 4 more per 256 and one offset.

    With b = 64 that is 4.5 bits per parameter, and 4.127 with double quantization (QLoRA, section 3: 0.373 saved).
    """
    blocks = ceil(weights / block_size)
    scales = blocks + 4 * ceil(blocks / NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return ceil(weights / 2) + scales


def packed(module: Module, shape: Shape, workload: Workload) -> list[TensorShape]:
    """Shapes of the module's weights that become 4-bit: linear layers except the output head, and stacks of experts
    whose matrices are whole blocks."""
    if module.is_linear and module is not shape.modules[-1]:
        return [(module.outputs, module.inputs)]
    return [stack for stack in module.stacks if prod(stack[1:]) % workload.block_size == 0]


def made_dense(shape: Shape, workload: Workload) -> Iterator[int]:
    """Element counts of the 4-bit weights that products make dense; of stacked experts that of one expert."""
    return (prod(tensor[-2:]) for module in shape.modules for tensor in packed(module, shape, workload))


def has_packed_experts(shape: Shape, workload: Workload) -> bool:
    """Whether stacks of experts become 4-bit where the method has 4-bit weights."""
    return any(module.stacks and packed(module, shape, workload) for module in shape.modules)


def dense_experts(shape: Shape, workload: Workload) -> bool:
    """Whether stacks of experts stay dense where the method has 4-bit weights."""
    return any(len(packed(module, shape, workload)) < len(module.stacks) for module in shape.modules)


def weights_4bit_bytes(shape: Shape, method: str, workload: Workload) -> int:
    """Codes and scales of every 4-bit weight."""
    if method not in FOUR_BITS:
        return 0
    return sum(_packed_bytes(module, shape, workload) for module in shape.modules)


def _packed_bytes(module: Module, shape: Shape, workload: Workload) -> int:
    return sum(
        packed_bytes(prod(tensor), workload.block_size, double_quant=workload.double_quant)
        for tensor in packed(module, shape, workload)
    )


def base_element_bytes(method: str, workload: Workload) -> int:
    """4 for full fine-tuning, whose weights the trainer keeps in float32; else the size of the dtype."""
    return 4 if method == "full" else DTYPE_BYTES[workload.dtype]


def dense_bytes(shape: Shape, method: str, workload: Workload) -> int:
    """Everything that is not 4-bit: ``n s``, tied tensors once; biases of 4-bit layers, and experts without whole
    blocks.
    """
    count = shape.parameters
    if method in FOUR_BITS:
        count -= sum(prod(tensor) for module in shape.modules for tensor in packed(module, shape, workload))
    return count * base_element_bytes(method, workload)


def trained_tensors(shape: Shape, method: str, workload: Workload, adapted: Adaptation | None) -> Iterator[Tensor]:
    """The shape and the element size of each trained tensor."""
    base = base_element_bytes(method, workload)
    if adapted is None:
        last = len(shape.modules) - (1 if shape.tied else 0)
        for module in shape.modules[:last]:
            yield from _own_tensors(module, base)
        return
    element = 4 if workload.adapter_dtype == "float32" else base
    for item in adapted.pairs:
        yield from _adapter_tensors(item, element)
    for module in adapted.whole:
        yield from _own_tensors(module, base)
    for module in adapted.biases:
        yield (module.outputs,), base


def _adapter_tensors(item: Adapted | AdaptedStack, element: int) -> Iterator[Tensor]:
    """A and B in their dtype, DoRA's magnitude in float32."""
    return ((tensor, element if len(tensor) > 1 else 4) for tensor in item.shapes)


def _own_tensors(module: Module, element: int) -> Iterator[Tensor]:
    if module.extra:
        yield (module.extra,), element
    if module.inputs:
        yield (module.outputs, module.inputs), element
    if module.bias:
        yield (module.outputs,), element


def tensor_bytes(tensors: list[Tensor]) -> int:
    """``n s`` summed: of trained tensors, and of their gradients, which have their dtype."""
    return sum(prod(shape) * size for shape, size in tensors)


def first_pair_bytes(method: str, workload: Workload, adapted: Adaptation | None) -> int:
    """PiSSA keeps the A and B that it took out of the base, in the adapter's dtype."""
    if adapted is None or not workload.init.startswith("pissa"):
        return 0
    element = 4 if workload.adapter_dtype == "float32" else base_element_bytes(method, workload)
    return sum(element * sum(map(prod, item.shapes[:2])) for item in adapted.adapted)


def kept_norm_bytes(method: str, workload: Workload, adapted: Adaptation | None) -> int:
    """DoRA keeps ``||W||^2``, ``||W + s B A||`` and g per output row in float32, on a card with Triton without the
    norms; on a CPU also copies of A, B, m and the norms, by which it notices writes past PyTorch."""
    if method not in DORA or adapted is None:
        return 0
    rows = sum(item.module.outputs for item in adapted.adapted)
    if workload.device_type != "cpu":
        return (8 if workload.triton else 12) * rows
    element = 4 if workload.adapter_dtype == "float32" else base_element_bytes(method, workload)
    return 20 * rows + sum(element * sum(map(prod, item.shapes[:2])) for item in adapted.adapted)


def kept_copy_bytes(workload: Workload, adapted: Adaptation | None) -> int:
    """On a card with Triton, A and B of a linear layer in the 16 bits of its base, each rank filled up to a multiple of
    ALIGNED."""
    if adapted is None or workload.device_type != "cuda" or not workload.triton or workload.dtype == "float32":
        return 0
    items = [item for item in adapted.adapted if item.parts is None and item.module.is_linear]
    return sum(2 * -(-item.r // ALIGNED) * ALIGNED * (item.module.inputs + item.module.outputs) for item in items)


def sharding_groups(shape: Shape, method: str, workload: Workload, adapted: Adaptation | None) -> tuple[Group, Group]:
    """What FSDP2 gathers at once: (the largest layer, all that lies outside of the layers); nothing without it."""
    if workload.strategy != "fsdp":
        return Group(), Group()
    parts = []
    for module in shape.modules[: -1 if shape.tied else None]:
        held = _held_bytes(module, shape, method, workload)
        # Full fine-tuning trains what is there; an adapter beside it is whole on every device.
        parts.append((module.name, Group(held, held if adapted is None else 0)))
    return layer_and_root(parts)


def _held_bytes(module: Module, shape: Shape, method: str, workload: Workload) -> int:
    element = base_element_bytes(method, workload)
    if method not in FOUR_BITS:
        return module.parameters * element
    dense = module.parameters - sum(map(prod, packed(module, shape, workload)))
    return _packed_bytes(module, shape, workload) + dense * element


def decodes_in_caches(workload: Workload) -> bool:
    """Whether 4-bit weights are decoded in this CPU's caches and never made dense, as its sums of products do."""
    if workload.device_type != "cpu":
        return False
    pairs = workload.dtype == "bfloat16" and _is_built() and "avx512_bf16" in cpu_flags()
    return pairs or (workload.dtype in ("bfloat16", "float32") and computes_in_float32())


@functools.cache
def computes_in_float32() -> bool:
    """Whether our products and attention compute in float32 on this CPU, so that they take float32 beside bfloat16.

    csrc/common/level.cpp decides so; here it is decided without torch, whose import a plan avoids.
    """
    return _is_built() and "avx2" in cpu_flags() and "avx512_bf16" not in cpu_flags()


@functools.cache
def _is_built() -> bool:
    return any((Path(__file__).parents[1] / "ops" / "cpu").glob("_native*"))


LEAST_KEPT_BYTES, MOST_KEPT_BYTES = 1 << 20, 256 << 20


def kept_dense_bytes(shape: Shape, method: str, workload: Workload) -> int:
    """On a CPU, the memory of the largest dequantized weight if it has 1 to 256 MiB: the native library keeps it for
    the next one.
    """
    if method not in FOUR_BITS or workload.device_type != "cpu" or decodes_in_caches(workload):
        return 0
    element = DTYPE_BYTES[workload.dtype]
    sizes = (weights * element for weights in made_dense(shape, workload))
    return max((size for size in sizes if LEAST_KEPT_BYTES <= size <= MOST_KEPT_BYTES), default=0)

"""Bytes of weights, adapters and gradients: the terms that do not depend on the batch. Imports no torch.

n parameters, s bytes per element, b weights per 4-bit block.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import ceil, prod

from rankwise.config import DORA
from rankwise.constants import ALIGNED, KEPT_BYTES, NESTED_BLOCK
from rankwise.planning.optimizers import Shape
from rankwise.planning.parallel import Group, layer_and_root
from rankwise.planning.shape import Module
from rankwise.planning.step_facts import StepFacts

# The shape of a trained tensor, and its bytes per element.
Tensor = tuple[Shape, int]


def packed_bytes(weights: int, block_size: int, *, double_quant: bool) -> int:
    """One 4-bit weight: n / 2 bytes of codes; n / b scales of 4 bytes, or of 1 byte with 4 more per 256 and one offset.

    With b = 64 that is 4.5 bits per parameter, and 4.127 with double quantization (QLoRA, section 3: 0.373 saved).
    """
    blocks = ceil(weights / block_size)
    scales = blocks + 4 * ceil(blocks / NESTED_BLOCK) + 4 if double_quant else 4 * blocks
    return ceil(weights / 2) + scales


def weight_bytes(step: StepFacts, module: Module) -> tuple[int, int]:
    """(codes and scales of the module's 4-bit weights; n s of the rest: biases of 4-bit layers, experts without whole
    blocks, and all where the method has no 4-bit weights)."""
    sizes = [prod(size) for size in step.four_bit_weights(module)]
    block, double = step.workload.block_size, step.workload.double_quant
    four_bit = sum(packed_bytes(size, block, double_quant=double) for size in sizes)
    return four_bit, (module.parameters - sum(sizes)) * step.base_element_bytes


def all_weight_bytes(step: StepFacts) -> tuple[int, int]:
    """The same over the model, tied tensors once."""
    parts = [weight_bytes(step, module) for module in _stored(step)]
    return sum(four_bit for four_bit, _ in parts), sum(dense for _, dense in parts)


def _stored(step: StepFacts) -> tuple[Module, ...]:
    """The head is the last module, and a tied one is the embedding."""
    return step.shape.modules[: -1 if step.shape.tied else None]


def trained_tensors(step: StepFacts) -> Iterator[Tensor]:
    """The shape and the element size of each trained tensor."""
    base, adapted = step.base_element_bytes, step.adaptation
    if adapted is None:
        for module in _stored(step):
            yield from _own_tensors(module, base)
        return
    for item in adapted.pairs:
        # A and B in their dtype, DoRA's magnitude in float32.
        yield from ((shape, step.pair_element_bytes if len(shape) > 1 else 4) for shape in item.shapes)
    for module in adapted.whole:
        yield from _own_tensors(module, base)
    for module in adapted.biases:
        yield (module.outputs,), base


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


def kept_beside_adapters_bytes(step: StepFacts) -> int:
    """Memory that adapters hold through the whole step beside their tensors.

    PiSSA keeps the A and B that it took out of the base. On a card with Triton there are A and B of linear layers in
    the 16 bits of the base, each rank filled up to a multiple of ALIGNED.
    """
    if step.adaptation is None:
        return 0
    kept, work = _kept_norm_bytes(step), step.workload
    if work.init.startswith("pissa"):
        kept += _pair_bytes(step)
    if step.on_card and work.triton and work.dtype != "float32":
        items = [item for item in step.adaptation.adapted if item.parts is None and item.module.is_linear]
        widths = [ceil(item.r / ALIGNED) * ALIGNED * (item.module.inputs + item.module.outputs) for item in items]
        kept += 2 * sum(widths)
    return kept


def _kept_norm_bytes(step: StepFacts) -> int:
    """DoRA keeps ``||W||^2``, ``||W + s B A||`` and g per output row in float32, on a card with Triton without the
    norms; on a CPU also copies of A, B, m and the norms, by which it notices writes past PyTorch."""
    if step.method not in DORA or step.adaptation is None:
        return 0
    rows = sum(item.module.outputs for item in step.adaptation.adapted)
    if step.on_card:
        return (8 if step.workload.triton else 12) * rows
    return 20 * rows + _pair_bytes(step)


def _pair_bytes(step: StepFacts) -> int:
    """A and B of modules, without those of stacked experts."""
    items = () if step.adaptation is None else step.adaptation.adapted
    return step.pair_element_bytes * sum(sum(map(prod, item.shapes[:2])) for item in items)


def kept_dense_bytes(step: StepFacts) -> int:
    """On a CPU, the memory of the largest dequantized weight within KEPT_BYTES: the native library keeps it for the
    next one."""
    least, most = KEPT_BYTES
    return 0 if step.on_card else max((size for size in step.made_dense if least <= size <= most), default=0)


def sharding_groups(step: StepFacts) -> tuple[Group, Group]:
    """What FSDP2 gathers at once: (the largest layer, all that lies outside of the layers); nothing without it."""
    if step.workload.strategy != "fsdp":
        return Group(), Group()
    held = [(module.name, sum(weight_bytes(step, module))) for module in _stored(step)]
    # Full fine-tuning trains what is there; an adapter beside it is whole on every device.
    return layer_and_root((name, Group(size, size if step.is_full else 0)) for name, size in held)

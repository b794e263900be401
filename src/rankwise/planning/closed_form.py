"""The closed form: the peak of a step from a model's config alone, in milliseconds. Imports no torch.

peak = weights + adapters + optimizer state + the most that a phase adds (`planning.phases`)
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from math import prod

from rankwise.config import DORA, FOUR_BITS
from rankwise.planning import evaluating, weights
from rankwise.planning.adapted import STACKS, Adaptation, AdaptedStack, adaptation
from rankwise.planning.assemble import Found, assembled
from rankwise.planning.optimizers import copies_on, state_bytes
from rankwise.planning.phases import Moments, Terms
from rankwise.planning.shape import Shape
from rankwise.planning.step_facts import StepFacts
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload


def of_shape(shape: Shape, method: str, workload: Workload) -> MemoryEstimate:
    """The peak of one step. Raises AdapterError: RW401 to RW404 and RW419 for targets; ConfigError: RW132 for an
    optimizer whose memory is not known."""
    started = time.perf_counter()
    adapted = None if method == "full" else adaptation(shape, workload.lora_config(use_dora=method in DORA))
    tensors = list(weights.trained_tensors(shape, method, workload, adapted))
    state, elsewhere = state_bytes(workload.optimizer, tensors)
    fixed = fixed_terms(shape, method, workload, adapted) | {"optimizer": state}
    layer, root = weights.sharding_groups(shape, method, workload, adapted)
    moving = phases(shape, method, workload, adapted, tensors)
    found = Found(
        phases={phase: fixed | terms for phase, terms in moving.items()},
        trainable=shape.parameters if adapted is None else adapted.parameters,
        total=shape.parameters,
        trained_bytes=weights.tensor_bytes(tensors),
        elsewhere_bytes=elsewhere,
        max_positions=shape.max_positions,
        layer=layer,
        root=root,
        weight_bytes=fixed["weights"] + fixed["weights_4bit"],
        exact=False,
        notes=notes_of(shape, method, workload),
    )
    return assembled(method, workload, found, started)


def fixed_terms(shape: Shape, method: str, workload: Workload, adapted: Adaptation | None) -> Terms:
    """The terms that are held through the whole step, without the optimizer's state."""
    own = [] if adapted is None else list(weights.trained_tensors(shape, method, workload, adapted))
    kept = weights.kept_norm_bytes(method, workload, adapted) + weights.kept_dense_bytes(shape, method, workload)
    kept += weights.first_pair_bytes(method, workload, adapted)
    kept += weights.kept_copy_bytes(workload, adapted)
    return {
        "weights_4bit": weights.weights_4bit_bytes(shape, method, workload),
        "weights": weights.dense_bytes(shape, method, workload),
        "adapters": weights.tensor_bytes(own) + kept,
    }


def step_of(shape: Shape, method: str, workload: Workload, adapted: Adaptation | None) -> StepFacts:
    items = () if adapted is None else adapted.adapted
    trained = [item.module for item in items] + list(() if adapted is None else adapted.whole)
    ends = frozenset(".".join(module.name.split(".")[-2:]) for module in trained)
    stacks = () if adapted is None else adapted.stacks
    layer_weights = sum(module.parameters for module in shape.modules if ".0." in module.name)
    return StepFacts(
        shape=shape,
        method=method,
        workload=workload,
        ranks=sum(item.rank for item in items) / shape.layers,
        adapted=ends | frozenset(name.rpartition(".")[2] for name in ends),
        whole_head=adapted is not None and shape.modules[-1] in adapted.whole,
        layer_weights=layer_weights,
        expert_ranks=(_rank_of(stacks, STACKS[0]) / shape.layers, _rank_of(stacks, STACKS[1]) / shape.layers),
        expert_share=len({item.module.name for item in stacks}) / shape.layers,
    )


def _rank_of(stacks: Sequence[AdaptedStack], leaf: str) -> int:
    return sum(item.r for item in stacks if item.leaf == leaf)


def phases(
    shape: Shape, method: str, workload: Workload, adapted: Adaptation | None, tensors: list[weights.Tensor]
) -> dict[str, Terms]:
    """{phase: the terms that it adds to the fixed ones}."""
    step, unpacked = step_of(shape, method, workload, adapted), unpacked_bytes(shape, method, workload)
    written = evaluating.written_bytes(step, unpacked) if workload.written else {}
    if workload.evaluation:
        return written or evaluating.forward_bytes(step, unpacked)
    biases_train = adapted is not None and bool(adapted.biases)
    gradients, copies = weights.tensor_bytes(tensors), step_copies_bytes(workload, tensors)
    return {**dict(Moments(step, gradients, copies, unpacked, biases_train).phases()), **written}


def unpacked_bytes(shape: Shape, method: str, workload: Workload) -> int:
    """The dense copy of a 4-bit weight for its product: the largest N K s, of stacked experts one expert's. A card
    holds it for that time only.
    """
    if method not in FOUR_BITS or weights.decodes_in_caches(workload):
        return 0
    element = weights.DTYPE_BYTES[workload.dtype]
    return max(weights.made_dense(shape, workload)) * element


def step_copies_bytes(workload: Workload, tensors: list[weights.Tensor]) -> int:
    """An optimizer over all tensors at once (a card) copies each; one after the other, a few of the largest."""
    if not copies_on(workload.device_type, workload.optimizer):
        return 0
    if workload.device_type == "cuda":
        return weights.tensor_bytes(tensors)
    return 2 * max(prod(shape) * size for shape, size in tensors)


def notes_of(shape: Shape, method: str, workload: Workload) -> tuple[str, ...]:
    notes = []
    if method == "full":
        notes.append("full fine-tuning keeps float32 weights, gradients and moments: 16 bytes per parameter")
    if method in FOUR_BITS and weights.dense_experts(shape, workload):
        notes.append(f"experts of no whole blocks of {workload.block_size} weights stay in their dtype")
    return tuple(notes)

"""The closed form: the peak of a step from a model's config alone, in milliseconds. Imports no torch.

peak = weights + adapters + optimizer state + the most that a phase adds (`planning.phases`)
"""

from __future__ import annotations

import time
from math import prod

from rankwise.config import FOUR_BITS
from rankwise.planning import evaluating, weights
from rankwise.planning.assemble import Found, assembled
from rankwise.planning.optimizers import copies_on, state_bytes
from rankwise.planning.phases import Moments, Terms
from rankwise.planning.shape import Shape
from rankwise.planning.step_facts import StepFacts
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload


def of_shape(shape: Shape, method: str, workload: Workload) -> MemoryEstimate:
    """The peak of one step. Raises AdapterError: RW401 to RW403 and RW419 for targets; ConfigError: RW132 for an
    optimizer whose memory is not known."""
    started = time.perf_counter()
    step = StepFacts.of(shape, method, workload)
    tensors = list(weights.trained_tensors(step))
    state, elsewhere = state_bytes(workload.optimizer, tensors)
    fixed = fixed_terms(step) | {"optimizer": state}
    layer, root = weights.sharding_groups(step)
    found = Found(
        phases={phase: fixed | terms for phase, terms in phases(step, tensors).items()},
        trainable=shape.parameters if step.adaptation is None else step.adaptation.parameters,
        total=shape.parameters,
        trained_bytes=weights.tensor_bytes(tensors),
        elsewhere_bytes=elsewhere,
        max_positions=shape.max_positions,
        layer=layer,
        root=root,
        weight_bytes=fixed["weights"] + fixed["weights_4bit"],
        exact=False,
        notes=notes_of(step),
    )
    return assembled(method, workload, found, started)


def fixed_terms(step: StepFacts) -> Terms:
    """The terms that are held through the whole step, without the optimizer's state."""
    own = [] if step.adaptation is None else list(weights.trained_tensors(step))
    kept = weights.kept_beside_adapters_bytes(step) + weights.kept_dense_bytes(step)
    four_bit, dense = weights.all_weight_bytes(step)
    return {"weights_4bit": four_bit, "weights": dense, "adapters": weights.tensor_bytes(own) + kept}


def phases(step: StepFacts, tensors: list[weights.Tensor]) -> dict[str, Terms]:
    """{phase: the terms that it adds to the fixed ones}."""
    # The dense copy of a 4-bit weight is there for its product only.
    workload, unpacked = step.workload, max(step.made_dense, default=0)
    written = evaluating.written_bytes(step, unpacked) if workload.written else {}
    if workload.evaluation:
        return written or evaluating.forward_bytes(step, unpacked)
    gradients, copies = weights.tensor_bytes(tensors), step_copies_bytes(workload, tensors)
    return {**dict(Moments(step, gradients, copies, unpacked).phases()), **written}


def step_copies_bytes(workload: Workload, tensors: list[weights.Tensor]) -> int:
    """An optimizer over all tensors at once (a card) copies each; one after the other, a few of the largest."""
    if not copies_on(workload.device_type, workload.optimizer):
        return 0
    if workload.device_type == "cuda":
        return weights.tensor_bytes(tensors)
    return 2 * max(prod(shape) * size for shape, size in tensors)


def notes_of(step: StepFacts) -> tuple[str, ...]:
    notes = []
    if step.is_full:
        notes.append("full fine-tuning keeps float32 weights, gradients and moments: 16 bytes per parameter")
    is_dense = (len(step.four_bit_weights(module)) < len(module.stacks) for module in step.shape.modules)
    if step.method in FOUR_BITS and any(is_dense):
        block = step.workload.block_size
        notes.append(f"experts of no whole blocks of {block} weights stay in their dtype")
    return tuple(notes)

"""The closed form: the peak of a step from a model's config alone, in milliseconds. Imports no torch.

fixed = weights + adapters + optimizer state
peak  = fixed + max of
    forward     saved by all layers + logits
    backward    saved by all layers + what the last layer's gradients take (with checkpointing the input of each
                layer is saved, and one layer is made again)
    its end     all gradients + one layer, or + the embedding's gradient
    optimizer   all gradients + the optimizer's copies
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from math import prod

from rankwise.config import DORA, FOUR_BITS
from rankwise.planning import activations, backward, evaluating, weights
from rankwise.planning.activations import Step
from rankwise.planning.adapted import STACKS, Adaptation, AdaptedStack, adaptation
from rankwise.planning.architectures import read_shape
from rankwise.planning.assemble import assembled
from rankwise.planning.optimizers import rule_of, state_bytes
from rankwise.planning.shape import Shape
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload

Terms = dict[str, int]


def closed_form(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> MemoryEstimate:
    """The peak of one step. Raises ModelError: as ``read_shape`` does; AdapterError RW401 to RW404 for targets;
    ConfigError RW132 for an optimizer whose memory is not known."""
    started = time.perf_counter()
    shape = read_shape(model, trust_remote_code=trust_remote_code, revision=revision)
    return of_shape(shape, method, workload, started=started)


def of_shape(shape: Shape, method: str, workload: Workload, *, started: float | None = None) -> MemoryEstimate:
    """The same for a shape at hand."""
    started = time.perf_counter() if started is None else started
    adapted = None if method == "full" else adaptation(shape, workload.lora_config(use_dora=method in DORA))
    tensors = list(weights.trained_tensors(shape, method, workload, adapted))
    state, elsewhere = state_bytes(workload.optimizer, tensors)
    fixed = fixed_terms(shape, method, workload, adapted) | {"optimizer": state}
    layer, root = weights.sharding_groups(shape, method, workload, adapted)
    moving = phases(shape, method, workload, adapted, tensors)
    return assembled(
        method,
        workload,
        phases={phase: fixed | terms for phase, terms in moving.items()},
        trainable=shape.parameters if adapted is None else adapted.parameters,
        total=shape.parameters,
        elsewhere_bytes=elsewhere,
        max_positions=shape.max_positions,
        exact=False,
        seconds=time.perf_counter() - started,
        layer=layer,
        root=root,
        trained_bytes=weights.tensor_bytes(tensors),
        notes=notes_of(shape, method, workload),
    )


def fixed_terms(shape: Shape, method: str, workload: Workload, adapted: Adaptation | None) -> Terms:
    """What lies in memory all the time, but for the optimizer's state."""
    own = [] if adapted is None else list(weights.trained_tensors(shape, method, workload, adapted))
    kept = weights.kept_norm_bytes(method, workload, adapted) + weights.kept_dense_bytes(shape, method, workload)
    return {
        "weights_4bit": weights.weights_4bit_bytes(shape, method, workload),
        "weights": weights.dense_bytes(shape, method, workload),
        "adapters": weights.tensor_bytes(own) + kept,
    }


def step_of(shape: Shape, method: str, workload: Workload, adapted: Adaptation | None) -> Step:
    items = () if adapted is None else adapted.adapted
    trained = [item.module for item in items] + list(() if adapted is None else adapted.whole)
    ends = frozenset(".".join(module.name.split(".")[-2:]) for module in trained)
    stacks = () if adapted is None else adapted.stacks
    layer_weights = sum(module.parameters for module in shape.modules if ".0." in module.name)
    return Step(
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
    step = step_of(shape, method, workload, adapted)
    if workload.evaluation:
        return evaluating.forward_bytes(step, unpacked_bytes(shape, method, workload))
    layer, held = activations.layer_bytes(step), backward.backward_bytes(step)
    again = workload.gradient_checkpointing
    saved = shape.layers * (activations.checkpoint_bytes(step) if again else layer)
    begins_late = not again and adapted is not None and not adapted.biases
    unsaved = activations.unsaved_bytes(step) if begins_late else 0
    saved -= unsaved
    if workload.activation_offloading:
        saved = 0
    one = layer - activations.kept_twice_bytes(step) if again else 0
    if workload.activation_offloading and not again:
        held = backward.offloaded_backward_bytes(step)
    first = one if workload.activation_offloading else layer - unsaved
    outside = activations.outside_layers_bytes(step)
    gradients = weights.tensor_bytes(tensors)
    unpacked = unpacked_bytes(shape, method, workload)
    # By then what lies outside of the layers is mostly gone; with checkpointing the mask is needed again.
    outside_then = activations.checkpoint_bytes(step) + activations.masks_bytes(step) if again else 0
    found = {
        "forward": {"activations": saved + outside, "logits": activations.loss_bytes(step)},
        "backward at the head": {"activations": saved + outside, "transient": backward.head_gradient_bytes(step)},
        "backward": {
            "activations": saved + one + outside_then,
            "gradients": backward.kept_head_gradient_bytes(step),
            "transient": held + unpacked,
        },
        "backward at the first layer": {
            "activations": first + (activations.checkpoint_bytes(step) if again else 0),
            "gradients": gradients - (0 if shape.tied else embedding_gradient_bytes(shape, method)),
            "transient": held + unpacked,
        },
        "backward at the embedding": {
            "gradients": gradients,
            "transient": embedding_gradient_bytes(shape, method) * (2 if shape.tied else 0),
        },
        "optimizer": {"gradients": gradients, "transient": step_copies_bytes(workload, tensors)},
    }
    if step.scores and workload.activation_offloading and not again:
        head = embedding_gradient_bytes(shape, method)
        found["backward through scores"] = {
            "gradients": gradients - head,
            "transient": backward.offloaded_scores_bytes(step) + (head if shape.tied else 0),
        }
    elif step.scores:
        scores, gone = backward.scores_backward_bytes(step)
        head = embedding_gradient_bytes(shape, method)
        found["backward through scores"] = {
            "activations": saved + one + outside_then - gone,
            "transient": scores + head,
        }
        found["backward through the first layer's scores"] = {
            "activations": layer + outside_then - gone,
            "gradients": gradients - head,
            "transient": scores + (head if shape.tied else 0),
        }
    if shape.experts and not again and method != "full":
        inside, unsaved = backward.experts_forward_bytes(step)
        found["forward through experts"] = {"activations": saved + outside - unsaved, "transient": inside}
    return found


def embedding_gradient_bytes(shape: Shape, method: str) -> int:
    """Full fine-tuning ends with the embedding's gradient, as large as the head's; tied to the head, it is there once
    more beside their sum."""
    return 4 * shape.vocabulary * shape.hidden if method == "full" else 0


def unpacked_bytes(shape: Shape, method: str, workload: Workload) -> int:
    """A 4-bit weight is made dense for its product, of experts one: the largest N K s, on a card for that time."""
    if method not in FOUR_BITS or weights.decodes_in_caches(workload):
        return 0
    element = weights.DTYPE_BYTES[workload.dtype]
    return max(weights.made_dense(shape, workload)) * element


def step_copies_bytes(workload: Workload, tensors: list[weights.Tensor]) -> int:
    """AdamW over all tensors at once (a card) holds sqrt(v) of each; one after the other, a few of the largest."""
    if not rule_of(workload.optimizer).copies:
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

"""The effect of DDP and FSDP2 on the memory of each device. Imports no torch.

N devices; the batch size is per device, so activations do not change.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from math import ceil

from rankwise.planning.terms import Traffic
from rankwise.planning.workload import Workload

WEIGHTS = ("weights_4bit", "weights")
# FSDP2 gathers the next layer while one computes, and reduces a layer's gradients while the next computes its own.
BLOCKS_AT_ONCE = 2


@dataclasses.dataclass(frozen=True)
class Group:
    """Bytes that FSDP2 gathers at once: of the tensors, and of the gradients of the trained ones."""

    tensor_bytes: int = 0
    gradient_bytes: int = 0

    @property
    def whole_bytes(self) -> int:
        return self.tensor_bytes + self.gradient_bytes

    def __add__(self, other: Group) -> Group:
        return Group(self.tensor_bytes + other.tensor_bytes, self.gradient_bytes + other.gradient_bytes)


def layer_and_root(parts: Iterable[tuple[str, Group]]) -> tuple[Group, Group]:
    """(bytes of the largest layer, bytes of everything outside of the layers), from (name, bytes) pairs.

    The layer is the part of a name up to its first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``.
    """
    groups: dict[str, Group] = {}
    for name, part in parts:
        found = re.match(r"(.*?\.\d+)\.", name)
        path = found[1] if found else ""
        groups[path] = groups.get(path, Group()) + part
    root = groups.pop("", Group())
    return max(groups.values(), key=lambda group: group.whole_bytes, default=Group()), root


def per_device(
    terms: dict[str, int], method: str, workload: Workload, *, phase: str, layer: Group, root: Group, trained_bytes: int
) -> dict[str, int]:
    """The terms that one of N devices holds in a phase.

    ddp: everything is there, and the gradients (``trained_bytes``) once more, in the buckets that are reduced. fsdp:
    weights are sharded, of ``full`` gradients and states too; whole at a time are two layers, and from the first layer
    to the last the root group, which is what lies outside of the layers (embedding, last norm, head): 2 layer + root,
    with their gradients on the way back. gloo, on CPUs, gathers or reduces a group in a copy of its own. The
    optimizer of ``full`` steps on shards alone, so that its copies are sharded too. An adapter's gradients are summed
    in one tensor of all, before the optimizer steps.
    """
    if workload.strategy == "ddp":
        return {**terms, "transient": terms["transient"] + trained_bytes}
    if workload.strategy != "fsdp" or workload.devices == 1:
        return terms
    names = (*WEIGHTS, "gradients", "optimizer") if method == "full" else WEIGHTS
    sharded = {name: ceil(terms[name] / workload.devices) for name in names}
    if phase == "optimizer":
        own = (
            ceil(terms["transient"] / workload.devices) if method == "full" else max(terms["transient"], trained_bytes)
        )
        return {**terms, **sharded, "transient": own}
    whole = BLOCKS_AT_ONCE * layer.tensor_bytes + root.tensor_bytes
    # The heap keeps what a step freed, so the root's copy, though made early, adds to the layers' peak.
    moved = max(layer.tensor_bytes, root.tensor_bytes)
    if phase == "backward":
        whole += BLOCKS_AT_ONCE * layer.gradient_bytes + root.gradient_bytes
        moved = max(moved, layer.gradient_bytes, root.gradient_bytes)
    whole += moved if workload.device_type == "cpu" else 0
    return {**terms, **sharded, "transient": terms["transient"] + whole}


def traffic(method: str, workload: Workload, *, weight_bytes: int, root_bytes: int, trained_bytes: int) -> Traffic:
    """The bytes that the collectives of one of N devices send: (N - 1) / N of a tensor for a gather or a reduction to
    shards, and twice that for an all-reduce.

    ddp sums the gradients, T bytes, once in a step. fsdp gathers the weights, W bytes, for each way through the layers,
    the root group R once: 2 W - R in a micro-batch. ``full`` reduces its gradients, of W bytes, in each micro-batch; an
    adapter's are summed once in a step.
    """
    share = (workload.devices - 1) / workload.devices
    gathered = 2 * weight_bytes - root_bytes if workload.strategy == "fsdp" else 0
    if gathered and method == "full":
        return Traffic(round(share * (gathered + weight_bytes)))
    return Traffic(round(share * gathered), round(2 * share * trained_bytes))

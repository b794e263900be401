"""What DDP and FSDP2 change, per device. Imports no torch.

N devices; the batch is per device, so activations stay what they are.
"""

from __future__ import annotations

from math import ceil

from rankwise.planning.workload import Workload

SHARDED = ("weights_4bit", "weights", "adapters", "gradients", "optimizer")
BLOCKS_AT_ONCE = 2
# FSDP2 gathers the next layer while one computes.


def per_device(terms: dict[str, int], workload: Workload, *, layer_bytes: int, trained_bytes: int) -> dict[str, int]:
    """The terms of one of N devices.

    ddp: everything is there, and the gradients once more, in the buckets that are reduced. fsdp: weights, adapters,
    gradients and states are sharded; two layers' tensors (``layer_bytes`` each) and their gradients are whole at a
    time.
    """
    if workload.strategy == "ddp":
        return {**terms, "transient": terms["transient"] + trained_bytes}
    if workload.strategy != "fsdp" or workload.devices == 1:
        return terms
    sharded = {name: ceil(terms[name] / workload.devices) for name in SHARDED}
    return {**terms, **sharded, "transient": terms["transient"] + BLOCKS_AT_ONCE * layer_bytes}

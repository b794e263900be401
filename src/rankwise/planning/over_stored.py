"""Memory of training over weights that are stored quantized: only the term of the weights differs from dense ones."""

from __future__ import annotations

import dataclasses
from math import ceil

from rankwise.planning.changes import FOUR_BIT_OF
from rankwise.planning.facts import Stored
from rankwise.planning.fitting import Estimator
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import DTYPE_BYTES, Workload

# The block size of bitsandbytes' 4-bit checkpoints in transformers.
BITSANDBYTES_BLOCK = 64
# Bytes of a group's scale and zero point, 16 bits each.
GROUP_BYTES = 4


def over_stored(stored: Stored | None, ask: Estimator) -> Estimator:
    """An estimator for training over stored weights: bitsandbytes' 4 bits, over which LoRA is QLoRA, or other
    libraries' formats that support adapters; ``ask`` itself for dense weights.
    """
    if stored is None or not (stored.four_bit or stored.bits):
        return ask

    def asked(method: str, workload: Workload) -> MemoryEstimate:
        if not stored.four_bit:
            return _over_foreign(stored, ask, method, workload)
        same = dataclasses.replace(workload, double_quant=stored.double_quant, block_size=BITSANDBYTES_BLOCK)
        found = ask(method if method == "full" else FOUR_BIT_OF.get(method, method), same)
        return dataclasses.replace(found, method=method)

    return asked


def _over_foreign(stored: Stored, ask: Estimator, method: str, workload: Workload) -> MemoryEstimate:
    """The weights that QLoRA would quantize take ``bits`` each, and a scale and a zero per group."""
    dense = ask(method, workload)
    if method == "full" or method not in FOUR_BIT_OF:
        return dense
    linear = dense.breakdown["weights"] - ask(FOUR_BIT_OF[method], workload).breakdown["weights"]
    count = linear // DTYPE_BYTES[workload.dtype]
    packed = ceil(count * stored.bits / 8) + GROUP_BYTES * ceil(count / (stored.group or count or 1))
    changed = {
        **dense.breakdown,
        "weights": dense.breakdown["weights"] - linear,
        "weights_4bit": dense.breakdown["weights_4bit"] + packed,
    }
    return dataclasses.replace(dense, breakdown=changed, peak_bytes=dense.peak_bytes - linear + packed)

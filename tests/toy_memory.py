"""An estimator with a formula simple enough to check by hand, in place of traces."""

from __future__ import annotations

from rankwise.methods import method_of
from rankwise.planning import TERMS, MemoryEstimate, Workload

WEIGHTS = 10**9
PER_TOKEN = 10**6
FEWER = 4
# Checkpointing keeps a quarter, 4-bit weights take a quarter, offloading halves.
ERROR = 0.05


def toy_estimate(method: str, workload: Workload) -> MemoryEstimate:
    """weights + adapters (1 MB a rank) + tokens * PER_TOKEN; full: three times the weights besides."""
    weights = WEIGHTS // FEWER if method_of(method).four_bits else WEIGHTS
    adapters = 3 * WEIGHTS if method == "full" else workload.r * 10**6
    activations = workload.tokens * PER_TOKEN
    activations //= FEWER if workload.gradient_checkpointing else 1
    activations //= 2 if workload.activation_offloading else 1
    breakdown = dict.fromkeys(TERMS, 0) | {"weights": weights, "adapters": adapters, "activations": activations}
    return MemoryEstimate(
        method=method,
        peak_bytes=sum(breakdown.values()),
        breakdown=breakdown,
        trainable_parameters=1000 * workload.r,
        total_parameters=WEIGHTS // 2,
        error=ERROR,
    )

"""How long a step takes: floating-point operations over a pace, and the traffic of the weights over a bandwidth.

N weights that multiply each token, of which H in the output head; P trained parameters of the adapter; L layers of
width h; S tokens a row, T tokens a micro-batch.
"""

from __future__ import annotations

import dataclasses

from rankwise.config import FOUR_BITS
from rankwise.planning.estimate import MemoryEstimate
from rankwise.planning.facts import ModelFacts
from rankwise.planning.hardware import Hardware, find_card, of_card
from rankwise.planning.workload import Workload

ASSUMED_EFFICIENCY = 0.40
"""Share of the data sheet's peak: 38 to 43 % were measured when Llama 3 405B was trained (arXiv 2407.21783, 3.3.2)."""
ASSUMED_BANDWIDTH_SHARE = 0.8
ASSUMED_CPU_FLOPS_PER_CORE = {"bfloat16": 100e9, "float16": 40e9, "float32": 40e9}
"""Cautious: `rankwise plan --calibrate` gave 111 to 303 GFLOP/s for one core with bfloat16 instructions (docs/plan.md);
LoRA's steps with AVX2 alone come to 44 a core (docs/results/steps_float32_peer.md)."""
ASSUMED_CPU = {"bfloat16": "a Zen 4", "float16": "an AMD EPYC with AVX2", "float32": "an AMD EPYC with AVX2"}
HOST_LINK_BYTES_PER_SECOND = 20e9
"""PCIe 4.0 x16 moves 32 GB/s at most in one direction (PCI-SIG); about two thirds are reached."""
NOMINAL_CARD = "RTX 4090"
"""Stands for a device without figures where only ratios of times are asked for."""
PACKED_BYTES = 0.53
# Of a 4-bit weight with its scales.


@dataclasses.dataclass(frozen=True)
class Pace:
    """What a device reaches in training. ``basis`` says where the figures come from."""

    flops_per_second: float
    bytes_per_second: float | None
    measured: bool
    basis: str


def assumed_pace(hardware: Hardware, dtype: str) -> Pace | None:
    """Shares of a data sheet, or of a core like the one measured; None where no figure is known.

    A device without instructions for bfloat16 computes it at the pace of float32.
    """
    computed = "float32" if dtype == "bfloat16" and hardware.has_bfloat16 is False else dtype
    peak = hardware.float32_flops_per_second if computed == "float32" else hardware.flops_per_second
    if peak is not None:
        bandwidth = hardware.bytes_per_second
        return Pace(
            ASSUMED_EFFICIENCY * peak,
            None if bandwidth is None else ASSUMED_BANDWIDTH_SHARE * bandwidth,
            False,
            f"assumed: {100 * ASSUMED_EFFICIENCY:.0f} % of the data sheet's {peak / 1e12:,.0f} TFLOP/s in "
            f"{'float32' if computed == 'float32' else '16 bits'}, "
            "as in training Llama 3 (arXiv 2407.21783, section 3.3.2)",
        )
    if hardware.device_type == "cpu" and hardware.cores:
        per_core = ASSUMED_CPU_FLOPS_PER_CORE[computed]
        basis = f"assumed: {per_core / 1e9:.0f} GFLOP/s for each of {hardware.cores} cores, as on"
        return Pace(per_core * hardware.cores, None, False, f"{basis} {ASSUMED_CPU[computed]}; --calibrate measures it")
    return None


def flops_per_token(method: str, facts: ModelFacts, frozen: int, trained: int, workload: Workload) -> float:
    """Forward 2 N, input gradients 2 N; ``full`` 2 N more for weight gradients; adapters 6 P; attention 3 * 2 L h S.

    Checkpointing runs the forward pass of the blocks again: 2 (N - H), 2 P and 2 L h S more. A causal mask is taken to
    halve the attention's 4 L h S. Where stacked experts adapt, all of P is taken to be theirs: a token meets those of
    the experts that it visits.
    """
    N, H = facts.matrix_parameters(frozen), facts.head_parameters
    P = 0 if method == "full" else trained * (facts.visited_share if workload.target_parameters else 1)
    attention = 2 * facts.layers * facts.width * workload.max_length
    total = 4 * N + 6 * P + 3 * attention + (2 * N if method == "full" else 0)
    if workload.gradient_checkpointing:
        total += 2 * max(0, N - H) + 2 * P + attention
    return float(total)


def weight_traffic_bytes(method: str, facts: ModelFacts, frozen: int, workload: Workload) -> float:
    """Bytes that a micro-batch moves for the frozen weights, whatever its size: a pass forward, one backward, one more
    with checkpointing; a 4-bit weight is read, written in 16 bits and read again.
    """
    N = facts.matrix_parameters(frozen)
    passes = 3 if workload.gradient_checkpointing else 2
    wide = 4.0 if workload.dtype == "float32" else 2.0
    per_weight = PACKED_BYTES + 2 * wide if method in FOUR_BITS else wide
    return passes * per_weight * N


def micro_batch_seconds(estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace) -> float:
    """Seconds of forward and backward of one micro-batch: FLOP / pace + bytes / bandwidth (+ offloading)."""
    method, frozen = estimate.method, estimate.total_parameters
    flops = workload.tokens * flops_per_token(method, facts, frozen, estimate.trainable_parameters, workload)
    seconds = flops / pace.flops_per_second
    if pace.bytes_per_second is not None:
        seconds += weight_traffic_bytes(method, facts, frozen, workload) / pace.bytes_per_second
    if workload.activation_offloading:
        seconds += offloaded_bytes(facts, workload) / HOST_LINK_BYTES_PER_SECOND
    return seconds


def offloaded_bytes(facts: ModelFacts, workload: Workload) -> float:
    """Activations that go to the host and come back: with checkpointing a block's input (2 h bytes a token), else about
    seventeen such vectors (Korthikanti et al. 2022, 34 s b h bytes a layer, attention scores left out).
    """
    vectors = 1 if workload.gradient_checkpointing else 17
    return 2.0 * workload.tokens * facts.layers * facts.width * 2 * vectors


def nominal_pace(dtype: str) -> Pace:
    """For ratios of times on a device of which nothing is known."""
    pace = assumed_pace(of_card(find_card(NOMINAL_CARD)[0]), dtype)
    assert pace is not None
    return pace


def tokens_per_second(
    estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace | None
) -> float | None:
    """Of all devices together; communication between them is not counted."""
    if pace is None:
        return None
    return workload.devices * workload.tokens / micro_batch_seconds(estimate, facts, workload, pace)

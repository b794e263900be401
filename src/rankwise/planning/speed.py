"""The time of a micro-batch: of the device's computation and traffic, and of the host's kernel launches.

    seconds on a GPU:        max( FLOP / pace + bytes / bandwidth,  launches x seconds of a launch )
    seconds on a processor:  FLOP / pace + launches x seconds of a launch

N weights that multiply each token, of which H in the output head; W weights that a micro-batch reads; P trained
parameters of the adapter; L layers of width h; S tokens a row, T tokens a micro-batch; V vocabulary; E experts, of
which e process each token. Imports torch only to measure.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
import time

from rankwise.config import keeps_file_bits
from rankwise.conflicts import takes_eight_bit
from rankwise.methods import method_of
from rankwise.models.device import cpu_name
from rankwise.objectives import OBJECTIVES
from rankwise.planning.facts import ModelFacts
from rankwise.planning.hardware import Hardware, find_card, measured_here, of_card
from rankwise.planning.memory import MemoryEstimate
from rankwise.planning.workload import Workload

# Share of the data sheet's peak: 38 to 43 % were measured when Llama 3 405B was trained (arXiv 2407.21783, 3.3.2).
ASSUMED_EFFICIENCY = 0.40
ASSUMED_BANDWIDTH_SHARE = 0.8
# The speed of a LoRA step in bfloat16 beside that of a product with one weight, which stays in a cache: of demo on an
# AMD EPYC (Zen 5). Larger models reach 0.7 (a mixture of experts) to 0.9 (Llama 3.2 1B's shape) on a Xeon without AMX.
STEP_SHARE = 0.5
# {method: speed on a processor beside LoRA's}: the whole runs in benchmarks/results/end_to_end.md, with dropout 0.05.
# They ran on one processor; what 4 bits and norms cost depends on the processor.
RUN_SHARES = {"qlora": 0.86, "dora": 0.73, "qdora": 0.67}
# AdamW on one core of an AMD EPYC (Zen 5), with clipping, for each trained parameter in float32.
OPTIMIZER_SECONDS = 7.5e-9
# What a LoRA step takes beside its frozen products, as a part of their time.
BESIDE_PRODUCTS = 0.3
# The bytes that are read to measure a processor's memory, more than its caches hold.
READ_BYTES = 1 << 28
# The product by which a processor is measured, (T, K) x (K, N), repeated for this time.
PRODUCT, PRODUCT_SECONDS = (512, 1024, 1024), 0.25
# PCIe 4.0 x16 moves 32 GB/s at most in one direction (PCI-SIG); about two thirds are reached.
HOST_LINK_BYTES_PER_SECOND = 20e9
# The GPU whose figures replace those of an unknown device where only ratios of times are needed.
NOMINAL_CARD = "RTX 4090"
# Bytes of a 4-bit weight, with its scales.
PACKED_BYTES = 0.53
# The bandwidth of dequantization, as a share of that of other traffic.
#
# Code lookups and scales make dequantization slower. With this share, the ratios of published LoRA and QLoRA steps with
# bitsandbytes' kernels are met on five GPUs (`tests/planning/test_published_times.py`). rankwise's own kernel has not
# been timed on a GPU yet.
DEQUANTIZE_SHARE = 0.5
# Launching from Python takes about 7 us for a torch operation, 25 us for a Triton kernel, and autograd's bookkeeping.
LAUNCH_SECONDS = 15e-6
# DoRA's backward pass reads two tensors of a layer's output and writes one (ops.elementwise.scaled_grad).
GAIN_TENSORS = 3


@dataclasses.dataclass(frozen=True)
class Pace:
    """The speed that a device reaches in training. ``basis`` names the source of the figures."""

    flops_per_second: float
    bytes_per_second: float | None
    basis: str


def assumed_pace(hardware: Hardware, dtype: str) -> Pace | None:
    """The speed as a share of a data sheet; None where no figure is known.

    A device without instructions for bfloat16 computes it at the pace of float32.
    """
    computed = "float32" if dtype == "bfloat16" and hardware.has_bfloat16 is False else dtype
    peak = hardware.float32_flops_per_second if computed == "float32" else hardware.flops_per_second
    if peak is not None:
        bandwidth = hardware.bytes_per_second
        return Pace(
            ASSUMED_EFFICIENCY * peak,
            None if bandwidth is None else ASSUMED_BANDWIDTH_SHARE * bandwidth,
            f"assumed: {100 * ASSUMED_EFFICIENCY:.0f} % of the data sheet's {peak / 1e12:,.0f} TFLOP/s in "
            f"{'float32' if computed == 'float32' else '16 bits'}, "
            "as in training Llama 3 (arXiv 2407.21783, section 3.3.2)",
        )
    return None


def pace_of(hardware: Hardware, dtype: str) -> Pace | None:
    """One process's speed on the device: of this machine's processor as measured, else assumed."""
    if hardware.device_type != "cpu":
        return assumed_pace(hardware, dtype)
    flops = STEP_SHARE * measured_flops(hardware, dtype)
    basis = (
        f"half of a product's speed on this machine ({flops / 1e9:,.0f} GFLOP/s), methods as in measured whole runs; "
        "without evaluations. Short rows and other programs make a run slower."
    )
    return Pace(flops / hardware.sharers, None, basis)


def measured_flops(hardware: Hardware, dtype: str) -> float:
    """FLOP/s of a product with a frozen weight on this processor. Kept for plans that need no torch besides."""
    key = f"{cpu_name()}, {hardware.cores} cores, {dtype}"
    return measured_here(key, lambda: _product_flops(dtype), again="torch" in sys.modules)


def _product_flops(dtype: str) -> float:
    import torch

    from rankwise.ops.branch import linear_out
    from rankwise.ops.cpu.products import seconds_alone

    T, K, N = PRODUCT
    x, weight, out = (torch.ones(shape, dtype=getattr(torch, dtype)) for shape in ((T, K), (N, K), (T, N)))
    seconds = seconds_alone(lambda: linear_out(x, weight, out), PRODUCT_SECONDS)
    return torch.get_num_threads() * 2 * T * K * N / seconds


@functools.cache
def measured_integers(dtype: str) -> float:
    """The time of a product in 8 bits on this processor, as a part of that in ``dtype``; 1 where it is not taken."""
    key = f"{cpu_name()}, 8 bits beside {dtype}"
    return measured_here(key, lambda: _integers_part(dtype), again="torch" in sys.modules)


def _integers_part(dtype: str) -> float:
    import torch

    from rankwise.ops.cpu import products
    from rankwise.ops.cpu.native import level

    of = getattr(torch, dtype)
    return products.seconds_of_integers(of, level()) if products.bytes_pay(of) else 1.0


@functools.cache
def memory_bandwidth() -> float:
    """Bytes per second that this processor reads from memory, with all of torch's threads."""
    return measured_here(f"{cpu_name()}, memory", _read_bytes_per_second, again="torch" in sys.modules)


def _read_bytes_per_second() -> float:
    import torch

    numbers, seconds = torch.ones(READ_BYTES // 8, dtype=torch.int64), []
    for _ in range(3):
        begun = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - begun)
    return READ_BYTES / min(seconds)


def expert_bytes(method: str, facts: ModelFacts, workload: Workload) -> float:
    """The bytes of stacked experts that a pass of a micro-batch reads: of those that at least one of its tokens visits,
    if each token chooses at random; 0 for a model without experts."""
    if facts.visited_share == 1:
        return 0.0
    stacked = facts.idle_expert_parameters / (1 - facts.visited_share)
    stored = facts.stored
    is_packed = method_of(method).four_bits or (
        stored is not None and (stored.four_bit or stored.keeps_mxfp4(workload.device_type))
    )
    touched = 1 - (1 - facts.visited_share) ** workload.tokens
    on_cpu = workload.device_type == "cpu"
    if facts.packed_expert_bytes and keeps_file_bits(workload.base_bits, method, is_file=True, on_cpu=on_cpu):
        return facts.packed_expert_bytes * touched
    return stacked * touched * (PACKED_BYTES if is_packed else _width(workload))


def flops_per_token(method: str, facts: ModelFacts, frozen: int, trained: int, workload: Workload) -> float:
    """Forward 2 N, input gradients 2 N; ``full`` 2 N more for weight gradients; adapters 6 P; attention 3 * 2 L h S.

    Checkpointing runs the forward pass of the blocks again: 2 (N - H), 2 P and 2 L h S more. A causal mask is assumed
    to halve the attention's 4 L h S. If stacked experts are adapted, all of P is assumed to be theirs: a token is
    multiplied with those of the experts that it is routed to.
    """
    N, H = facts.matrix_parameters(frozen), facts.head_parameters
    full = method_of(method).trains_all
    P = 0 if full else trained * (facts.visited_share if workload.target_parameters else 1)
    attention = 2 * facts.layers * facts.width * workload.max_length
    total = 4 * N + 6 * P + 3 * attention + (2 * N if full else 0)
    if workload.gradient_checkpointing:
        total += 2 * max(0, N - H) + 2 * P + attention
    return float(total)


def weight_traffic_bytes(method: str, facts: ModelFacts, frozen: int, workload: Workload) -> float:
    """Bytes that a micro-batch of any size moves for the frozen weights: a forward pass, a backward pass, one more with
    checkpointing. A pass reads W in w bytes; if weights are 4-bit, it first dequantizes W - H of them:

        w W  +  (PACKED_BYTES + w) (W - H) / DEQUANTIZE_SHARE

    The head stays dense. The bytes of dequantization are divided by the share of the bandwidth that it reaches.
    """
    W, passes, w = facts.read_parameters(frozen), _passes(workload), _width(workload)
    made_dense = max(0, W - facts.head_parameters) if method_of(method).four_bits else 0
    return passes * (w * W + (PACKED_BYTES + w) * made_dense / DEQUANTIZE_SHARE)


def gain_traffic_bytes(method: str, facts: ModelFacts, estimate: MemoryEstimate, workload: Workload) -> float:
    """Bytes of DoRA's gain: 3 w T outputs backward, over the outputs of all adapted layers.

    A square layer has P = (2 r + 1) outputs. The norms are computed once in an optimizer step, which is not counted.
    """
    if method_of(method).kind != "dora" or not facts.width:
        return 0.0
    most = facts.matrix_parameters(estimate.total_parameters) / facts.width
    outputs = min(most, estimate.trainable_parameters / (2 * workload.r + 1))
    return GAIN_TENSORS * _width(workload) * workload.tokens * outputs


def launch_seconds(method: str, facts: ModelFacts, workload: Workload) -> float:
    """Seconds that the host takes to launch a micro-batch's kernels, on a GPU a lower bound of its time. For full
    fine-tuning, whose kernels were not counted, LoRA's.
    """
    forward, backward = method_of(method).launches
    launches = forward * (_passes(workload) - 1) + backward
    return facts.layers * launches * LAUNCH_SECONDS


def device_seconds(estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace) -> float:
    """The device's seconds for forward and backward pass of one micro-batch, including offloading."""
    method, frozen = estimate.method, estimate.total_parameters
    flops = workload.tokens * flops_per_token(method, facts, frozen, estimate.trainable_parameters, workload)
    seconds = flops / pace.flops_per_second
    if pace.bytes_per_second is not None:
        moved = weight_traffic_bytes(method, facts, frozen, workload)
        moved += gain_traffic_bytes(method, facts, estimate, workload)
        seconds += moved / pace.bytes_per_second
    seconds *= eight_bits_share(method, workload)
    if workload.device_type == "cpu":
        seconds /= RUN_SHARES.get(method, 1.0)
        if read := _passes(workload) * expert_bytes(method, facts, workload):
            seconds = max(seconds, read / memory_bandwidth())
    if workload.activation_offloading:
        seconds += offloaded_bytes(facts, workload) / HOST_LINK_BYTES_PER_SECOND
    return seconds


def eight_bits_share(method: str, workload: Workload) -> float:
    """The share of the time that a step takes in 8 bits, if the run's measurement admits them: of c, what it takes
    beside products, and their part q, (q + c) / (1 + c); 1 where it does not take them, as `training.step.choose`."""
    is_chosen = workload.products == "int8" or (
        workload.products == "auto" and not OBJECTIVES[workload.objective].of_rewards
    )
    taken = is_chosen and takes_eight_bit(method, workload.objective, workload.strategy, workload)
    if not taken or workload.device_type != "cpu":
        return 1.0
    return (measured_integers(workload.dtype) + BESIDE_PRODUCTS) / (1 + BESIDE_PRODUCTS)


def micro_batch_seconds(estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace) -> float:
    """The seconds of forward and backward pass of one micro-batch: on a GPU the larger of the device's and the host's,
    on a processor, which does both, their sum."""
    own, launching = device_seconds(estimate, facts, workload, pace), launch_seconds(estimate.method, facts, workload)
    return own + launching if workload.device_type == "cpu" else max(own, launching)


def _passes(workload: Workload) -> int:
    """The number of passes over the weights in a micro-batch."""
    return 3 if workload.gradient_checkpointing else 2


def _width(workload: Workload) -> float:
    """Bytes of a number in the dtype of the run."""
    return 4.0 if workload.dtype == "float32" else 2.0


def offloaded_bytes(facts: ModelFacts, workload: Workload) -> float:
    """The bytes of activations that are offloaded and fetched again: with checkpointing a block's input (2 h bytes a
    token), else about 17 such vectors (Korthikanti et al. 2022: 34 s b h bytes a layer without attention scores).
    """
    vectors = 1 if workload.gradient_checkpointing else 17
    return 2.0 * workload.tokens * facts.layers * facts.width * 2 * vectors


def nominal_pace(dtype: str) -> Pace:
    """A nominal speed, for ratios of times on an unknown device."""
    pace = assumed_pace(of_card(find_card(NOMINAL_CARD)), dtype)
    assert pace is not None
    return pace


def hiding_bandwidth(
    estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace | None, accumulation: int
) -> float | None:
    """Bytes per second, each way, at which a device's traffic takes as long as the computation that it runs beside.

    With ddp that is the backward pass of a step's last micro-batch, with fsdp all of the step.
    """
    if pace is None or workload.devices == 1:
        return None
    seconds = micro_batch_seconds(estimate, facts, workload, pace)
    # Passes of equal length: forward, input gradients, weight gradients (full), and the recomputed forward.
    passes = _passes(workload) + method_of(estimate.method).trains_all
    beside = accumulation * seconds if workload.strategy == "fsdp" else (1 - 1 / passes) * seconds
    return estimate.network.of_step(accumulation) / beside


def step_seconds(
    estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace, accumulation: int
) -> float:
    """The seconds of an optimizer step of so many micro-batches; on a processor the optimizer counts."""
    optimizer = OPTIMIZER_SECONDS * estimate.trainable_parameters if workload.device_type == "cpu" else 0.0
    return accumulation * micro_batch_seconds(estimate, facts, workload, pace) + optimizer


def tokens_per_second(
    estimate: MemoryEstimate, facts: ModelFacts, workload: Workload, pace: Pace | None, accumulation: int
) -> float | None:
    """The tokens per second of all devices together. Communication between them is not counted."""
    if pace is None:
        return None
    seconds = step_seconds(estimate, facts, workload, pace, accumulation)
    return workload.devices * accumulation * workload.tokens / seconds

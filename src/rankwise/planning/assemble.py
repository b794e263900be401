"""Combine the terms of a step into an estimate: the device's overhead, several devices, notes. Imports no torch."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping

from rankwise.planning import cuda
from rankwise.planning.parallel import Group, per_device, traffic
from rankwise.planning.terms import TERMS, MemoryEstimate
from rankwise.planning.workload import Workload
from rankwise.reports.numbers import byte_size

# Half the printed interval, as a share of the peak.
DRY_RUN_ERROR = {"cpu": 0.05, "cuda": 0.05}
CLOSED_FORM_ERROR = {"cpu": 0.10, "cuda": 0.10}
# Error of an evaluation's tensors against dry runs (tests/planning/test_evaluating.py); no evaluation was measured.
EVALUATION_ERROR = 0.20
# On a CPU, what the interval has besides, whatever the model: libraries, threads and the ends of the heap.
CPU_PROCESS_ERROR_BYTES = 50 * 10**6
# Memory that a step leaves in libraries on a CPU (generated kernels, thread pools, ends of the heap): the measured
# growth minus the tensors was 47 to 60 MB over methods and checkpointing on the demo model.
CPU_LIBRARY_BYTES = 50 << 20
# Bytes of holes in every step of PyTorch's own operators (measured).
HOLES_OF_PYTORCHS_STEP = 40 << 20
# Share of unused memory between keys and values, which grow by one token at a time: measured 0.15 to 0.35.
HOLES_OF_GROWTH = 0.25
# Measured shares of `heap_holes_bytes`: (of all gradients, of the saved tensors).
HOLES_CHECKPOINTED, HOLES_OF_FULL, HOLES_OF_ADAPTERS, HOLES_ELSE = (0.2, 0.0), (0.1, 0.4), (0.5, 0.02), (0.5, 0.0)


@dataclasses.dataclass(frozen=True)
class Found:
    """The result of one way of estimating a step."""

    # {phase: {term: bytes}}
    phases: Mapping[str, dict[str, int]]
    # Numbers of trained parameters, and of all parameters of the model without an adapter.
    trainable: int
    total: int
    # Bytes of all that trains, and of the optimizer's state that lives in the host's memory.
    trained_bytes: int
    elsewhere_bytes: int
    max_positions: int | None
    # What FSDP2 gathers at once: the largest layer, and all parameters outside of the layers.
    layer: Group
    root: Group
    # Bytes of all tensors that FSDP2 would shard.
    weight_bytes: int
    exact: bool
    # Whether the phases are those of one of several devices already.
    is_share: bool = False
    notes: tuple[str, ...] = ()


def assembled(method: str, workload: Workload, found: Found, started: float) -> MemoryEstimate:
    """The estimate of one device, for the phase in which it holds most. ``started`` is a time of
    ``time.perf_counter``.
    """
    shares = {}
    for name, terms in found.phases.items():
        whole = {term: terms.get(term, 0) for term in TERMS}
        if name == "generation" and workload.device_type == "cpu":
            whole["transient"] += round(HOLES_OF_GROWTH * whole["transient"])
        shares[name] = (
            whole
            if found.is_share
            else per_device(
                whole,
                method,
                workload,
                phase=name.split()[0],
                layer=found.layer,
                root=found.root,
                trained_bytes=found.trained_bytes,
            )
        )
    name, terms = max(shares.items(), key=lambda item: sum(item[1].values()))
    outside = outside_bytes(workload, sum(terms.values()))
    terms["overhead"] += outside
    if workload.device_type == "cuda":
        terms["overhead"] += cuda.workspace_bytes()
    else:
        kept_bytes = max(terms.get("activations", 0) for terms in found.phases.values())
        terms["overhead"] += CPU_LIBRARY_BYTES + heap_holes_bytes(method, workload, found.trained_bytes, kept_bytes)
    peak = sum(terms.values())
    error = error_bytes(peak, workload.device_type, exact=found.exact, evaluation=workload.evaluation)
    return MemoryEstimate(
        method=method,
        peak_bytes=peak,
        breakdown=terms,
        trainable_parameters=found.trainable,
        total_parameters=found.total,
        error=error / peak,
        exact=found.exact,
        phase=name.split()[0],  # type: ignore[arg-type]
        outside_bytes=outside,
        notes=(*found.notes, *_notes(workload, found)),
        seconds=round(time.perf_counter() - started, 3),
        network=traffic(
            method,
            workload,
            weight_bytes=found.weight_bytes,
            root_bytes=found.root.tensor_bytes,
            trained_bytes=found.trained_bytes,
        ),
    )


def error_bytes(peak_bytes: int, device_type: str, *, exact: bool, evaluation: bool = False) -> int:
    """Half the printed interval. Whole runs on a CPU lie inside (`benchmarks/memory_plan.py --runs`)."""
    share = EVALUATION_ERROR if evaluation else (DRY_RUN_ERROR if exact else CLOSED_FORM_ERROR)[device_type]
    return round(share * peak_bytes) + (CPU_PROCESS_ERROR_BYTES if device_type == "cpu" else 0)


def heap_holes_bytes(method: str, workload: Workload, trained_bytes: int, kept_bytes: int) -> int:
    """Unused bytes between the blocks of a CPU's heap at the peak: shares of all gradients and of the saved tensors,
    plus a constant without rankwise's fast operators.

    A gradient seldom fits into the hole that an activation left, so new memory is allocated beside freed activations.
    Checkpointing leaves fewer of these holes. rankwise's adapters (`ops.cpu.memory`) and checkpointing
    (`acceleration.checkpointing`) leave almost no others; PyTorch's own operations, in full fine-tuning, leave holes
    beside much of what a layer saves. The shares are fitted to measured steps (glibc,
    `benchmarks/memory_plan.py`), also to adapters in bfloat16 and to full fine-tuning of two models with 128 to 4,096
    tokens a step.
    """
    of_gradients, of_kept = _hole_shares(method, workload)
    always = 0 if workload.fast else HOLES_OF_PYTORCHS_STEP
    return always + round(of_gradients * trained_bytes + of_kept * kept_bytes)


def _hole_shares(method: str, workload: Workload) -> tuple[float, float]:
    if workload.gradient_checkpointing:
        return HOLES_CHECKPOINTED
    if not workload.fast:
        return HOLES_ELSE
    return HOLES_OF_FULL if method == "full" else HOLES_OF_ADAPTERS


def outside_bytes(workload: Workload, tensors_bytes: int) -> int:
    """The bytes in the device's memory that torch's allocator does not count."""
    if workload.device_type == "cpu":
        return 0
    return cuda.context_bytes() + cuda.fragmentation_bytes(tensors_bytes)


def _notes(workload: Workload, found: Found) -> list[str]:
    notes = []
    if found.max_positions is not None and workload.max_length > found.max_positions:
        notes.append(
            f"rows of {workload.max_length:,} tokens are longer than the model's {found.max_positions:,} positions"
        )
    if not workload.fast:
        notes.append("PyTorch's own step is counted, without fused operators")
    if found.elsewhere_bytes:
        size = byte_size(found.elsewhere_bytes)
        notes.append(f"{size} of optimizer state live in the host's memory ({workload.optimizer})")
    return notes

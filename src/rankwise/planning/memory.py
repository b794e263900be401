"""The memory of one device in a step, from the tensors of a trace.

A process and its heap take more than these, several devices share them, and weights that are stored quantized take
less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from math import ceil
from typing import TYPE_CHECKING, Literal, Protocol

from rankwise.config import keeps_file_bits
from rankwise.constants import MXFP4
from rankwise.errors import ConfigError
from rankwise.methods import method_of
from rankwise.planning import hardware
from rankwise.planning.facts import PlannedModel, Stored
from rankwise.planning.workload import DTYPE_BYTES, Workload
from rankwise.reports.numbers import byte_size

if TYPE_CHECKING:
    from rankwise.planning.tracker import Terms


Phase = Literal["forward", "backward", "optimizer", "generation"]
# The terms of a breakdown, in the order in which a bar shows them.
#
# weights_4bit  packed codes and their scales
# weights       everything of the base that stays in 16 or 32 bits
# adapters      A, B, magnitudes, and the row norms that DoRA keeps
# gradients     of the trained parameters
# optimizer     its state, on the device
# activations   saved in the forward pass for the backward pass
# logits        logits, their float32 copy, their gradient and what the loss keeps
# transient     short-lived buffers at the peak: dequantized weights, intermediate gradients
# overhead      memory of the device and its libraries other than tensors
# idle          an idle process: on a CPU its libraries, on a GPU the context
TERMS = (
    "weights_4bit",
    "weights",
    "adapters",
    "gradients",
    "optimizer",
    "activations",
    "logits",
    "transient",
    "overhead",
    "idle",
)
# Half the printed interval, as a share of the peak, and on a CPU what libraries, threads and the ends of the heap add.
ERROR, CPU_PROCESS_ERROR_BYTES = 0.05, 50 * 10**6
# Memory that a step leaves in libraries on a CPU (generated kernels, thread pools): rankwise's own, and PyTorch's.
CPU_LIBRARY_BYTES, CPU_LIBRARY_BYTES_OF_PYTORCHS_STEP = 20 * 10**6, 5 * 10**6
# What loading and dozens of steps leave beside the model (tokenizer, rows, ends of the heap): the median of 43 runs
# (`benchmarks/memory_plan.py`).
CPU_LOADED_BYTES = 56 * 10**6
# Holes between blocks just too small to be mapped (`acceleration.memory.MMAP_BYTES`), at most, as measured: of
# PyTorch's own operators a share of what a step saves, logits included; of full fine-tuning a multiple of the
# gradients, from copies of weights and chunks of logits.
LARGEST_HOLES, HOLES_OF_PYTORCHS_STEP, HOLES_OF_LARGE_BLOCKS = 80 << 20, 0.35, 1.3
# Share of unused memory between keys and values, which grow by one token at a time: measured 0.15 to 0.35.
HOLES_OF_GROWTH = 0.25
# Measured shares of `heap_holes_bytes`: (of all gradients, of the saved tensors).
HOLES_CHECKPOINTED, HOLES_OF_FULL, HOLES_OF_ADAPTERS, HOLES_ELSE = (1.0, 0.3), (0.1, 0.4), (0.5, 0.02), (0.5, 0.0)
# FSDP2 gathers the next layer while one computes, and reduces a layer's gradients while the next computes its own.
BLOCKS_AT_ONCE = 2
WEIGHTS = ("weights_4bit", "weights")
# The block size of bitsandbytes' 4-bit checkpoints in transformers.
BITSANDBYTES_BLOCK = 64
# Bytes of a group's scale and zero point, 16 bits each.
GROUP_BYTES = 4


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes that each of several devices sends to the others; it receives as many."""

    micro_batch: int = 0
    # Once in an optimizer step.
    step: int = 0

    def of_step(self, accumulation: int) -> int:
        return accumulation * self.micro_batch + self.step


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """Peak memory of a training step on one device, in bytes: what the process holds at its highest instant, as an
    idle process and for the training."""

    method: str
    peak_bytes: int
    # {term: bytes} over ``TERMS``, at the moment of the peak; they sum to ``peak_bytes``.
    breakdown: dict[str, int]
    trainable_parameters: int
    # Parameters without the adapter; tied weights count once, 4-bit weights by their elements.
    total_parameters: int
    # Expected relative error of ``training_bytes``.
    error: float
    # The phase of the step with the peak.
    phase: Phase = "backward"
    # What the steps alone do not show: peak_bytes - outside_bytes is comparable with
    # torch.cuda.max_memory_allocated(), and with the growth of anonymous memory on a CPU.
    outside_bytes: int = 0
    # Remarks: a length beyond the model's positions, states in host memory.
    notes: tuple[str, ...] = ()
    network: Traffic = Traffic()

    @property
    def idle_bytes(self) -> int:
        """The part of the peak that an idle process takes."""
        return self.breakdown.get("idle", 0)

    @property
    def training_bytes(self) -> int:
        return self.peak_bytes - self.idle_bytes

    @property
    def most_bytes(self) -> int:
        """The peak plus its expected error."""
        return self.peak_bytes + round(self.error * self.training_bytes)


class Estimator(Protocol):
    """(method, workload) -> peak memory on the planned model."""

    def __call__(self, method: str, workload: Workload) -> MemoryEstimate: ...


@dataclasses.dataclass(frozen=True)
class Found:
    """A traced step of the whole model, as it is kept on disk."""

    # {phase: {term: bytes}} at its highest instant.
    phases: dict[str, Terms]
    # As ``Traced.sizes``.
    sizes: dict[str, int]
    # Parameters of the model without an adapter.
    total: int
    max_positions: int | None
    # {code: message} of warnings about the adapter.
    told: dict[str, str]


def assembled(method: str, workload: Workload, found: Found) -> MemoryEstimate:
    """The estimate of one device, for the phase in which it holds most."""
    sizes, shares = found.sizes, {}
    for name, terms in found.phases.items():
        whole = {term: terms.get(term, 0) for term in TERMS}
        if name == "generation" and workload.device_type == "cpu":
            whole["transient"] += round(HOLES_OF_GROWTH * whole["transient"])
        shares[name] = whole
    name, terms = max(shares.items(), key=lambda item: sum(item[1].values()))
    if workload.device_type == "cuda":
        terms["idle"], beside = hardware.CONTEXT_BYTES, round(hardware.FRAGMENTATION * sum(terms.values()))
        terms["overhead"] += hardware.WORKSPACE_BYTES
    else:
        kept, logits = (max(held.get(term, 0) for held in shares.values()) for term in ("activations", "logits"))
        terms["overhead"] += heap_holes_bytes(method, workload, sizes["trained_bytes"], kept, logits)
        terms["overhead"] += CPU_LIBRARY_BYTES if workload.fast else CPU_LIBRARY_BYTES_OF_PYTORCHS_STEP
        terms["idle"], beside = hardware.idle_process_bytes(), CPU_LOADED_BYTES
    terms["overhead"] += beside
    peak = sum(terms.values())
    training = peak - terms["idle"]
    return MemoryEstimate(
        method=method,
        peak_bytes=peak,
        breakdown=terms,
        trainable_parameters=sizes["trainable"],
        total_parameters=found.total,
        error=error_bytes(training, workload.device_type) / training,
        phase=name,  # type: ignore[arg-type]
        outside_bytes=terms["idle"] + beside,
        notes=tuple(_notes(method, workload, found)),
        network=traffic(method, workload, sizes),
    )


def error_bytes(training_bytes: int, device_type: str) -> int:
    """Half the printed interval. Whole runs on a CPU lie inside (`benchmarks/memory_plan.py`)."""
    return round(ERROR * training_bytes) + (CPU_PROCESS_ERROR_BYTES if device_type == "cpu" else 0)


def heap_holes_bytes(method: str, workload: Workload, trained_bytes: int, kept_bytes: int, logits_bytes: int) -> int:
    """Unused bytes between the blocks of a CPU's heap at the peak: shares of all gradients and of the saved tensors.

    A gradient seldom fits into the hole that an activation left, so new memory is allocated beside freed activations.
    With checkpointing the peak may lie in a forward pass, beside the holes that the gradients of the step before left,
    and rows of varying lengths leave some between the blocks' inputs. rankwise's adapters leave few others; PyTorch's
    own operations, which layers that train for a merged file use, leave holes beside much of what a layer saves. The
    shares are fitted to measured runs (glibc, `benchmarks/memory_plan.py`).
    """
    large = HOLES_OF_LARGE_BLOCKS * trained_bytes if method_of(method).trains_all else 0
    if not workload.fast or workload.for_merge:
        large = max(large, HOLES_OF_PYTORCHS_STEP * (kept_bytes + logits_bytes))
    if workload.gradient_checkpointing:
        of_gradients, of_kept = HOLES_CHECKPOINTED
    elif not workload.fast:
        of_gradients, of_kept = HOLES_ELSE
    else:
        of_gradients, of_kept = HOLES_OF_FULL if method_of(method).trains_all else HOLES_OF_ADAPTERS
    return round(min(large, LARGEST_HOLES) + of_gradients * trained_bytes + of_kept * kept_bytes)


def _notes(method: str, workload: Workload, found: Found) -> Iterator[str]:
    if found.max_positions is not None and workload.max_length > found.max_positions:
        yield f"rows of {workload.max_length:,} tokens are longer than the model's {found.max_positions:,} positions"
    if method_of(method).trains_all:
        yield "full fine-tuning keeps float32 weights, gradients and moments: 16 bytes per parameter"
    if not workload.fast:
        yield "PyTorch's own step is counted, without fused operators"
    if found.sizes["elsewhere_bytes"]:
        size = byte_size(found.sizes["elsewhere_bytes"])
        yield f"{size} of optimizer state live in the host's memory ({workload.optimizer})"


def sharded(found: Found, method: str, workload: Workload) -> Found:
    """What one of N devices holds with fsdp of a step that was traced alone.

    Weights are sharded, of ``full`` gradients and states too; whole at a time are layers, and from the first layer
    to the last the root group, which is what lies outside of the layers (embedding, last norm, head). Where activations
    are most, one layer is there, in the backward pass of adapters two. The optimizer of ``full`` steps on shards alone;
    an adapter's gradients are summed in one tensor of all, before the optimizer steps.
    """
    sizes, full = found.sizes, method_of(method).trains_all
    layer, root = sizes["layer_bytes"], sizes["root_bytes"]
    phases: dict[str, Terms] = {}
    for phase, terms in found.phases.items():
        names = (*WEIGHTS, "gradients", "optimizer") if full else WEIGHTS
        shards = {name: ceil(terms.get(name, 0) / workload.devices) for name in names}
        transient = terms.get("transient", 0)
        if phase == "optimizer":
            transient = ceil(transient / workload.devices) if full else max(transient, sizes["trained_bytes"])
        else:
            transient += root + (BLOCKS_AT_ONCE if phase == "backward" and not full else 1) * layer
        phases[phase] = {**terms, **shards, "transient": transient}
        if full and phase == "backward":
            # At its end, when the activations are gone, the root group's gradients are reduced in a copy.
            kept = {name: ceil(sizes["weight_bytes"] / workload.devices) for name in ("weights", "gradients")}
            states = ceil(found.phases["optimizer"]["optimizer"] / workload.devices)
            copied = root // workload.devices if workload.device_type == "cpu" else 0
            last = {**kept, "optimizer": states, "transient": 2 * root + copied}
            phases[phase] = max(phases[phase], last, key=lambda held: sum(held.values()))
    return dataclasses.replace(found, phases=phases)


def traffic(method: str, workload: Workload, sizes: Mapping[str, int]) -> Traffic:
    """The bytes that the collectives of one of N devices send: (N - 1) / N of a tensor for a gather or a reduction to
    shards, and twice that for an all-reduce.

    ddp sums the gradients, T bytes, once in a step. fsdp gathers the weights, W bytes, for each way through the layers,
    the root group R once: 2 W - R in a micro-batch. ``full`` reduces its gradients, of W bytes, in each micro-batch; an
    adapter's are summed once in a step.
    """
    share, weights = (workload.devices - 1) / workload.devices, sizes["weight_bytes"]
    gathered = 2 * weights - sizes["root_bytes"] if workload.strategy == "fsdp" else 0
    if gathered and method_of(method).trains_all:
        return Traffic(round(share * (gathered + weights)))
    return Traffic(round(share * gathered), round(2 * share * sizes["trained_bytes"]))


def over_file(model: PlannedModel, ask: Estimator) -> Estimator:
    """An estimator for training over a GGUF file in its own bits where the step keeps them; ``ask`` for other models.

    Raises ConfigError (RW112) for ``--base-bits file`` with a method or a device that does not keep them.
    """
    if not model.source.is_gguf:
        return ask

    def asked(method: str, workload: Workload) -> MemoryEstimate:
        on_cpu, is_file, row = workload.device_type == "cpu", model.source.kind == "gguf", method_of(method)
        kept = keeps_file_bits(workload.base_bits, method, is_file=is_file, on_cpu=on_cpu)
        if kept and (row.four_bits or not row.has_adapter or not on_cpu):
            raise ConfigError(
                "RW112", f"--base-bits file is for lora and dora on a CPU, and not for {method}; leave it out."
            )
        found = ask(method, dataclasses.replace(workload, base_bits=None))
        if not kept:
            return found
        held = {
            "weights": model.facts.dense_elements * DTYPE_BYTES[workload.dtype],
            "weights_4bit": model.facts.packed_bytes,
        }
        less = found.breakdown["weights"] - sum(held.values())
        return dataclasses.replace(
            found,
            breakdown={**found.breakdown, **held},
            peak_bytes=found.peak_bytes - less,
            notes=(*found.notes, "the base stays in the GGUF file's own bits; --base-bits 16 expands it"),
        )

    return asked


def over_stored(stored: Stored | None, ask: Estimator) -> Estimator:
    """An estimator for training over stored weights: bitsandbytes' 4 bits, over which LoRA is QLoRA, other libraries'
    formats that support adapters, or experts in MXFP4; ``ask`` itself for dense weights.
    """
    if stored is not None and stored.format == MXFP4:

        def over_mxfp4(method: str, workload: Workload) -> MemoryEstimate:
            return ask(method, dataclasses.replace(workload, experts_in_mxfp4=stored.keeps_mxfp4(workload.device_type)))

        return over_mxfp4
    if stored is None or not (stored.four_bit or stored.bits):
        return ask

    def asked(method: str, workload: Workload) -> MemoryEstimate:
        if not stored.four_bit:
            return _over_foreign(stored, ask, method, workload)
        row = method_of(method)
        same = dataclasses.replace(workload, double_quant=stored.double_quant, block_size=BITSANDBYTES_BLOCK)
        found = ask((row.has_adapter and row.lighter) or method, same)
        return dataclasses.replace(found, method=method)

    return asked


def _over_foreign(stored: Stored, ask: Estimator, method: str, workload: Workload) -> MemoryEstimate:
    """The weights that QLoRA would quantize take ``bits`` each, and a scale and a zero per group."""
    dense = ask(method, workload)
    row = method_of(method)
    if not row.has_adapter or row.lighter is None:
        return dense
    linear = dense.breakdown["weights"] - ask(row.lighter, workload).breakdown["weights"]
    count = linear // DTYPE_BYTES[workload.dtype]
    packed = ceil(count * stored.bits / 8) + GROUP_BYTES * ceil(count / (stored.group or count or 1))
    changed = {
        **dense.breakdown,
        "weights": dense.breakdown["weights"] - linear,
        "weights_4bit": dense.breakdown["weights_4bit"] + packed,
    }
    return dataclasses.replace(dense, breakdown=changed, peak_bytes=dense.peak_bytes - linear + packed)

"""The peak of a step of the whole model, from traces of the same model with a few of its layers.

Between two consecutive hooks (embedding, a layer's forward pass, head, a layer's backward pass, optimizer) the highest
bytes are linear in the number of layers n, counted in whole periods where layers alternate:

    peak(n) = max over the parts of a step of  a + b n

so two traces give all a and b. Results are kept on disk, and torch is imported only where a trace is needed.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rankwise.compat.system import cache_folder
from rankwise.config import keeps_file_bits
from rankwise.conflicts import without_reference
from rankwise.constants import MXFP4
from rankwise.errors import ConfigError, RankwiseWarning, heard, warn
from rankwise.foreign import JsonObject, read_json
from rankwise.methods import METHODS, method_of
from rankwise.models.device import cpu_flags
from rankwise.models.source import fetch_model
from rankwise.planning import hardware
from rankwise.planning.speed import PlannedModel, Stored, read_model
from rankwise.planning.workload import DTYPE_BYTES, TRACING, Workload, planned_methods, rule_of, uncollected
from rankwise.records import write_json
from rankwise.reports.numbers import byte_size

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from rankwise.planning.trace import Traced
    from rankwise.planning.tracker import Place, Terms

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
# Numbers of parameters, layers or calls in the names of targets: q_proj and fc1 are in every layer, layers.3 is not.
NAMES_A_LAYER = re.compile(r"(?<![a-zA-Z_0-9])\d|\[|\\d")
# Attributes of a layer that number it.
NUMBERS = re.compile(r"idx|index|layer_id|layer_number|number")
# Prepared models that are kept for other batches and lengths.
PREPARED = 12

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
HOLES_CHECKPOINTED, HOLES_OF_FULL, HOLES_OF_ADAPTERS, HOLES_ELSE = (0.2, 0.0), (0.1, 0.4), (0.5, 0.02), (0.5, 0.0)

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


def estimate(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload | None = None,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> MemoryEstimate:
    """Peak memory of one step of ``method`` on ``model``: hub id, folder, GGUF file or demo; its weights are not read.

    Raises ConfigError: RW130 for settings or an unknown method, RW132 for an optimizer whose memory is not
    known; AdapterError: RW401 to RW403 and RW419 for targets; ModelError: RW327 where the step cannot be traced, and as
    ``fetch_model`` and ``load_skeleton`` do.
    """
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    workload = workload or Workload()
    planned = read_model(source, trust_remote_code=trust_remote_code, labels=workload.labels)
    return Traces(planned)(method, workload)


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


class Traces:
    """An estimator for one model. ``say`` is called with a line about a trace that takes longer than a second, and
    ``warns`` says whether warnings about adapters are given, each once; a run gives them itself."""

    def __init__(
        self, model: PlannedModel, say: Callable[[str], None] = lambda _: None, *, warns: bool = False
    ) -> None:
        self.model, self.say, self.warns = model, say, warns
        self._told: set[str] = set()
        # {adapter: its warnings}.
        self._heard: dict[str, dict[str, str]] = {}
        self._prepared: dict[tuple[str, str, int], Traced] = {}

    def __call__(self, method: str, workload: Workload) -> MemoryEstimate:
        if method not in METHODS:
            raise ConfigError("RW130", f"there is no method {method!r}; give one of {', '.join(planned_methods())}.")
        rule_of(workload.optimizer)
        if conflict := " ".join(without_reference(workload.objective, method)):
            raise ConfigError("RW112", conflict)
        key = f"{method} {json.dumps(dataclasses.asdict(workload), sort_keys=True, default=str)}"
        if key not in self._kept:
            line = f"{TRACING} {method} at {workload.batch_size} x {workload.max_length:,} tokens ..."
            with _told(self.say, line), uncollected():
                self._kept[key] = dataclasses.asdict(self._trace(method, workload))
            self._keep()
        found = Found(**self._kept[key])
        for code, message in found.told.items():
            if self.warns and code not in self._told:
                self._told.add(code)
                warn(code, message)
        return assembled(method, workload, found)

    @functools.cached_property
    def _file(self) -> Path:
        return cache_folder() / "traces" / f"{_hash_of(self.model)}.json"

    @functools.cached_property
    def _kept(self) -> JsonObject:
        try:
            return read_json(self._file)
        except (OSError, ValueError):
            return {}

    def _keep(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_json(self._file, self._kept)
        except OSError:
            self.say(f"traces cannot be kept in {self._file.parent}")

    @functools.cached_property
    def _skeleton(self) -> PreTrainedModel:
        from rankwise.models import load_skeleton

        skeleton = load_skeleton(self.model.source, trust_remote_code=self.model.trust_remote_code)
        # What is stored quantized, `over_stored` counts.
        vars(skeleton.config).pop("quantization_config", None)
        return skeleton

    def _trace(self, method: str, workload: Workload) -> Found:
        import torch.distributed as dist

        if workload.strategy == "fsdp" and dist.is_available() and dist.is_initialized():
            # A run with its own group of processes cannot have another of fake ones.
            alone = self._trace(method, dataclasses.replace(workload, strategy="single", devices=1))
            return _sharded(alone, method, workload)
        names_a_layer = any(NAMES_A_LAYER.search(name) for name in _names(workload))
        cut = None if names_a_layer else self._cut
        found = traced(self._skeleton, method, workload, cut, functools.partial(self._model_of, method, workload))
        return dataclasses.replace(found, told=self._warnings_of(method, workload))

    @functools.cached_property
    def _cut(self) -> Cut | None:
        return cut_of(self._skeleton)

    def _warnings_of(self, method: str, workload: Workload) -> dict[str, str]:
        from rankwise.adapters import plan_adapter
        from rankwise.adapters.select import with_heads

        if method_of(method).trains_all:
            return {}
        config = workload.lora_config(method)
        if repr(config) not in self._heard:
            told: dict[str, str] = {}

            def hear(warning: RankwiseWarning) -> bool:
                told[warning.code] = warning.message
                return False

            with heard(hear):
                plan_adapter(self._skeleton, with_heads(self._skeleton, config))
            self._heard[repr(config)] = told
        return self._heard[repr(config)]

    def _model_of(self, method: str, workload: Workload, numbers: Sequence[int]) -> Traced:
        """The model with these layers, prepared for this or for another batch."""
        from rankwise.planning.trace import Traced

        batch = {"batch_size": 1, "max_length": 2, "trained_share": 1.0, "evaluation": False, "accumulates": False}
        general = dataclasses.replace(workload, **batch, written=0, prompts=0)  # type: ignore[arg-type]
        key = method, repr(general), len(numbers)
        if workload.strategy == "fsdp" or key not in self._prepared:
            while len(self._prepared) >= PREPARED:
                del self._prepared[next(iter(self._prepared))]
            path = layers_path(self._skeleton)
            made = Traced(with_layers(self._skeleton, path, numbers), method, general, layers=path)
            if workload.strategy == "fsdp":
                return made
            self._prepared[key] = made
        return self._prepared[key]


def traced(
    skeleton: PreTrainedModel,
    method: str,
    workload: Workload,
    cut: Cut | None,
    model_of: Callable[[Sequence[int]], Traced],
) -> Found:
    """The step of the whole model: from two traces of a few layers, or without ``cut`` from one of all."""
    config = skeleton.config.get_text_config()
    count = getattr(config, "num_hidden_layers", 0)
    parts: list[dict[tuple[Any, ...], Terms]] = []
    sizes: list[dict[str, int]] = []
    for number in (cut.smaller, cut.larger) if cut else (count,):
        model = model_of(cut.kept(number) if cut else range(count))
        found = model.peaks(workload)
        parts.append(cut.named(found, number) if cut else {tuple(place): terms for place, terms in found.items()})
        sizes.append(model.sizes())
        model.close()
    extended = functools.partial(_extended, periods=cut.periods_beyond if cut else 0)
    phases: dict[str, Terms] = {}
    for place in parts[0]:
        if place not in parts[-1]:
            continue
        terms = extended(parts[0][place], parts[-1][place])
        phase = place[0]
        phases[phase] = max(phases.get(phase, {}), terms, key=lambda held: sum(held.values()))
    return Found(
        phases=phases,
        sizes=extended(sizes[0], sizes[-1]),
        total=sum(parameter.numel() for parameter in skeleton.parameters()),
        max_positions=getattr(config, "max_position_embeddings", None),
        told={},
    )


def _extended(smaller: Mapping[str, int], larger: Mapping[str, int], periods: int) -> dict[str, int]:
    """Each value with so many periods of layers more than ``larger`` has, which has one more than ``smaller``."""
    names = dict.fromkeys((*smaller, *larger))
    return {name: larger.get(name, 0) + periods * (larger.get(name, 0) - smaller.get(name, 0)) for name in names}


@dataclasses.dataclass(frozen=True)
class Cut:
    """Layers to keep of ``count``, of which those after the first ``prefix`` repeat with ``period``."""

    count: int
    prefix: int
    period: int

    @property
    def smaller(self) -> int:
        """The number of layers of the smaller model: beside the prefix a first one, a period and a last one at least,
        and whole periods fewer than in the model."""
        least = self.prefix + self.period + 2
        return least + (self.count - least) % self.period

    @property
    def larger(self) -> int:
        return self.smaller + self.period

    @property
    def periods_beyond(self) -> int:
        return (self.count - self.larger) // self.period

    def kept(self, number: int) -> list[int]:
        """``number`` layers, without whole periods in the middle."""
        first = self.prefix + self.period + 1
        return [*range(first), *range(self.count - number + first, self.count)]

    def named(self, found: Mapping[Place, Terms], number: int) -> dict[tuple[Any, ...], Terms]:
        """The parts of a step of ``number`` layers by where they are from the front and from the end; in the middle
        between these, bytes lie between theirs."""
        named: dict[tuple[Any, ...], Terms] = {}
        for place, terms in found.items():
            if place.layer <= self.prefix + self.period:
                named[place.phase, "front", place.layer, place.turn] = terms
            if place.layer >= number - 1 - self.period:
                named[place.phase, "end", number - place.layer, place.turn] = terms
        return named


def cut_of(model: PreTrainedModel) -> Cut | None:
    """The smallest cut whose two models have fewer layers together than the model; None where there is none."""
    path = layers_path(model)
    if path is None:
        return None
    layers: Any = model.get_submodule(path)
    of_config = list(_layer_lists(model).values())
    kinds = [(*_kind(layer), *(str(values[number]) for values in of_config)) for number, layer in enumerate(layers)]
    count, cuts = len(kinds), []
    for period in range(1, count // 2 + 1):
        breaks = (number + 1 for number in range(count - period) if kinds[number] != kinds[number + period])
        cuts.append(Cut(count, max(breaks, default=0), period))
    best = min(cuts, key=lambda cut: cut.smaller + cut.larger, default=None)
    return best if best is not None and best.smaller + best.larger < count else None


def _kind(layer: nn.Module) -> Iterator[object]:
    """What makes two layers alike: their modules, shapes and settings."""
    for name, module in layer.named_modules():
        settings = {
            key: value
            for key, value in vars(module).items()
            if isinstance(value, bool | int | str | None) and not NUMBERS.search(key)
        }
        shapes = [(key, tuple(value.shape)) for key, value in module.named_parameters(recurse=False)]
        yield name, type(module), str(sorted(settings.items())), str(shapes)


def _layer_lists(model: PreTrainedModel) -> dict[str, list[Any]]:
    """The settings of the model that are lists with an entry for each layer."""
    config: Any = model.config.get_text_config()
    count = config.num_hidden_layers
    lists = {name: value for name, value in vars(config).items() if isinstance(value, list | tuple)}
    return {name: list(value) for name, value in lists.items() if len(value) == count}


def layers_path(model: PreTrainedModel) -> str | None:
    """The name of the decoder's list of layers; None where not exactly one list has as many modules as the config has
    layers."""
    from torch import nn

    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [
        name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    return outer[0] if len(outer) == 1 else None


def with_layers(model: PreTrainedModel, path: str | None, numbers: Sequence[int]) -> PreTrainedModel:
    """A copy of a model on the meta device with these of the layers at ``path``."""
    from rankwise.compat.torch import own_modules

    layers: Any = model.get_submodule(path) if path is not None else ()
    if len(numbers) == len(layers) or path is None:
        return copy.deepcopy(model)
    lists, held, every = _layer_lists(model), own_modules(layers), dict(own_modules(layers))
    held.clear()
    held.update({str(new): every[str(old)] for new, old in enumerate(numbers)})
    try:
        made = copy.deepcopy(model)
    finally:
        held.clear()
        held.update(every)
    config: Any = made.config.get_text_config()
    config.num_hidden_layers = len(numbers)
    for name, values in lists.items():
        setattr(config, name, [values[number] for number in numbers])
    kept: Any = made.get_submodule(path)
    for number, layer in enumerate(kept):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = number
    return made


def _names(workload: Workload) -> Iterator[str]:
    """All names of modules, and numbers of layers, in the settings."""
    for name in (
        *("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_to_transform"),
        *("rank_pattern", "alpha_pattern", "enable_lora"),
    ):
        given = getattr(workload, name)
        yield from [given] if isinstance(given, str) else map(str, given or ())


# --- the estimate of a device ---


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
    Checkpointing leaves fewer of these holes. rankwise's adapters and checkpointing leave almost no others; PyTorch's
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


# --- several devices ---


def _sharded(found: Found, method: str, workload: Workload) -> Found:
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


# --- weights that are stored quantized ---


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


# --- on disk ---


def _hash_of(model: PlannedModel) -> str:
    """What a trace depends on beside method and workload: the model, the libraries, this code and the processor."""
    code = max(path.stat().st_mtime_ns for path in Path(__file__).parents[1].rglob("*.py"))
    described = [
        model.identity,
        model.trust_remote_code,
        [version(name) for name in ("rankwise", "torch", "transformers")],
        [
            code,
            sorted(flag for flag in cpu_flags() if flag.startswith(("avx", "amx"))),
            os.environ.get("RANKWISE_CPU_LEVEL"),
        ],
    ]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:32]


@contextmanager
def _told(say: Callable[[str], None], line: str) -> Iterator[None]:
    """``say`` the line once this has taken a second."""
    timer = threading.Timer(1.0, say, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

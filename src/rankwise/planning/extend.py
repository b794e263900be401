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
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.compat.system import cache_folder
from rankwise.conflicts import without_reference
from rankwise.errors import ConfigError, RankwiseWarning, heard, warn
from rankwise.foreign import JsonObject
from rankwise.methods import METHODS, method_of
from rankwise.models.device import cpu_flags
from rankwise.models.source import fetch_model
from rankwise.planning.facts import PlannedModel, read_model
from rankwise.planning.memory import Found, MemoryEstimate, assembled, sharded
from rankwise.planning.workload import TRACING, Workload, planned_methods, rule_of, uncollected
from rankwise.records import keep_json, kept_json

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from rankwise.planning.trace import Traced
    from rankwise.planning.tracker import Place, Terms


# Numbers of parameters, layers or calls in the names of targets: q_proj and fc1 are in every layer, layers.3 is not.
NAMES_A_LAYER = re.compile(r"(?<![a-zA-Z_0-9])\d|\[|\\d")
# Attributes of a layer that number it.
NUMBERS = re.compile(r"idx|index|layer_id|layer_number|number")
# Prepared models that are kept for other batches and lengths.
PREPARED = 12


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
            if not keep_json(self._file, self._kept):
                self.say(f"traces cannot be kept in {self._file.parent}")
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
        return kept_json(self._file) or {}

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
            return sharded(alone, method, workload)
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

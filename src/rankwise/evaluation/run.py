"""``evaluate``: tasks and models in, results and predictions out. Only this module knows the settings."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from rankwise.data import read_template
from rankwise.disk import coded_errors, hold, refuse_links
from rankwise.errors import ConfigError, Interrupted
from rankwise.evaluation.engine import (
    Engine,
    LoadOptions,
    base_of,
    check_alone,
    check_fit,
    load_as_trained,
    load_settings,
    template_of,
)
from rankwise.evaluation.record import (
    EXAMPLES_FILE,
    RESULT_FILE,
    Example,
    Opened,
    TaskResult,
    json_sha256,
    load_result,
    open_folder,
    read_examples,
    rewrite,
)
from rankwise.evaluation.settings import EvaluateSettings, LoadingOptions
from rankwise.evaluation.tasks.base import Task, clusters_of
from rankwise.evaluation.tasks.making import make_tasks
from rankwise.foreign import Fields, JsonObject, sha256_of_files
from rankwise.options import flag
from rankwise.records import record_of, versions_of, write_json

DIFFERENCES_FILE = "differences.json"
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
DEFAULT_FOLDER = Path("evaluations")
# Libraries that could change a result.
PACKAGES = ("rankwise", "torch", "transformers", "tokenizers", "datasets", "lm-eval", "numpy")


class Observer(Protocol):
    """The interface of a progress display."""

    def phase(self, text: str) -> None:
        """A new phase begins."""

    def progress(self, label: str, done: int, total: int) -> None:
        """Questions answered of one task on one model."""

    def result(self, label: str, result: TaskResult) -> None:
        """A task is done on one model."""


def answer_task(
    task: Task,
    engine: Engine,
    place: Opened,
    *,
    model: str,
    adapter: Path | None,
    answers: Mapping[str, tuple[str, bool]] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[TaskResult, list[Example]]:
    """Run ``task`` on a loaded model and write its result and predictions to ``place``.

    ``answers``: {id of an example: (prediction, whether it is cut)}, which replace the task's own.
    """
    from rankwise.models.prepared import mapped_files

    started, files = time.monotonic(), mapped_files(engine.model)
    found = task.run(engine, place.folder, progress)
    files.check()
    if answers:
        given = {item.id: answers.get(item.id, (item.prediction, item.is_cut)) for item in found}
        found = [dataclasses.replace(item, prediction=given[item.id][0], is_cut=given[item.id][1]) for item in found]
    found = list(task.with_scores(found))
    rewrite(place.folder, found)
    summary, clusters = task.summarize(found), clusters_of([example.cluster for example in found])
    result = TaskResult(
        task=task.name,
        model=model,
        adapter=None if adapter is None else str(adapter),
        metrics=summary.metrics,
        primary=task.primary if task.primary in summary.metrics else next(iter(summary.metrics), task.primary),
        higher_is_better={name: task.higher_is_better.get(name, True) for name in summary.metrics},
        standard_errors=summary.standard_errors,
        count=len(found),
        settings=settings_of(task, place.identity),
        data_sha256=task.data_sha256,
        versions=versions_of((*PACKAGES, *task.packages)),
        wall_seconds=time.monotonic() - started,
        clusters=None if clusters is None else len(set(clusters)),
        notes=summary.notes,
    )
    result.save(place.folder)
    return result, found


def settings_of(task: Task, identity: Fields) -> JsonObject:
    """The settings of a result, in the form that is read back from JSON."""
    return json.loads(json.dumps({**identity, **task.extra_settings()}, default=str))


@dataclasses.dataclass(frozen=True)
class Variant:
    """The base, or an adapter over it."""

    label: str
    adapter: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Difference:
    """``a - b`` on the same questions, with the 95 % interval."""

    task: str
    metric: str
    a: str
    b: str
    difference: float
    standard_error: float | None
    interval: tuple[float, float] | None

    def to_json(self) -> JsonObject:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """All results with the label of their model, the paired differences, and the folder that holds them."""

    folder: Path
    results: Sequence[tuple[str, TaskResult]]
    differences: Sequence[Difference]


@dataclasses.dataclass(frozen=True)
class Given:
    """What is in memory: a model with its tokenizer; rows for the task perplexity."""

    model: Any = None
    tokenizer: Any = None
    rows: Any = None


def evaluate(settings: EvaluateSettings, observer: Observer, given: Given | None = None) -> Evaluation:
    """Evaluate and write DIR/TASK/{result.json,predictions.jsonl}; with several models, DIR/LABEL/TASK/.

    Results that the folder already holds are kept. Raises InputError for bad settings, data or folders before the model
    is loaded; RunError: RW551 a file cannot be written, RW582 another process writes there; Interrupted (RW572)
    after Ctrl-C, with every finished batch on disk.
    """
    return _Run(settings, observer, given or Given()).carry_out()


class _Run:
    def __init__(self, settings: EvaluateSettings, observer: Observer, given: Given) -> None:
        self.settings, self.observer, self.given = settings, observer, given
        self.engine: Engine | None = None
        self.name = settings.model or _base(settings.adapter)
        self.variants = variants_of(settings.adapter, settings.base)
        check_alone(settings.adapter, base=len(self.variants) > len(settings.adapter))
        options, named = _load_options(settings), settings.model is not None
        if given.model is not None:
            _check_in_memory(settings, given)
            self.variants = [Variant("model")]
        else:
            self.revision = check_fit(self.name, settings.adapter, options, named=named)
        observer.phase("Reading data")
        self.tasks = make_tasks(settings, given.rows)
        # The user's chat template, else that of the training. None means the tokenizer's own.
        own = settings.chat_template
        self.template = template_of(settings.adapter) if own is None else read_template(own)
        if given.model is not None:
            self.engine = Engine(
                model=given.model.eval(),
                tokenizer=given.tokenizer,
                template=self.template,
                batch_size=settings.batch_size,
            )
        self.names: dict[str, str] = {}

    def carry_out(self) -> Evaluation:
        identities = self._identities()
        content = {"|".join(key): value for key, value in identities.items()}
        name = f"{_as_name(Path(self.name).name)}-{json_sha256(content)[:10]}"
        root = self.settings.output or DEFAULT_FOLDER / name
        with hold(root), coded_errors(root, "and the same command goes on with the answers so far"):
            return self._evaluate(root, identities)

    def _evaluate(self, root: Path, identities: dict[tuple[str, str], JsonObject]) -> Evaluation:
        folders = {key: self._folder(root, *key) for key in identities}
        parts = [folder.relative_to(root) for folder in folders.values()]
        refuse_links(root, {str(path) for part in parts for path in (part, *part.parents[:-1])})
        places = {
            key: open_folder(folders[key], identity, overwrite=self.settings.overwrite)
            for key, identity in identities.items()
        }
        results, examples = [], {}
        try:
            for task in self.tasks:
                for variant in self.variants:
                    result, found = self._result(task, variant, places[variant.label, task.name])
                    self.observer.result(variant.label, result)
                    results.append((variant.label, result))
                    examples[variant.label, task.name] = found
        except KeyboardInterrupt:
            raise Interrupted(
                "RW572",
                f"the evaluation was stopped; the answers so far are in {root}, and the same command goes on from there"
                + ("." if self.settings.output else f" (--output {root} is its default)."),
            ) from None
        metrics = {(label, result.task): result.metrics for label, result in results}
        differences = [item for task in self.tasks for item in self._differences(task, examples, metrics)]
        if len(self.variants) > 1:
            write_json(root / DIFFERENCES_FILE, [item.to_json() for item in differences])
        return Evaluation(root, results, differences)

    def _result(self, task: Task, variant: Variant, place: Opened) -> tuple[TaskResult, list[Example]]:
        if (place.folder / RESULT_FILE).is_file():
            known = load_result(place.folder)
            examples = list(read_examples(place.folder / EXAMPLES_FILE))
            is_same = known.settings == settings_of(task, place.identity) and known.count == len(examples)
            if is_same and task.is_final(known):
                return known, examples
        engine = self._engine()
        self._activate(engine, variant)
        label = f"{task.name} on {variant.label}"
        self.observer.phase(label)
        return answer_task(
            task,
            engine,
            place,
            model=self.name,
            adapter=variant.adapter,
            progress=lambda done, total: self.observer.progress(label, done, total),
        )

    def _engine(self) -> Engine:
        """The base with its adapters, loaded at the first question that has no answer yet."""
        if self.engine is not None:
            return self.engine
        self.observer.phase(f"Loading {self.name}")
        given = self.settings
        loaded = load_as_trained(self.name, given.adapter, _load_options(given), named=given.model is not None)
        self.names = {str(adapter): name for adapter, name in zip(given.adapter, loaded.adapters)}
        self.engine = Engine(
            model=loaded.model, tokenizer=loaded.tokenizer, template=self.template, batch_size=given.batch_size
        )
        return self.engine

    def _activate(self, engine: Engine, variant: Variant) -> None:
        from rankwise.adapters import disable_adapter, enable_adapter, has_adapter, set_adapter

        record = record_of(variant.adapter)
        engine.trained_fast = record is None or record.settings.get("fast") is not False
        if not has_adapter(engine.model) or self.given.model is not None:
            return
        if variant.adapter is None:
            disable_adapter(engine.model)
        else:
            enable_adapter(engine.model)
            set_adapter(engine.model, self.names[str(variant.adapter)])

    def _differences(
        self,
        task: Task,
        examples: Mapping[tuple[str, str], list[Example]],
        metrics: Mapping[tuple[str, str], Mapping[str, float]],
    ) -> list[Difference]:
        """Each adapter against the base and against the adapters before it."""
        found = []
        for index, first in enumerate(self.variants):
            for second in self.variants[index + 1 :]:
                a, b = (second.label, task.name), (first.label, task.name)
                means = task.difference(examples[a], examples[b])
                found += [
                    Difference(
                        task=task.name,
                        metric=name,
                        a=second.label,
                        b=first.label,
                        difference=m.value,
                        standard_error=m.standard_error,
                        interval=m.interval,
                    )
                    for name, m in means.items()
                    if _is_of(m.value, metrics[a].get(name), metrics[b].get(name))
                ]
        return found

    def _identities(self) -> dict[tuple[str, str], JsonObject]:
        """Everything that the answers of each task depend on, by (label, task)."""
        from rankwise.models import fetch_model, model_hash, settings_hash
        from rankwise.models.source import hash_in_memory

        given = self.settings
        if self.given.model is not None:
            known: JsonObject = {"model_sha256": hash_in_memory(self.given.model), "dtype": str(self.given.model.dtype)}
        else:
            source = fetch_model(self.name, revision=self.revision, trust_remote_code=given.trust_remote_code)
            known = {
                "model_sha256": model_hash(source),
                "model_settings_sha256": settings_hash(source),
                **load_settings(given.adapter, _load_options(given)),
            }
        template = None if self.template is None else hashlib.sha256(self.template.encode()).hexdigest()
        common = {
            **known,
            "limit": given.limit,
            "chat_template_sha256": template,
        }
        return {
            (variant.label, task.name): {
                "task": task.name,
                **common,
                "adapter_sha256": None
                if variant.adapter is None
                else sha256_of_files(map(variant.adapter.joinpath, ADAPTER_FILES)),
                "data_sha256": task.data_sha256,
                "task_settings": task.describe(),
            }
            for variant in self.variants
            for task in self.tasks
        }

    def _folder(self, root: Path, label: str, task: str) -> Path:
        name = _as_name(task)
        return root / label / name if len(self.variants) > 1 else root / name


def _check_in_memory(settings: EvaluateSettings, given: Given) -> None:
    """Raise ConfigError (RW112, RW115) for options of loading beside a model in memory, or without its tokenizer."""
    if given.tokenizer is None:
        raise ConfigError("RW115", "a model in memory comes without its tokenizer; give tokenizer=TOKENIZER too.")
    asked, usual = settings.model_dump(mode="json"), settings.defaults()
    if odd := [flag(name) for name in ("adapter", "base", *LoadingOptions.model_fields) if asked[name] != usual[name]]:
        raise ConfigError("RW112", f"{', '.join(odd)}: the model in memory is measured as it is; leave it out.")


def _is_of(difference: float, a: float | None, b: float | None) -> bool:
    """Whether ``difference`` is that of the metrics ``a`` and ``b``.

    It is not for metrics of the harness that are no means, such as a perplexity of questions with log-likelihoods.
    """
    return a is not None and b is not None and math.isclose(difference, a - b, rel_tol=1e-6, abs_tol=1e-9)


def variants_of(adapters: Sequence[Path], base: bool | None) -> list[Variant]:
    """The models to evaluate: the adapters, and the base with several of them, without any, or on request."""
    labels: list[str] = []
    for adapter in adapters:
        stem = _as_name(adapter.resolve().name) or "adapter"
        label, number = stem, 2
        while label in labels or label == "base":
            label, number = f"{stem}-{number}", number + 1
        labels.append(label)
    tuned = [Variant(label, adapter) for label, adapter in zip(labels, adapters)]
    wants_base = len(adapters) != 1 if base is None else base or not adapters
    return [Variant("base"), *tuned] if wants_base else tuned


def _as_name(text: str) -> str:
    """``text`` as the name of a folder."""
    return re.sub(r"[^\w.-]+", "-", text)


def _base(adapters: Sequence[Path]) -> str:
    if not adapters:
        raise ConfigError("RW121", "there is nothing to evaluate; give --model M, --adapter FOLDER or both.")
    return base_of(adapters)


def _load_options(given: EvaluateSettings) -> LoadOptions:
    return LoadOptions(**given.model_dump(include={*LoadingOptions.model_fields}), guest=True)

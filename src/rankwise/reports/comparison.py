"""A comparison: the layout of ``comparison.json``, from which reports are made, and the folder that holds it. No torch.

Times are in seconds, memory and sizes in bytes, speeds in tokens per second. A figure that was not measured is null.
A *metric* is ``eval_loss`` (nats per trained token, lower is better; of preferences their own loss) or ``TASK.METRIC``
(``e2e.BLEU``, ``preference.reward_accuracy``). Differences are ``a - b`` in the metric's own unit; a verdict is about
``a``: "better" says that ``a`` is better than ``b``. Verdicts are fields; ``words.py`` puts them into sentences.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from statistics import fmean
from typing import Any, Literal, NotRequired, TypedDict

from rankwise.errors import RunError
from rankwise.foreign import Fields, JsonObject, parse_json, read_json
from rankwise.records import read_metrics
from rankwise.reports.numbers import is_number, plural

SCHEMA = 2
COMPARISON_FILE = "comparison.json"
RECOMMENDED_FILE = "recommended.yaml"
RUNS_FOLDER = "runs"
BEST_FOLDER = "best"
EVALUATION_FOLDER = "evaluation"
EVAL_LOSS = "eval_loss"
# The task that measures the loss on the rows of --retain, and that metric.
RETAINED = "retained"
RETAINED_LOSS = f"{RETAINED}.loss"
# Loss on training rows that a search of the learning rate withheld from its short runs.
KEPT_ROWS_LOSS = "kept_rows_loss"

Phase = Literal["search", "final"]
Status = Literal["finished", "failed", "interrupted", "skipped"]
# "not tuned": the best learning rate of one of the two lies at the edge of those tried.
Verdict = Literal["better", "worse", "equivalent", "cannot tell", "not tuned"]
Retained = Literal["kept", "lost", "cannot tell"]
# The costs that decide between equal methods, in this order; "mean" is the metric itself.
CostName = Literal["wall_seconds", "peak_memory_bytes", "trainable_parameters", "servers", "mean"]


class Message(TypedDict):
    """An error or a warning."""

    code: str
    message: str


class Run(TypedDict):
    """One cell of the matrix: a method at a learning rate with a seed."""

    # Name of its folder below ``runs``: METHOD-lrX-seedN; METHOD-auto-seedN where the run searched for its rate first.
    id: str
    method: str
    seed: int
    # None: its search did not end.
    learning_rate: float | None
    # "search": tried a learning rate that was not chosen; "final": counts for the method's figures.
    phase: Phase
    status: Status
    # Whether no other step could run beside it, so that its time can be compared.
    alone: bool
    # Why it failed, was interrupted or was skipped.
    error: Message | None
    # Relative to the comparison's folder, with forward slashes.
    folder: str
    # RunRecord.to_json() of the run; None when it left none.
    record: JsonObject | None
    # TASK -> TaskResult.to_json(); ``examples`` in it is relative to ``folder``/evaluation/TASK.
    tasks: dict[str, JsonObject]
    # Size of the adapter's weights on disk; for ``full`` of the whole model's.
    adapter_bytes: int | None


class MethodVerdict(TypedDict):
    """A method against the best one on the primary metric: the verdict of their difference."""

    verdict: Verdict | Literal["best"]
    # Corrected for ``comparisons``; None without a test.
    p_value: float | None
    # The tuned methods but one: only these comparisons can call the best method worse (Hsu 1984).
    comparisons: int


class Retention(TypedDict):
    """What a method kept of the rows that must stay (``--retain``), against the base."""

    verdict: Retained
    # Loss of the base, in nats per token (of a task: per question), and the method's minus it, with its 95 % interval;
    # None with one seed.
    base: float
    difference: float
    interval: list[float] | None
    # One-sided p-values of "it rose by the margin or more" and of "it did not rise", both uncorrected.
    kept_p: float | None
    lost_p: float | None
    # Both p-values are multiplied by this number before they decide.
    comparisons: int
    # In the unit of the loss.
    margin: float
    paired_by_example: bool


class Method(TypedDict):
    """A method over its final runs. ``interval`` is None with one seed: then no interval can be given."""

    # METRIC -> mean over seeds.
    mean: dict[str, float]
    # METRIC -> 95 % t-interval of that mean over seeds [low, high].
    interval: dict[str, list[float] | None]
    # METRIC -> SEED -> value.
    per_seed: dict[str, dict[str, float]]
    higher_is_better: dict[str, bool]
    # Final runs that finished.
    seeds: int
    failed: int
    learning_rate: float | None
    # The best rate tried is the lowest or the highest of several tried.
    learning_rate_at_edge: bool
    # Means over the final runs; memory: the largest.
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    predicted_peak_memory_bytes: int | None
    wall_seconds: float | None
    # "wall_seconds", "peak_memory_bytes" -> [lowest, highest] over the final runs.
    ranges: dict[str, list[float]]
    # Whether its runs took place with no other beside them.
    alone: bool
    # COST -> [lowest, highest], in which costs are compared; a cost that cannot be compared is missing. Variants that
    # compute the same share a range.
    costs: dict[CostName, list[float]]
    # None without a result.
    verdict: MethodVerdict | None
    # None without --retain.
    retained: NotRequired[Retention | None]
    trainable_parameters: int | None
    adapter_bytes: int | None
    # Where its result can be served, in words.
    serving: list[str]
    # Why it was not run.
    skipped: str | None


class Difference(TypedDict):
    """Two methods on one metric, paired by example and by seed. Intervals are 95 %."""

    a: str
    b: str
    metric: str
    difference: float
    # None with one seed or one cluster: then its share of the error is not known.
    interval: list[float] | None
    standard_error: float | None
    p_value: float | None
    # Larger p-value of the two one-sided tests against ``margin``.
    equivalence_p: float | None
    # Both p-values are multiplied by this number before they decide; here they are uncorrected.
    comparisons: int
    margin: float
    verdict: Verdict
    # Standard deviation of the difference over seeds that examples do not explain.
    seed_sd: float | None
    # Examples compared.
    pairs: int
    clusters: int
    seeds: int
    # SEED -> difference, for a forest plot.
    per_seed: dict[str, float]
    # False: only the metric's values over seeds could be paired (a corpus metric such as BLEU).
    paired_by_example: bool


class SearchedRate(TypedDict):
    learning_rate: float
    # EVAL_LOSS of a run at this rate, or KEPT_ROWS_LOSS: in a search by halving that of the first round.
    metric: str
    # None: the run failed.
    value: float | None
    # Steps of the run; in a search by halving, of the last short run at this rate.
    steps: int | None
    run: str


class RateSearch(TypedDict):
    """A method's learning-rate search, on the first seed."""

    tried: list[SearchedRate]
    chosen: float | None
    at_edge: bool


class MinimumDetectableEffect(TypedDict):
    """The smallest true difference that 80 % of such comparisons would find, from the spreads of the finished runs.

    Before the first run, and with one seed, it follows from assumed spreads.
    """

    metric: str
    # The effect as a share of the metric's value.
    relative: float | None
    # The effect in the metric's unit; None as long as the spreads are assumed.
    absolute: float | None
    seeds: int
    comparisons: int
    # {"seed_sd", "row_sd"} as shares of the metric (0: rows are no sample), if they were assumed.
    assumed: dict[str, float] | None


class DecidingCost(TypedDict):
    """A cost for which methods were not taken: their range lies above that of ``than``."""

    cost: CostName
    methods: list[str]
    than: str


class DecidingRun(TypedDict):
    """The comparison with the fewest further runs that would decide."""

    methods: list[str]
    seeds: int
    # Evaluation rows.
    rows: int
    # Rates to try that were not tried yet.
    learning_rates: list[float]
    # Training runs that are not done yet.
    runs: int
    command: str


class Recommendation(TypedDict):
    # The method to take; as long as nothing is decided, the best so far.
    method: str | None
    decided: bool
    # The method with which the others are compared, and the other methods from which it was chosen.
    best: str | None
    candidates: list[str]
    # Candidates that count as equal to the best one; costs decide between them.
    equals: list[str]
    # Methods that may be better than the best one: too few data, or not tuned.
    open: list[str]
    # Methods that kept what must stay; if there are any, those that lost more of it than the margin are left out.
    kept: list[str]
    forgot: list[str]
    costs: list[DecidingCost]
    # None if it is decided, or if no run of reasonable size would decide.
    deciding: DecidingRun | None
    metric: str
    # Differences below this share of the metric do not matter to the user.
    margin: float
    # {"memory_bytes", "hours"}: the user's limits.
    limits: dict[str, float | None]
    # ``recommended.yaml``, relative to the comparison's folder.
    config: str | None
    command: str | None
    # Id of the best run of the method.
    run: str | None
    # ``best``, a copy of that run's folder, relative to the comparison's folder.
    adapter: str | None


class Conclusions(TypedDict):
    """What follows from the runs."""

    methods: dict[str, Method]
    differences: list[Difference]
    recommendation: Recommendation
    minimum_detectable_effect: MinimumDetectableEffect


class Document(Conclusions):
    """The content of ``comparison.json``."""

    schema: int
    command: str
    settings: JsonObject
    # ISO 8601, UTC.
    created: str
    versions: dict[str, str]
    device: JsonObject
    # The base model as in the runs' records: name, sha256, architecture, parameters, ...
    model: JsonObject
    # {"train": {"source", "sha256", "rows"}, "eval": {...}, "overlap": rows of eval that are also in train}.
    data: JsonObject
    # The metric that decides: verdicts, recommendation. Learning rates are chosen by the evaluation loss.
    primary_metric: str
    confidence: float
    # The unadapted model: {"tasks": {TASK: TaskResult.to_json()}, "folder": relative path | null}.
    base: JsonObject
    warnings: list[Message]
    runs: list[Run]
    learning_rates: dict[str, RateSearch]
    # Of all steps together, each in a process of its own.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The content of a comparison folder, and the place of each run's files."""

    # A Document, as far as its file is intact.
    document: Fields
    folder: Path

    def __getitem__(self, key: str) -> Any:
        return self.document[key]

    @property
    def metric(self) -> str:
        return str(self.document["primary_metric"])

    @property
    def objective(self) -> str:
        """The objective of the runs."""
        return str(self["settings"].get("objective") or "sft")

    @property
    def reference(self) -> str:
        """What the methods' answers are compared with, in words."""
        return "the best constant answer" if self.objective == "classify" else "the base model"

    @property
    def unit(self) -> str:
        """The unit of the primary metric."""
        return unit_of(self.document)

    @property
    def finals(self) -> list[Fields]:
        return [run for run in self["runs"] if run["phase"] == "final" and run["status"] == "finished"]

    def finals_of(self, method: str) -> list[Fields]:
        return [run for run in self.finals if run["method"] == method]

    def is_higher_better(self, metric: str) -> bool:
        """As the methods' records say; by default lower is better for a loss, and higher for other metrics."""
        for facts in self["methods"].values():
            if metric in facts["higher_is_better"]:
                return bool(facts["higher_is_better"][metric])
        return "loss" not in metric and "perplexity" not in metric

    def ranked(self) -> list[str]:
        """Methods with a result, the best first by the primary metric; then the others, in their order."""
        means = {name: facts["mean"].get(self.metric) for name, facts in self["methods"].items()}
        sign = -1 if self.is_higher_better(self.metric) else 1
        known = [name for name, mean in means.items() if is_number(mean)]
        return sorted(known, key=lambda name: sign * means[name]) + [name for name in means if name not in known]

    def with_result(self) -> list[str]:
        return [name for name in self.ranked() if is_number(self["methods"][name]["mean"].get(self.metric))]

    def metrics_of(self, run: Fields) -> list[Fields]:
        """The lines of the run's ``metrics.jsonl``; none when the folder no longer exists."""
        return [line for line in read_metrics(self.place_of(run)) if isinstance(line, Mapping)]

    def place_of(self, run: Fields) -> Path:
        return inside(self.folder, str(run["folder"]))

    def answers_of(self, run: Fields, task: str) -> list[Fields]:
        return read_answers(self.place_of(run), task, run["tasks"].get(task, {}))

    def base_answers(self, task: str) -> list[Fields]:
        base = self["base"]
        if not base.get("folder"):
            return []
        return read_answers(inside(self.folder, str(base["folder"])), task, base.get("tasks", {}).get(task, {}))


def unit_of(document: Fields) -> str:
    """The unit of the primary metric."""
    objective = document["settings"].get("objective") or "sft"
    return "nats per token" if (objective, document["primary_metric"]) == ("sft", EVAL_LOSS) else ""


def load_comparison(folder: Path) -> Comparison:
    """Read ``comparison.json`` of the folder.

    Raises RunError: RW593 no comparison here, RW593 it cannot be read.
    """
    path = folder / COMPARISON_FILE
    if not path.is_file():
        state = f"holds no {COMPARISON_FILE}" if folder.is_dir() else "is not a folder"
        raise RunError("RW593", f"{folder} {state}; give a folder that `rankwise compare` wrote (its --output).")
    try:
        document = read_json(path)
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']!r}, and this version reads {SCHEMA}")
        return Comparison(document, folder)
    except (OSError, ValueError, TypeError, LookupError) as error:
        raise RunError("RW593", f"cannot read {path} as a comparison: {error!r}.") from None


@contextlib.contextmanager
def as_expected(comparison: Comparison) -> Iterator[None]:
    """Raises RunError (RW593) if a part of the comparison has a form that cannot be shown."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        place = comparison.folder
        raise RunError("RW593", f"{place}: a part of the comparison is not as expected ({error!r}).") from error


def inside(folder: Path, relative: str) -> Path:
    """``folder``/``relative``. The relative path comes from a file, so it must not leave the folder.

    Raises RunError (RW593) for an absolute path or one with ``..`` in it.
    """
    parts = PurePosixPath(relative).parts
    if ".." in parts or PurePosixPath(relative).is_absolute() or "\\" in relative or "\x00" in relative:
        raise RunError("RW593", f"{folder / COMPARISON_FILE} names the path {relative!r}, which leaves its folder.")
    return folder.joinpath(*parts)


def read_answers(place: Path, task: str, result: Fields) -> list[Fields]:
    """The examples of one evaluation, one object each; none when the file no longer exists."""
    name = str(result.get("examples") or "predictions.jsonl")
    path = inside(inside(place, f"{EVALUATION_FOLDER}/{task}"), name)
    return list(_objects(path)) if path.is_file() else []


def _objects(path: Path) -> Iterator[Fields]:
    """The JSON objects of a file with one per line. Stops at a line that was cut short by a kill."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                content = parse_json(line)
            except ValueError:
                return
            if isinstance(content, Mapping):
                yield content


def figures_of(runs: Sequence[Fields]) -> JsonObject:
    """The figures of one method from its final runs: means, and the largest memory."""
    good = [run for run in runs if run["status"] == "finished"]
    records = [run["record"] or {} for run in good]
    means = {key: _known(records, key) for key in ("tokens_per_second", "wall_seconds")}
    largest = {
        key: _known(records, key)
        for key in ("peak_memory_bytes", "predicted_peak_memory_bytes", "trainable_parameters")
    }
    costs = {key: _known(records, key) for key in ("wall_seconds", "peak_memory_bytes")}
    return {
        "seeds": len(good),
        "failed": sum(run["status"] == "failed" for run in runs),
        "alone": all(run["alone"] for run in good),
        **{key: fmean(values) if values else None for key, values in means.items()},
        **{key: max(values, default=None) for key, values in largest.items()},
        "adapter_bytes": max(_known(good, "adapter_bytes"), default=None),
        "ranges": {key: [min(values), max(values)] for key, values in costs.items() if values},
    }


def unlike_hardware(runs: Sequence[Fields]) -> str | None:
    """What to warn of if the runs trained on several devices or numbers of threads; None if on one."""
    devices = dict.fromkeys(_hardware((run["record"] or {}).get("device") or {}) for run in runs)
    known = [device for device in devices if device]
    if len(known) < 2:
        return None
    return f"the runs are of different hardware ({'; '.join(known)}): their times, speeds and memory differ."


def _hardware(device: Fields) -> str:
    threads = device.get("threads")
    name = str(device.get("name") or device.get("type") or "")
    return f"{name}, {plural(threads, 'thread')}" if isinstance(threads, int) else name


def _known(items: Sequence[Fields], key: str) -> list[float]:
    return [value for item in items if is_number(value := item.get(key))]

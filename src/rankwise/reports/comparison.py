"""A comparison: the layout of ``report.json``, from which the report is made, and the folder that holds it. No torch.

Times are in seconds, memory and sizes in bytes, speeds in tokens per second. A figure that was not measured is null.
A *metric* is ``eval_loss`` (nats per trained token, lower is better; of preferences their own loss) or ``TASK.METRIC``
(``e2e.BLEU``, ``preference.reward_accuracy``). Differences are ``a - b`` in the metric's own unit; a verdict is about
``a``: "better" says that ``a`` is better than ``b``. Verdicts are fields; ``words.py`` puts them into sentences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, Literal, TypedDict

from rankwise.foreign import Fields, JsonObject
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.records import read_lines, read_metrics

REPORT_FILE = "report.json"
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
TURNED: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}
Retained = Literal["kept", "lost", "cannot tell"]
# The costs that decide between equal methods, in this order; "mean" is the metric itself.
CostName = Literal["wall_seconds", "peak_memory_bytes", "trainable_parameters", "servers", "mean"]


class Message(TypedDict):
    """An error or a warning."""

    code: str
    message: str


# One cell of the matrix, a method at a learning rate with a seed: the fields of its ``run.json`` if it left one, and
#
#   id             name of its folder below ``runs``: METHOD-lrX-seedN, or METHOD-auto-seedN if it searched for its rate
#   learning_rate  None if its search did not end
#   phase          "search": tried a rate that was not chosen; "final": counts for the method's figures
#   status         "finished", "failed", "interrupted" or "skipped"
#   alone          whether no other step could run beside it, so that its time can be compared
#   error          code and message, if it did not finish or was not measured
#   folder         relative to the comparison's folder
#   tasks          {TASK: TaskResult.to_json()}
#   adapter_bytes  size of the weights on disk
Run = JsonObject


class MethodVerdict(TypedDict):
    """A method against the best one on the primary metric: the verdict of their difference."""

    verdict: Verdict | Literal["best"]
    # Corrected for ``comparisons``; None without a test.
    p_value: float | None
    # The tuned methods but one: only these comparisons can call the best method worse (Hsu 1984). With --time: the
    # pairs, divided by the share of the error that the call which added the method may spend.
    comparisons: float


class Retention(TypedDict):
    """What a method kept of the retained rows (``--retain``), against the base."""

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
    comparisons: float
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
    retained: Retention | None
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
    comparisons: float
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
    """The smallest true difference that 80 % of such comparisons would find, from the spreads of the finished runs;
    None before two methods have two common seeds."""

    metric: str
    # The effect as a share of the metric's value.
    relative: float | None
    # The effect in the metric's unit.
    absolute: float | None
    seeds: int
    comparisons: float


class DecidingCost(TypedDict):
    """A cost for which methods were not taken: their range lies above that of ``than``."""

    cost: CostName
    methods: list[str]
    than: str


class DecidingRun(TypedDict):
    """The comparison with the fewest further runs that would decide, or one of longer runs, which may."""

    methods: list[str]
    seeds: int
    # Evaluation rows.
    rows: int
    # Rates to try that were not tried yet.
    learning_rates: list[float]
    # Twice the steps: no number of seeds or rows that is proposed would decide.
    is_longer: bool
    # Training runs that are not done yet.
    runs: int
    command: str


class Recommendation(TypedDict):
    # The method to take; as long as nothing is decided, the cheapest of the best so far and those as good as it.
    method: str
    decided: bool
    # The method with which the others are compared, and the other methods from which it was chosen.
    best: str
    candidates: list[str]
    # Candidates that count as equal to the best one; costs decide between them.
    equals: list[str]
    # Methods that may be better than the best one: too few data, or not tuned.
    open: list[str]
    # Methods that kept their level on the retained rows; if there are any, those that lost more are left out.
    kept: list[str]
    forgot: list[str]
    costs: list[DecidingCost]
    # None if it is decided.
    deciding: DecidingRun | None
    metric: str
    # Differences below this share of the metric do not matter to the user.
    margin: float
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


class Standing(TypedDict):
    """What a comparison with --time saw at one look."""

    seeds: int
    # Of all runs until then.
    run_seconds: float
    # From the one that is best now, of methods with as many seeds; the intervals hold for all looks together.
    differences: list[Difference]


class Document(Conclusions):
    """The content of ``report.json``."""

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
    # By looks; empty without --time.
    standings: list[Standing]
    # Of all steps together, each in a process of its own.
    seconds: float


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A Document, and the folder of its runs."""

    document: Fields
    folder: Path

    def __getitem__(self, key: str) -> Any:
        return self.document[key]

    @property
    def metric(self) -> str:
        return str(self.document["primary_metric"])

    @property
    def objective(self) -> ObjectiveName:
        return self["settings"]["objective"]

    @property
    def reference(self) -> str:
        """What the methods' answers are compared with, in words."""
        return "the best constant answer" if OBJECTIVES[self.objective].of_labels else "the base model"

    @property
    def finals(self) -> list[Fields]:
        return [run for run in self["runs"] if run["phase"] == "final" and run["status"] == "finished"]

    def is_higher_better(self, metric: str) -> bool:
        return any(facts["higher_is_better"].get(metric, False) for facts in self["methods"].values())

    def ranked(self) -> list[str]:
        """Methods with a result, the best first by the primary metric."""
        means = {name: facts["mean"].get(self.metric) for name, facts in self["methods"].items()}
        known = [name for name, mean in means.items() if mean is not None]
        return sorted(known, key=lambda name: means[name], reverse=self.is_higher_better(self.metric))

    def differences_from_best(self) -> list[Fields]:
        """The differences of the best method on the primary metric, the better mean first, in the order of ranks."""
        ranks, found = self.ranked(), []
        for item in self["differences"]:
            if item["metric"] == self.metric and self["recommendation"]["best"] in (item["a"], item["b"]):
                is_turned = item["difference"] < 0 if self.is_higher_better(self.metric) else item["difference"] > 0
                found.append(_turned(item) if is_turned else item)
        return sorted(found, key=lambda item: (ranks.index(item["a"]), ranks.index(item["b"])))

    def metrics_of(self, run: Fields) -> list[Fields]:
        """The lines of the run's ``metrics.jsonl``."""
        return list(read_metrics(self.folder / run["folder"]))

    def answers_of(self, run: Fields, task: str) -> dict[str, Fields]:
        """{id: example} of a run, or of the base, on a task."""
        if task not in run["tasks"]:
            return {}
        path = self.folder / run["folder"] / EVALUATION_FOLDER / task / run["tasks"][task]["examples"]
        rows: Iterator[Fields] = read_lines(path, "RW571", "remove the file")
        return {row["id"]: row for row in rows}


def _turned(item: Fields) -> JsonObject:
    """``b - a`` in the place of ``a - b``."""
    interval = item["interval"] and [-bound for bound in reversed(item["interval"])]
    return {
        **item,
        "a": item["b"],
        "b": item["a"],
        "difference": -item["difference"],
        "interval": interval,
        "per_seed": {seed: -value for seed, value in item["per_seed"].items()},
        "verdict": TURNED.get(item["verdict"], item["verdict"]),
    }


def unit_of(document: Fields) -> str:
    """The unit of the primary metric."""
    is_per_token = OBJECTIVES[document["settings"]["objective"]].of_demonstrations
    return "nats per token" if is_per_token and document["primary_metric"] == EVAL_LOSS else ""


MEANS = ("tokens_per_second", "wall_seconds")
LARGEST = ("peak_memory_bytes", "predicted_peak_memory_bytes", "trainable_parameters", "adapter_bytes")
RANGES = ("wall_seconds", "peak_memory_bytes")


def figures_of(runs: Sequence[Fields]) -> JsonObject:
    """The figures of one method from its final runs: means, and the largest memory."""
    good = [run for run in runs if run["status"] == "finished"]
    known = {key: [run[key] for run in good if run.get(key) is not None] for key in (*MEANS, *LARGEST)}
    return {
        "seeds": len(good),
        "failed": sum(run["status"] == "failed" for run in runs),
        "alone": all(run["alone"] for run in good),
        **{key: fmean(known[key]) if known[key] else None for key in MEANS},
        **{key: max(known[key], default=None) for key in LARGEST},
        "ranges": {key: [min(known[key]), max(known[key])] for key in RANGES if known[key]},
    }

"""The layout of ``comparison.json``, the one file that reports are made from. Imports no torch.

Times are in seconds, memory and sizes in bytes, speeds in tokens per second. A figure that was not measured is null.
A *metric* is ``eval_loss`` (nats per trained token, lower is better; of preferences their own loss) or ``TASK.METRIC``
(``e2e.BLEU``, ``preference.reward_accuracy``). Differences are ``a - b`` in the metric's own unit; a verdict is about
``a``: "better" says that ``a`` is better than ``b``.
"""

from __future__ import annotations

from typing import Any, Literal, TypedDict

SCHEMA = 1
COMPARISON_FILE = "comparison.json"
RECOMMENDED_FILE = "recommended.yaml"
RUNS_FOLDER = "runs"
BEST_FOLDER = "best"
MERGED_FOLDER = "merged"
EVALUATION_FOLDER = "evaluation"
EVAL_LOSS = "eval_loss"

Phase = Literal["search", "final"]
Status = Literal["finished", "failed", "interrupted", "skipped"]
Verdict = Literal["better", "worse", "equivalent", "cannot tell"]
Goal = Literal["best quality", "within limits"]


class Message(TypedDict):
    """An error or a warning."""

    code: str
    message: str


class MergedCheck(TypedDict):
    """The "no inference cost" claim, measured. Speeds are of greedy generation."""

    max_logit_difference: float | None
    # Largest absolute difference of a logit, merged against unmerged, on evaluation rows.
    rounding_logit_difference: float | None
    # The same of the merged model against its own weights computed in the next wider dtype.
    is_more_than_rounding: bool | None
    # Whether the first cannot be explained by the second.
    generate_tokens_per_second_merged: float | None
    generate_tokens_per_second_unmerged: float | None


class Run(TypedDict):
    """One cell of the matrix: a method at a learning rate with a seed."""

    id: str
    # Name of its folder below ``runs``: METHOD-lrX-seedN.
    method: str
    seed: int
    learning_rate: float
    phase: Phase
    # "search": tried a learning rate that was not chosen; "final": counts for the method's figures.
    status: Status
    error: Message | None
    # Why it failed, was interrupted or was skipped.
    folder: str
    # Relative to the comparison's folder, with forward slashes.
    record: dict[str, Any] | None
    # RunRecord.to_json() of the run; None when it left none.
    tasks: dict[str, dict[str, Any]]
    # TASK -> TaskResult.to_json(); ``examples`` in it is relative to ``folder``/evaluation/TASK.
    adapter_bytes: int | None
    # Of the adapter's weights on disk; for ``full`` the whole model's.
    merged: MergedCheck | None
    update_norms: dict[str, float] | None
    # Module path -> 2-norm of its weight update relative to the weight, or of the update where that is not known.
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    predicted_peak_memory_bytes: int | None
    wall_seconds: float | None
    # These four repeat the record's, for tables.


class Method(TypedDict):
    """A method over its final runs. ``interval`` is None with one seed: then no interval can be given."""

    mean: dict[str, float]
    # METRIC -> mean over seeds.
    interval: dict[str, list[float] | None]
    # METRIC -> 95 % t-interval of that mean over seeds [low, high].
    seed_sd: dict[str, float | None]
    # METRIC -> standard deviation over seeds.
    per_seed: dict[str, dict[str, float]]
    # METRIC -> SEED -> value.
    higher_is_better: dict[str, bool]
    seeds: int
    # Final runs that finished.
    failed: int
    learning_rate: float | None
    learning_rate_at_edge: bool
    # The best rate tried is the lowest or the highest of several tried.
    tokens_per_second: float | None
    examples_per_second: float | None
    peak_memory_bytes: int | None
    predicted_peak_memory_bytes: int | None
    wall_seconds: float | None
    # Means over the final runs; memory: the largest.
    ranges: dict[str, list[float]]
    # "wall_seconds", "peak_memory_bytes" -> [lowest, highest] over the final runs.
    trainable_parameters: int | None
    adapter_bytes: int | None
    group: str | None
    # Letters of the tie groups that it is in ("a", "ab"): of two methods that share a letter neither was found better
    # on the primary metric. "a" is the best. None without a finished run.
    pareto: bool
    # Not beaten in quality, memory and time at once.
    serving: list[str]
    # Where its result can be served, in words.
    skipped: str | None
    # Why it was not run.


class Difference(TypedDict):
    """Two methods on one metric, paired by example and by seed. Intervals are 95 %."""

    a: str
    b: str
    metric: str
    difference: float
    interval: list[float] | None
    # None with one seed: then the seeds' share of the error is not known.
    standard_error: float | None
    p_value: float | None
    p_value_holm: float | None
    # Corrected over all pairs of the metric by Holm's method.
    equivalence_p: float | None
    # Larger p-value of the two one-sided tests against ``margin``, uncorrected.
    equivalence_p_holm: float | None
    # Corrected over all pairs of the metric by Holm's method; decides whether they are called equivalent.
    margin: float
    verdict: Verdict
    seed_sd: float | None
    # Seeds' own component: standard deviation of the difference from seed to seed that examples do not explain.
    example_se: float | None
    # Standard error of the mean over examples, by clusters.
    pairs: int
    # Examples compared.
    clusters: int
    seeds: int
    per_seed: dict[str, float]
    # SEED -> difference, for a forest plot.
    paired_by_example: bool
    # False: only the metric's values over seeds could be paired (a corpus metric such as BLEU).


class SearchedRate(TypedDict):
    learning_rate: float
    metric: str
    value: float | None
    # None: the run failed.
    steps: int | None
    run: str


class RateSearch(TypedDict):
    """A method's learning-rate search, on the first seed."""

    tried: list[SearchedRate]
    chosen: float | None
    at_edge: bool


class MinimumDetectableEffect(TypedDict):
    """The smallest true difference that 80 % of such comparisons would find, from the spreads of the finished runs.

    Before the first run it follows from assumed spreads. With one seed nothing better is known.
    """

    metric: str
    relative: float | None
    # As a share of the metric's value.
    absolute: float | None
    # None as long as the spreads are assumed.
    seeds: int
    comparisons: int
    power: float
    assumption: str
    # The spread that was assumed, and where it comes from.


class ParetoPoint(TypedDict):
    method: str
    quality: float
    peak_memory_bytes: float | None
    wall_seconds: float | None


class Recommendation(TypedDict):
    method: str | None
    reason: str
    # One sentence with the method's name.
    why: str
    # The same without the name, for pages on which the name stands above it.
    config: str | None
    # ``recommended.yaml``, relative to the comparison's folder.
    command: str | None
    run: str | None
    # Id of the best run of the method.
    adapter: str | None
    # Its folder, relative.
    merged: str | None
    goal: str
    metric: str
    limits: dict[str, float | None]
    # {"memory_bytes", "hours"}: the user's limits.
    ties: list[str]
    # Other methods that no test found worse.
    pareto: list[ParetoPoint]


class Comparison(TypedDict):
    schema: int
    command: str
    settings: dict[str, Any]
    created: str
    # ISO 8601, UTC.
    versions: dict[str, str]
    device: dict[str, Any]
    model: dict[str, Any]
    # The base model as in the runs' records: name, sha256, architecture, parameters, ...
    data: dict[str, Any]
    # {"train": {"source", "sha256", "rows"}, "eval": {...}, "overlap": rows of eval that stand in train}.
    primary_metric: str
    # The metric that decides: learning rates, tie groups, recommendation.
    confidence: float
    base: dict[str, Any]
    # The unadapted model: {"tasks": {TASK: TaskResult.to_json()}, "folder": relative path | null}.
    warnings: list[Message]
    runs: list[Run]
    methods: dict[str, Method]
    differences: list[Difference]
    recommendation: Recommendation
    minimum_detectable_effect: MinimumDetectableEffect
    learning_rates: dict[str, RateSearch]
    seconds: dict[str, float]
    # {"total", "runs", "overhead"}: of all invocations together.

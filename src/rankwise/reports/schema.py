"""The layout of ``comparison.json``, the one file that reports are made from. Imports no torch.

Times are in seconds, memory and sizes in bytes, speeds in tokens per second. A figure that was not measured is null.
A *metric* is ``eval_loss`` (nats per trained token, lower is better; of preferences their own loss) or ``TASK.METRIC``
(``e2e.BLEU``, ``preference.reward_accuracy``). Differences are ``a - b`` in the metric's own unit; a verdict is about
``a``: "better" says that ``a`` is better than ``b``.
"""

from __future__ import annotations

from typing import Literal, TypedDict

from rankwise.foreign import JsonObject

SCHEMA = 1
COMPARISON_FILE = "comparison.json"
RECOMMENDED_FILE = "recommended.yaml"
RUNS_FOLDER = "runs"
BEST_FOLDER = "best"
MERGED_FOLDER = "merged"
EVALUATION_FOLDER = "evaluation"
EVAL_LOSS = "eval_loss"
# Loss on training rows that a search of the learning rate withheld from its short runs.
KEPT_ROWS_LOSS = "kept_rows_loss"

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

    # Largest absolute difference of a logit, merged against unmerged, on evaluation rows.
    max_logit_difference: float | None
    # The same of the merged model against its own weights computed in the next wider dtype.
    rounding_logit_difference: float | None
    # Whether the first cannot be explained by the second.
    is_more_than_rounding: bool | None
    generate_tokens_per_second_merged: float | None
    generate_tokens_per_second_unmerged: float | None


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
    merged: MergedCheck | None
    # Module path -> 2-norm of its weight update relative to the weight, or of the update where that is not known.
    update_norms: dict[str, float] | None
    # These four repeat the record's, for tables.
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    predicted_peak_memory_bytes: int | None
    wall_seconds: float | None


class Method(TypedDict):
    """A method over its final runs. ``interval`` is None with one seed: then no interval can be given."""

    # METRIC -> mean over seeds.
    mean: dict[str, float]
    # METRIC -> 95 % t-interval of that mean over seeds [low, high].
    interval: dict[str, list[float] | None]
    # METRIC -> standard deviation over seeds.
    seed_sd: dict[str, float | None]
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
    examples_per_second: float | None
    peak_memory_bytes: int | None
    predicted_peak_memory_bytes: int | None
    wall_seconds: float | None
    # "wall_seconds", "peak_memory_bytes" -> [lowest, highest] over the final runs.
    ranges: dict[str, list[float]]
    trainable_parameters: int | None
    adapter_bytes: int | None
    # Letters of the tie groups that it is in ("a", "ab"): of two methods that share a letter neither was found better
    # on the primary metric. "a" is the best. None without a finished run.
    group: str | None
    # Whether no method dominates it: none is as good in quality, memory and time, and better in one of them.
    pareto: bool
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
    # Corrected over all pairs of the metric by Holm's method.
    p_value_holm: float | None
    # Larger p-value of the two one-sided tests against ``margin``, uncorrected.
    equivalence_p: float | None
    # Corrected over all pairs of the metric by Holm's method; decides whether they are called equivalent.
    equivalence_p_holm: float | None
    margin: float
    verdict: Verdict
    # Standard deviation of the difference over seeds that examples do not explain.
    seed_sd: float | None
    # Standard error of the mean over examples, by clusters.
    example_se: float | None
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
    power: float
    # The spread that was assumed, and where it comes from.
    assumption: str


class ParetoPoint(TypedDict):
    method: str
    quality: float
    peak_memory_bytes: float | None
    wall_seconds: float | None


class Recommendation(TypedDict):
    method: str | None
    # One sentence with the method's name.
    reason: str
    # The same without the name, for pages that show the name as a heading.
    why: str
    # ``recommended.yaml``, relative to the comparison's folder.
    config: str | None
    command: str | None
    # Id of the best run of the method.
    run: str | None
    # ``best``, a copy of that run's folder; ``merged``, if it was merged. Relative to the comparison's folder.
    adapter: str | None
    merged: str | None
    goal: str
    metric: str
    # {"memory_bytes", "hours"}: the user's limits.
    limits: dict[str, float | None]
    # Other methods that no test found worse.
    ties: list[str]
    pareto: list[ParetoPoint]


class Comparison(TypedDict):
    schema: int
    command: str
    settings: JsonObject
    # ISO 8601, UTC.
    created: str
    versions: dict[str, str]
    device: JsonObject
    # The base model as in the runs' records: name, sha256, architecture, parameters, ...
    model: JsonObject
    # {"train": {"source", "sha256", "rows"}, "eval": {...}, "overlap": rows of eval that stand in train}.
    data: JsonObject
    # The metric that decides: tie groups, recommendation. Learning rates are chosen by the evaluation loss.
    primary_metric: str
    confidence: float
    # The unadapted model: {"tasks": {TASK: TaskResult.to_json()}, "folder": relative path | null}.
    base: JsonObject
    warnings: list[Message]
    runs: list[Run]
    methods: dict[str, Method]
    differences: list[Difference]
    recommendation: Recommendation
    minimum_detectable_effect: MinimumDetectableEffect
    learning_rates: dict[str, RateSearch]
    # {"total", "runs", "overhead"}: of all invocations together.
    seconds: dict[str, float]

"""The recommendation: the first method for the goal that fits, with the settings that make it fit at the least cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from rankwise.config import FOUR_BITS
from rankwise.foreign import Fields, JsonObject
from rankwise.planning.changes import Advisor, Change, SingleChange, possible_steps
from rankwise.planning.rules import PAGED, Rule, Situation, reasons
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload
from rankwise.serving import served

# {goal: order in which methods are tried}. Full fine-tuning is recommended only where no other method was given.
ORDER = {
    "speed": ("lora", "qlora", "dora", "qdora", "full"),
    "quality": ("dora", "qdora", "lora", "qlora", "full"),
    "serving": ("lora", "qlora", "dora", "qdora", "full"),
}

FOUR_BIT_SETTINGS = ("quant_type", "block_size", "double_quant")

# Groups of changes that are allowed in each pass, least invasive first. Every method is tried before the next pass.
PASSES: tuple[frozenset[str], ...] = (
    frozenset({"batch", "checkpointing"}),
    frozenset({"batch", "checkpointing", "offloading", "optimizer"}),
    frozenset({"batch", "checkpointing", "offloading", "optimizer", "rank", "length"}),
)


@dataclasses.dataclass(frozen=True)
class Recommendation:
    """``settings`` are the options of ``rankwise train`` that differ from the defaults or were given."""

    # None where nothing fits.
    method: str | None
    settings: JsonObject
    # The estimate of the recommended run, or of the smallest one where nothing fits.
    estimate: MemoryEstimate
    workload: Workload
    time_factor: float
    reasons: tuple[Rule, ...]
    # Where nothing fits: the memory that the smallest run lacks.
    missing_bytes: int = 0
    # Whether the run fits only without its expected error, and no smaller run fits with it.
    is_tight: bool = False

    @property
    def serving(self) -> tuple[str, ...]:
        return () if self.method is None else served(self.method, dataclasses.asdict(self.workload))

    def to_json(self) -> JsonObject:
        return {
            "method": self.method,
            "settings": self.settings,
            "peak_bytes": self.estimate.peak_bytes,
            "error": self.estimate.error,
            "reasons": [rule.to_json() for rule in self.reasons],
            "serving": list(self.serving),
            "missing_bytes": self.missing_bytes,
            "tight": self.is_tight,
        }


@dataclasses.dataclass(frozen=True)
class Wish:
    """The user's wishes other than the step. ``given``: the settings to return, to which changes are added."""

    goal: str
    given: Fields
    accumulation: int = 1
    # The model has experts.
    is_mixture: bool = False


def recommend(
    advisor: Advisor,
    methods: Sequence[str],
    workload: Workload,
    wish: Wish,
    passes: Sequence[frozenset[str]] = PASSES,
) -> Recommendation:
    """The first method in the goal's order that fits, with the fewest changes. Where none fits with its expected error,
    the first that fits without it.
    """
    accumulation = wish.accumulation
    order = [method for method in ORDER[wish.goal] if method in methods]
    gentle: dict[str, bool] = {}
    # The last pass has hundreds of combinations. Where the smallest run is too large, all of them are.
    runs = {method: _smallest(advisor, method, workload, accumulation, passes[-1]) for method in order}
    smallest = {method: run.estimate.peak_bytes for method, run in runs.items()}
    for verdict, allowed in itertools.product(("fits", "tight"), passes):
        for method in order:
            is_hopeless = len(passes) > 1 and allowed is passes[-1] and smallest[method] > advisor.memory_bytes
            change = None if is_hopeless else _fastest(advisor, method, workload, accumulation, allowed, verdict)
            gentle.setdefault(method, change is not None)
            if change is not None:
                return _explained(change, method, gentle, wish)
    return _nothing_fits(advisor, min(runs.values(), key=lambda run: run.estimate.peak_bytes))


def _fastest(
    advisor: Advisor, method: str, workload: Workload, accumulation: int, allowed: frozenset[str], verdict: str
) -> Change | None:
    """The combination with this verdict that loses least quality, and among these the fastest; None without any."""
    found: list[Change] = []
    for steps in _combinations(method, workload, accumulation, allowed):
        change = advisor.price(steps, method, workload)
        if change.verdict == verdict:
            found.append(change)
            if not steps and accumulation == 1:
                return change
    return min(found, key=_loss, default=None)


def _combinations(
    method: str, workload: Workload, accumulation: int, allowed: frozenset[str]
) -> Iterator[tuple[SingleChange, ...]]:
    steps = [step for step in possible_steps(method, workload, accumulation) if step.group in allowed]
    steps += list(_larger_batches(workload, accumulation))
    groups: dict[str, list[SingleChange | None]] = {}
    for step in steps:
        groups.setdefault(step.group, [None]).append(step)
    for chosen in itertools.product(*groups.values()):
        yield tuple(step for step in chosen if step is not None)


def _larger_batches(workload: Workload, accumulation: int) -> Iterator[SingleChange]:
    """Fewer, larger micro-batches with the same rows per step, which are faster where they fit."""
    rows, times = workload.batch_size, accumulation
    while times > 1 and times % 2 == 0:
        rows, times = rows * 2, times // 2
        settings = {"batch_size": rows, "gradient_accumulation": times}
        yield SingleChange("batch", f"batch {workload.batch_size} -> {rows}", 0, settings)


def _loss(change: Change) -> tuple[float, ...]:
    costs = [step.costs for step in change.steps]
    length = change.workload.max_length
    time = (not change.is_timed, change.time_factor)
    return (max(costs, default=0), sum(costs), -length, *time, len(costs), -change.workload.batch_size)


def _explained(change: Change, method: str, fits: Mapping[str, bool], wish: Wish) -> Recommendation:
    settings = {**wish.given, **change.settings, "method": method}
    if method not in FOUR_BITS:
        settings = {name: value for name, value in settings.items() if name not in FOUR_BIT_SETTINGS}
    changed = frozenset(change.settings)
    situation = Situation(method, wish.goal, dict(fits), settings, changed, wish.accumulation, wish.is_mixture)
    return Recommendation(
        method,
        settings,
        change.estimate,
        change.workload,
        change.time_factor,
        tuple(reasons(situation)),
        is_tight=change.verdict == "tight",
    )


def _smallest(advisor: Advisor, method: str, workload: Workload, accumulation: int, allowed: frozenset[str]) -> Change:
    """The run with every saving switched on."""
    last: dict[str, SingleChange] = {}
    for step in possible_steps(method, workload, accumulation):
        if step.group in allowed and step.settings.get("optimizer", PAGED) == PAGED:
            last[step.group] = step
    return advisor.price(tuple(last.values()), method, workload)


def _nothing_fits(advisor: Advisor, smallest: Change) -> Recommendation:
    """The recommendation where nothing fits, with the memory that the smallest run needs."""
    missing = max(0, smallest.estimate.peak_bytes - advisor.memory_bytes)
    own, work, time = smallest.estimate, smallest.workload, smallest.time_factor
    return Recommendation(None, {}, own, work, time, (), missing)

"""Changes that make a run smaller, each with its saving and its cost, and the cheapest ones that fit.

``costs``: 0 only time, 1 an approximation (4-bit weights, 8-bit states), 2 fewer trained parameters, 3 shorter rows.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Container, Iterable, Iterator, Sequence

from rankwise.config import FOUR_BITS
from rankwise.foreign import Fields, JsonObject
from rankwise.planning.fitting import Estimator, verdict_of
from rankwise.planning.rules import HOSTED, PAGED
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload

# (estimate, workload) -> seconds of one micro-batch; only ratios are used.
Seconds = Callable[[MemoryEstimate, Workload], float]

FOUR_BIT_OF = {"lora": "qlora", "dora": "qdora", "full": "lora"}
# Share of the memory that a change must save to be shown.
WORTHWHILE = 0.02
# Largest number of combinations that a search estimates.
LARGEST_SEARCH = 400


@dataclasses.dataclass(frozen=True)
class SingleChange:
    """One changed setting. A combination has at most one change of each ``group``."""

    group: str
    label: str
    costs: int
    # Options of ``rankwise train``, including "method".
    settings: Fields


@dataclasses.dataclass(frozen=True)
class Change:
    """Several single changes together, with their cost and the memory that they save."""

    steps: tuple[SingleChange, ...]
    method: str
    workload: Workload
    estimate: MemoryEstimate
    # Negative where the change takes more memory.
    saved_bytes: int
    # Ratio of the times for the same rows.
    time_factor: float
    verdict: str

    @property
    def is_timed(self) -> bool:
        """Whether ``time_factor`` covers the whole step; the time of an optimizer on the host is not counted."""
        return not any(step.settings.get("optimizer") == HOSTED for step in self.steps)

    @property
    def time_words(self) -> str:
        """``+9 % time``."""
        text = f"{round((self.time_factor - 1) * 100):+d} % time"
        if self.is_timed:
            return text
        uncounted = "that of the optimizer's step on the host not counted"
        return f"time not counted ({HOSTED} steps on the host)" if text.startswith("+0 ") else f"{text}, {uncounted}"

    @property
    def label(self) -> str:
        return " and ".join(step.label for step in self.steps)

    @property
    def costs(self) -> int:
        return max(step.costs for step in self.steps)

    @property
    def settings(self) -> JsonObject:
        return {name: value for step in self.steps for name, value in step.settings.items()}

    def to_json(self) -> JsonObject:
        return {
            "change": self.label,
            "settings": self.settings,
            "peak_bytes": self.estimate.peak_bytes,
            "saved_bytes": self.saved_bytes,
            "time_factor": self.time_factor,
            "time_is_counted": self.is_timed,
            "verdict": self.verdict,
        }


def possible_steps(method: str, workload: Workload, accumulation: int) -> list[SingleChange]:
    """Every single change that makes this run smaller. Halving the batch doubles the accumulation, so that the rows of
    a step do not change.
    """
    return [
        *_batches(workload, accumulation),
        *_recomputing(workload),
        *_optimizers(method, workload),
        *_approximations(method),
        *_smaller_adapters(method, workload),
        *_shorter_rows(workload),
    ]


def _batches(workload: Workload, accumulation: int) -> Iterator[SingleChange]:
    rows, times = workload.batch_size, 1
    while rows > 1 and rows % 2 == 0:
        rows, times = rows // 2, times * 2
        settings = {"batch_size": rows, "gradient_accumulation": accumulation * times}
        yield SingleChange("batch", f"batch {workload.batch_size} -> {rows}", 0, settings)
    if rows > 1:
        settings = {"batch_size": 1, "gradient_accumulation": accumulation * workload.batch_size}
        yield SingleChange("batch", f"batch {workload.batch_size} -> 1", 0, settings)


def _recomputing(workload: Workload) -> Iterator[SingleChange]:
    if not workload.gradient_checkpointing:
        yield SingleChange("checkpointing", "gradient checkpointing", 0, {"gradient_checkpointing": True})
    if not workload.activation_offloading and workload.device_type != "cpu":
        yield SingleChange("offloading", "activation offloading", 0, {"activation_offloading": True})


def _optimizers(method: str, workload: Workload) -> Iterator[SingleChange]:
    if workload.device_type == "cpu" or workload.optimizer not in ("adamw_torch", "adamw_torch_fused"):
        return
    yield SingleChange("optimizer", f"optimizer {PAGED}", 1, {"optimizer": PAGED})
    if method == "full":
        yield SingleChange("optimizer", f"optimizer {HOSTED}", 0, {"optimizer": HOSTED})


def _approximations(method: str) -> Iterator[SingleChange]:
    if method in FOUR_BIT_OF:
        other = FOUR_BIT_OF[method]
        yield SingleChange("method", f"{method} -> {other}", 1 if other in FOUR_BITS else 2, {"method": other})
    if method == "full":
        yield SingleChange("method", "full -> qlora", 2, {"method": "qlora"})


def reachable(methods: Iterable[str]) -> set[str]:
    """These methods, and those into which a change may turn them."""
    found = set(methods)
    while more := {FOUR_BIT_OF[method] for method in found if method in FOUR_BIT_OF} - found:
        found |= more
    return found


def _smaller_adapters(method: str, workload: Workload) -> Iterator[SingleChange]:
    if method == "full":
        return
    if workload.r > 8:
        yield SingleChange(
            "rank", f"r {workload.r} -> 8", 2, {"r": 8, "lora_alpha": workload.lora_alpha * 8 / workload.r}
        )


def _shorter_rows(workload: Workload) -> Iterator[SingleChange]:
    length = workload.max_length
    while length > 256:
        length //= 2
        yield SingleChange("length", f"max-length {workload.max_length:,} -> {length:,}", 3, {"max_length": length})


def apply(steps: Sequence[SingleChange], method: str, workload: Workload) -> tuple[str, Workload]:
    """The method and the workload with these changes."""
    settings = {name: value for step in steps for name, value in step.settings.items()}
    fields = {name: value for name, value in settings.items() if name in Workload.__dataclass_fields__}
    return settings.get("method", method), dataclasses.replace(workload, **fields)


# Offered for a run with --no-fast on a device that supports the fused operators.
FAST = SingleChange("fast", "--no-fast -> --fast", 0, {"fast": True})


class Advisor:
    """Evaluates changes of a run (``method`` at ``workload`` with ``accumulation``) against ``memory_bytes``.

    ``asked_slow``: the user gave --no-fast, which the advice may revert.
    """

    def __init__(self, estimate: Estimator, seconds: Seconds, memory_bytes: int, *, asked_slow: bool = False) -> None:
        self.estimate, self.seconds, self.memory_bytes = estimate, seconds, memory_bytes
        self.asked_slow = asked_slow

    def _steps(self, method: str, workload: Workload, accumulation: int) -> list[SingleChange]:
        steps = possible_steps(method, workload, accumulation)
        return [*steps, FAST] if self.asked_slow else steps

    def price(self, steps: Sequence[SingleChange], method: str, workload: Workload) -> Change:
        before = self.estimate(method, workload)
        changed_method, changed = apply(steps, method, workload)
        after = self.estimate(changed_method, changed)
        return Change(
            steps=tuple(steps),
            method=changed_method,
            workload=changed,
            estimate=after,
            saved_bytes=before.peak_bytes - after.peak_bytes,
            time_factor=self._row_seconds(after, changed) / self._row_seconds(before, workload),
            verdict=verdict_of(after, self.memory_bytes),
        )

    def _row_seconds(self, estimate: MemoryEstimate, workload: Workload) -> float:
        return self.seconds(estimate, workload) / workload.batch_size

    def singles(
        self,
        method: str,
        workload: Workload,
        accumulation: int,
        groups: Container[str] | None = None,
        refused: Container[str] = (),
    ) -> list[Change]:
        """Each useful single change: of each group the first that fits, or else the one that saves most.

        ``groups``: limits the groups, where estimates are slow. ``refused``: methods that cannot be planned.
        """
        steps = [
            step
            for step in self._steps(method, workload, accumulation)
            if step.settings.get("method") is None or step.settings["method"] not in refused
        ]
        changes = [self.price([step], method, workload) for step in steps if groups is None or step.group in groups]
        chosen = []
        for _, group in itertools.groupby(changes, key=lambda change: change.steps[0].group):
            members = list(group)
            fitting = [change for change in members if change.verdict == "fits"]
            chosen.append(fitting[0] if fitting else members[-1])
        worthwhile = [change for change in chosen if change.saved_bytes > WORTHWHILE * self.memory_bytes]
        return sorted(worthwhile, key=_price_of)

    def cheapest(self, method: str, workload: Workload, accumulation: int, count: int = 3) -> list[Change]:
        """The ``count`` cheapest changes or combinations that fit, by increasing cost.

        A combination that contains one already found is left out.
        """
        groups = _grouped(self._steps(method, workload, accumulation))
        found: list[Change] = []
        candidates = sorted(_combinations(groups), key=_effort)
        for steps in candidates[:LARGEST_SEARCH]:
            if any({step.group for step in change.steps} <= {step.group for step in steps} for change in found):
                continue
            change = self.price(steps, method, workload)
            if change.verdict == "fits":
                found.append(change)
            if len(found) > 2 * count:
                break
        return sorted(found, key=_price_of)[:count]


def _grouped(steps: Sequence[SingleChange]) -> list[list[SingleChange]]:
    groups: dict[str, list[SingleChange]] = {}
    for step in steps:
        groups.setdefault(step.group, []).append(step)
    return list(groups.values())


def _combinations(groups: Sequence[Sequence[SingleChange]]) -> Iterator[tuple[SingleChange, ...]]:
    """Combinations of up to four changes from different groups."""
    for size in range(1, min(4, len(groups)) + 1):
        for chosen in itertools.combinations(groups, size):
            yield from itertools.product(*chosen)


def _effort(steps: Sequence[SingleChange]) -> tuple[int, int, int]:
    """Sort key: changes that keep the result come first, then those that touch few settings."""
    return max(step.costs for step in steps), len(steps), sum(step.costs for step in steps)


def _price_of(change: Change) -> tuple[float, ...]:
    """Sort key: first the loss of quality, then the time (an unknown time last), then the number of settings
    touched.
    """
    return (change.costs, not change.is_timed, change.time_factor, len(change.steps), -change.saved_bytes)

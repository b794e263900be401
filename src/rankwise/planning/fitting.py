"""Whether a run fits, by how much, and the largest batch and longest row that fit, for any estimator."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal, Protocol

from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.workload import Workload

Verdict = Literal["fits", "tight", "too big"]

MOST_ROWS = 4096
MOST_TOKENS = 1 << 20
# Tokens per row, and rows, of the dry runs between which ``Interpolating`` interpolates.
LINE_TOKENS, LINE_ROWS = 512, (1, 8, 64, 512)
UNCOUNTED_CACHE = "keys and values of the answers that are generated together are not counted for this architecture"
# Error of a line: attention masks, for example, grow quadratically.
LINE_ERROR = 0.15


class Estimator(Protocol):
    """(method, workload) -> peak memory on the planned model."""

    def __call__(self, method: str, workload: Workload) -> MemoryEstimate: ...


class Remembering:
    """An estimator that caches its results. ``anchor`` scales the results of a method to a better estimate.

    A dry run takes seconds and a search needs dozens of estimates, so the search uses the closed form, scaled for each
    method by the ratio of both at the given settings.
    """

    def __init__(self, estimate: Estimator) -> None:
        self._estimate = estimate
        self._known: dict[tuple[str, str], MemoryEstimate] = {}
        self._scale: dict[str, float] = {}

    def anchor(self, method: str, workload: Workload, better: MemoryEstimate) -> None:
        """Scale the results for ``method`` so that the result at ``workload`` is ``better``."""
        own = self(method, workload)
        self._scale[method] = better.peak_bytes / max(1, own.peak_bytes)
        self._known = {key: value for key, value in self._known.items() if key[0] != method}
        self._known[method, repr(workload)] = better

    def __call__(self, method: str, workload: Workload) -> MemoryEstimate:
        key = (method, repr(workload))
        if key not in self._known:
            self._known[key] = _scaled(self._estimate(method, workload), self._scale.get(method, 1.0))
        return self._known[key]


def _scaled(estimate: MemoryEstimate, factor: float) -> MemoryEstimate:
    if factor == 1.0:
        return estimate
    breakdown = {name: round(size * factor) for name, size in estimate.breakdown.items()}
    return dataclasses.replace(estimate, peak_bytes=round(estimate.peak_bytes * factor), breakdown=breakdown)


class Interpolating:
    """A slow estimator (a dry run) asked at a few batch sizes only. P the peak at so many rows, the answer is

        max(P(1), line through P(a) and P(b))     in tokens

    where a is the least of ``LINE_ROWS`` whose peak is in the forward or backward pass, and b the next. A peak in the
    optimizer's step does not depend on the tokens, so a line through two such points would be constant.

    For architectures that the closed form does not know, a search would need a dry run for each estimate. Other batch
    sizes and lengths need no further dry run, any other setting needs two to four.
    """

    def __init__(self, slow: Estimator) -> None:
        self._slow = slow
        self._known: dict[tuple[str, str], tuple[MemoryEstimate, _Line]] = {}

    def __call__(self, method: str, workload: Workload) -> MemoryEstimate:
        # The memory of generation is not linear in the tokens of a step.
        one = dataclasses.replace(workload, batch_size=LINE_ROWS[0], max_length=LINE_TOKENS, written=0)
        key = (method, repr(one))
        if key not in self._known:
            self._known[key] = self._ask(method, one)
        least, line = self._known[key]
        breakdown = line.at(workload.tokens)
        if least.phase == "optimizer":
            breakdown = max(least.breakdown, breakdown, key=lambda terms: sum(terms.values()))
        notes = (*least.notes, UNCOUNTED_CACHE) if workload.written else least.notes
        peak = sum(breakdown.values())
        found = dataclasses.replace(least, peak_bytes=peak, breakdown=breakdown, notes=notes)
        return dataclasses.replace(found, exact=False, error=LINE_ERROR)

    def _ask(self, method: str, one: Workload) -> tuple[MemoryEstimate, _Line]:
        points: list[tuple[int, MemoryEstimate]] = []
        for rows in LINE_ROWS:
            work = dataclasses.replace(one, batch_size=rows)
            points.append((work.tokens, self._slow(method, work)))
            if len(points) > 1 and points[-2][1].phase != "optimizer":
                break
        (low_tokens, low), (high_tokens, high) = points[-2:]
        return points[0][1], _Line(low_tokens, high_tokens, low.breakdown, high.breakdown)


@dataclasses.dataclass(frozen=True)
class _Line:
    """Every term as a linear function through two points."""

    low_tokens: int
    high_tokens: int
    low: Mapping[str, int]
    high: Mapping[str, int]

    def at(self, tokens: int) -> dict[str, int]:
        share = (tokens - self.low_tokens) / (self.high_tokens - self.low_tokens)
        return {term: round(size + share * (self.high.get(term, 0) - size)) for term, size in self.low.items()}


def verdict_of(estimate: MemoryEstimate, memory_bytes: int) -> Verdict:
    """``fits`` if the peak plus its expected error fits, ``tight`` if only the peak fits, else ``too big``."""
    if estimate.peak_bytes > memory_bytes:
        return "too big"
    return "fits" if estimate.peak_bytes * (1 + estimate.error) <= memory_bytes else "tight"


def fits(estimate: MemoryEstimate, memory_bytes: int) -> bool:
    """Whether the estimated peak is within the memory."""
    return estimate.peak_bytes <= memory_bytes


def largest_batch(estimate: Estimator, method: str, workload: Workload, memory_bytes: int) -> int:
    """The largest micro-batch whose peak is within the memory; 0 where one row is too large."""
    return _largest(estimate, method, workload, memory_bytes, "batch_size", 1, MOST_ROWS)


def longest_row(
    estimate: Estimator, method: str, workload: Workload, memory_bytes: int, *, most: int = MOST_TOKENS
) -> int:
    """The longest row, up to ``most`` tokens, that fits at this batch size; 0 where even 2 tokens are too many."""
    return _largest(estimate, method, workload, memory_bytes, "max_length", 2, most)


def _largest(
    estimate: Estimator, method: str, workload: Workload, memory_bytes: int, name: str, least: int, most: int
) -> int:
    """The largest value of a field that fits, by secants and then bisection, since the peak grows almost linearly."""

    def spare(value: int) -> int:
        changed: dict[str, Any] = {name: value}
        return memory_bytes - estimate(method, dataclasses.replace(workload, **changed)).peak_bytes

    low, low_spare = least, spare(least)
    if low_spare < 0:
        return 0
    high, high_spare = _first_too_big(spare, max(2 * least, getattr(workload, name)), most)
    if high_spare >= 0:
        return high
    while high - low > 1:
        share = low_spare / (low_spare - high_spare)
        guess = min(high - 1, max(low + 1, low + round(share * (high - low))))
        low, low_spare, high, high_spare = _narrowed(spare, guess, low, low_spare, high, high_spare)
        if high - low > 1:
            middle = (low + high) // 2
            low, low_spare, high, high_spare = _narrowed(spare, middle, low, low_spare, high, high_spare)
    return low


def _first_too_big(spare: Callable[[int], int], start: int, most: int) -> tuple[int, int]:
    """A value that is too large, found by doubling, or ``most``."""
    value = min(start, most)
    left = spare(value)
    while left >= 0 and value < most:
        value = min(2 * value, most)
        left = spare(value)
    return value, left


def _narrowed(
    spare: Callable[[int], int], value: int, low: int, low_spare: int, high: int, high_spare: int
) -> tuple[int, int, int, int]:
    left = spare(value)
    if left >= 0:
        return value, left, high, high_spare
    return low, low_spare, value, left

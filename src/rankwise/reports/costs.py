"""The cost of a method over its seeds, as a range. Two methods differ in cost where their ranges do not overlap."""

from __future__ import annotations

from rankwise.foreign import Fields

# Peaks that are closer count as equal: a run's peak is that of its largest batch, which depends on the seed, and the
# plan is not more exact.
MEMORY_TOLERANCE = 0.05

Range = tuple[float, float]


def seconds_range(facts: Fields) -> Range | None:
    """The seconds of a run over the seeds of the method; None for one measurement, which has no range."""
    found = facts.get("ranges", {}).get("wall_seconds")
    return (found[0], found[1]) if found and facts["seeds"] > 1 else None


def memory_range(facts: Fields) -> Range | None:
    """The peak bytes over the seeds of the method. The lower end is lowered by ``MEMORY_TOLERANCE``."""
    peak = facts["peak_memory_bytes"]
    low, high = facts.get("ranges", {}).get("peak_memory_bytes") or (peak, peak)
    return None if low is None or high is None else (low / (1 + MEMORY_TOLERANCE), high)


def is_above(a: Range | None, b: Range | None) -> bool:
    """Whether the whole range ``a`` lies above ``b``. An unknown range is never above another."""
    return a is not None and b is not None and a[0] > b[1]

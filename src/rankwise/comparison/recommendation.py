"""One method out of those compared: within the user's limits, best first, and of equals the cheaper one."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rankwise.comparison.schema import Difference, Method, ParetoPoint, Recommendation
from rankwise.config import BASELINES
from rankwise.reports.naming import long_name, metric_in_sentence
from rankwise.reports.numbers import capital, listed, significant


def pareto_points(methods: Mapping[str, Method], metric: str) -> list[ParetoPoint]:
    """Every method that has a figure, as (quality, memory, time)."""
    return [
        {
            "method": name,
            "quality": item["mean"][metric],
            "peak_memory_bytes": item["peak_memory_bytes"],
            "wall_seconds": item["wall_seconds"],
        }
        for name, item in methods.items()
        if metric in item["mean"]
    ]


def pareto_set(points: Sequence[ParetoPoint], *, higher_is_better: bool) -> set[str]:
    """Those that no other one beats: at least as good in quality, memory and time, and better in one of them."""
    keys = {point["method"]: _costs(point, higher_is_better) for point in points}
    return {name for name, own in keys.items() if not any(_dominates(other, own) for other in keys.values())}


def recommend(
    methods: Mapping[str, Method],
    differences: Sequence[Difference],
    *,
    metric: str,
    higher_is_better: bool,
    margin: float,
    memory_bytes: int | None,
    hours: float | None,
) -> Recommendation:
    """The best method within the limits; of those that were not told apart from it, the one of the lowest cost.

    Cost is peak memory times seconds, what a machine is hired by. A pair with one common seed (others failed, or none
    were asked for) cannot be told apart by any test; it is tied where it differs by less than ``margin``, a share of
    the best value.
    """
    points = pareto_points(methods, metric)
    # Baselines are measured for comparison; their adapters neither merge nor load elsewhere.
    usable = [point for point in points if point["method"] not in BASELINES] or points
    fitting = [point for point in usable if _fits(point, memory_bytes, hours)]
    base = _empty(metric, memory_bytes, hours, points)
    if not fitting:
        return {**base, "reason": _nothing_fits(points, memory_bytes, hours)}
    best = min(fitting, key=lambda point: -point["quality"] if higher_is_better else point["quality"])
    tied = [point for point in fitting if point is best or _is_tied(best, point, metric, margin, differences)]
    tested = any(_tested(best["method"], point["method"], metric, differences) for point in fitting)
    chosen = min(tied, key=_cost)
    others = [point["method"] for point in tied if point is not chosen]
    reason = _reason(chosen, best, others, methods, metric, tested, memory_bytes, hours, len(fitting), len(usable))
    return {**base, "method": chosen["method"], "reason": reason, "ties": others}


def _empty(metric: str, memory: int | None, hours: float | None, points: list[ParetoPoint]) -> Recommendation:
    return {
        "method": None,
        "reason": "",
        "config": None,
        "command": None,
        "run": None,
        "adapter": None,
        "merged": None,
        "goal": "best quality" if memory is None and hours is None else "within limits",
        "metric": metric,
        "limits": {"memory_bytes": memory, "hours": hours},
        "ties": [],
        "pareto": points,
    }


def _costs(point: ParetoPoint, higher_is_better: bool) -> tuple[float, float, float]:
    quality = -point["quality"] if higher_is_better else point["quality"]
    return quality, point["peak_memory_bytes"] or math.inf, point["wall_seconds"] or math.inf


def _dominates(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return all(x <= y for x, y in zip(a, b)) and a != b


def _fits(point: ParetoPoint, memory: int | None, hours: float | None) -> bool:
    enough = memory is None or (point["peak_memory_bytes"] or math.inf) <= memory
    return enough and (hours is None or (point["wall_seconds"] or math.inf) <= hours * 3600)


def _cost(point: ParetoPoint) -> float:
    return (point["peak_memory_bytes"] or math.inf) * (point["wall_seconds"] or math.inf)


def _is_tied(
    best: ParetoPoint, other: ParetoPoint, metric: str, margin: float, differences: Sequence[Difference]
) -> bool:
    found = _tested(best["method"], other["method"], metric, differences)
    if found is None:
        return abs(other["quality"] - best["quality"]) <= margin * abs(best["quality"])
    return found["verdict"] in ("equivalent", "cannot tell")


def _tested(a: str, b: str, metric: str, differences: Sequence[Difference]) -> Difference | None:
    """The two methods' difference, where at least two common seeds gave it an interval."""
    return next(
        (
            item
            for item in differences
            if item["metric"] == metric and {item["a"], item["b"]} == {a, b} and item["interval"] is not None
        ),
        None,
    )


def _nothing_fits(points: Sequence[ParetoPoint], memory: int | None, hours: float | None) -> str:
    if not points:
        return "No run finished, so there is nothing to recommend."
    limits = _limits(memory, hours)
    least = min(points, key=lambda point: point["peak_memory_bytes"] or math.inf)
    return (
        f"No method stays within {limits}; {long_name(least['method'])} needs least memory ({_gigabytes(least)}, "
        f"{_minutes(least)})."
    )


def _reason(
    chosen: ParetoPoint,
    best: ParetoPoint,
    others: Sequence[str],
    methods: Mapping[str, Method],
    metric: str,
    tested: bool,
    memory: int | None,
    hours: float | None,
    fitting: int,
    all_of_them: int,
) -> str:
    """One sentence."""
    name = chosen["method"]
    failed = methods[name]["failed"]
    sentence = _choice(chosen, best, others, metric, tested, memory, hours, fitting, all_of_them)
    if not failed:
        return sentence
    return f"{sentence[:-1]}; {failed} of its {failed + methods[name]['seeds']} runs failed."


def _choice(
    chosen: ParetoPoint,
    best: ParetoPoint,
    others: Sequence[str],
    metric: str,
    tested: bool,
    memory: int | None,
    hours: float | None,
    fitting: int,
    all_of_them: int,
) -> str:
    name = capital(long_name(chosen["method"]))
    names = listed(map(long_name, others)) if others else ""
    quality = significant(chosen["quality"], 4)
    figures = f"{metric_in_sentence(metric)} {quality}, {_gigabytes(chosen)}, {_minutes(chosen)}"
    where = f" of the {fitting} methods within {_limits(memory, hours)}" if memory or hours else ""
    if all_of_them == 1:
        return f"{name} is the only method with a result ({figures})."
    if not others:
        how = "it is the best" if tested else "it has the best figure"
        doubt = "" if tested else ", on one seed, which cannot tell luck from merit"
        return f"{name}: {how}{where} ({figures}){doubt}."
    not_apart = f"could not be told apart from {names}" if tested else f"lies within the margin of {names}"
    seeds = "" if tested else " on one seed"
    return f"{name}: its quality {not_apart}{seeds}, and it costs least{where} ({figures})."


def _limits(memory: int | None, hours: float | None) -> str:
    parts = [f"{memory / 1e9:.3g} GB" if memory else "", f"{hours:g} h" if hours else ""]
    return " and ".join(part for part in parts if part)


def _gigabytes(point: ParetoPoint) -> str:
    return f"{point['peak_memory_bytes'] / 1e9:.2f} GB" if point["peak_memory_bytes"] else "memory not measured"


def _minutes(point: ParetoPoint) -> str:
    seconds = point["wall_seconds"]
    if seconds is None:
        return "time not measured"
    return f"{seconds / 60:.1f} min a run" if seconds >= 60 else f"{seconds:.0f} s a run"

"""Recommend one of the compared methods: the best within the user's limits, and the cheapest of equal ones."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

from rankwise.comparison.statistics import ALPHA
from rankwise.config import BASELINES, DORA, variant_of
from rankwise.reports.costs import Range, is_above, memory_range, seconds_range
from rankwise.reports.naming import long_name, metric_in_sentence
from rankwise.reports.numbers import byte_size, capital, duration, listed, plural, significant
from rankwise.reports.schema import Difference, Method, ParetoPoint, Recommendation
from rankwise.serving import refusing

# Methods whose adapters servers refuse; they load those of LoRA.
REFUSED_BY_SERVERS = (*DORA, *BASELINES)
# The most methods that a sentence names; of more it gives the number.
MOST_NAMED = 5


def pareto_points(methods: Mapping[str, Method], metric: str) -> list[ParetoPoint]:
    """(quality, memory, time) of every method that has a value of the metric."""
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


def pareto_set(methods: Mapping[str, Method], metric: str, *, higher_is_better: bool) -> set[str]:
    """The methods that no other method dominates: none is at least as good in quality, memory and time, and better in
    one of them.

    As in the recommendation, memory and time differ only where the ranges over seeds do not overlap.
    """
    sign = -1 if higher_is_better else 1
    names = [name for name, item in methods.items() if metric in item["mean"]]

    def is_worse(a: str, b: str) -> bool:
        """Whether ``a`` is worse than ``b`` in quality, memory or time."""
        costs = [is_above(cost(methods[a]), cost(methods[b])) for cost in (memory_range, seconds_range)]
        return any([sign * methods[a]["mean"][metric] > sign * methods[b]["mean"][metric], *costs])

    return {name for name in names if not any(is_worse(name, other) and not is_worse(other, name) for other in names)}


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
    """The best method within the limits. Of those that no test separates from it, the cheapest is taken.

    A method that a test found worse than another one is out (``_out``). Of the others the best one has the best mean;
    the best mean of all may be of a method that is out, since a test takes the seeds that both methods have, and a mean
    all seeds of its method.

    Cost is compared in this order: seconds of a run, peak memory, trained parameters, servers that take the adapter.
    Seconds and memory count only where the ranges over seeds do not overlap (``cheapest``). A pair without a test, as
    with one common seed, is tied if it differs by less than ``margin``, a share of the best value.
    """
    points = pareto_points(methods, metric)
    # Baselines are measured for comparison; their adapters neither merge nor load elsewhere.
    usable = [point for point in points if point["method"] not in BASELINES] or points
    fitting = [point for point in usable if _fits(point, memory_bytes, hours)]
    base = _empty(metric, memory_bytes, hours, points)
    if not fitting:
        nothing = _nothing_fits(points, memory_bytes, hours)
        return {**base, "reason": nothing, "why": nothing}
    quality = {point["method"]: -point["quality"] if higher_is_better else point["quality"] for point in fitting}
    out = _out(list(quality), metric, differences, higher_is_better=higher_is_better)
    left = [point for point in fitting if point["method"] not in out]
    best = min(left, key=lambda point: (quality[point["method"]], point["method"]))
    tied = [point for point in left if point is best or _is_tied(best, point, metric, margin, differences)]
    names = sorted((point["method"] for point in tied), key=lambda name: (quality[name], name))
    chosen, why = cheapest(names, methods)
    verdicts = {
        point["method"]: found["verdict"] if found else None
        for point in fitting
        if point is not best
        for found in [_tested(best["method"], point["method"], metric, differences)]
    }
    # Those that are out although the verdict on their pair with the best one does not say so.
    unsaid = sorted(name for name in out if verdicts[name] not in ("better", "worse"))
    verdicts = {name: said for name, said in verdicts.items() if name not in unsaid}
    limits = _limits(memory_bytes, hours)
    where = f"of the {plural(len(fitting), 'method')} within {limits}" if limits else ""
    if len(fitting) > 1:
        has_best_mean = quality[best["method"]] == min(quality.values())
        praise = "which has the best mean" if has_best_mean else "which no test found worse"
        reason = _reason(chosen, (best["method"], praise), names, verdicts, why, _untested(metric, differences))
    else:
        reason = "it is the only one to choose from" if len(points) > 1 else "it is the only method with a result"
    told = f"{reason}{_figures(methods[chosen], metric)}"
    told += f"{_worse_ones(unsaid, len(fitting) - 1)}{_failures(methods[chosen])}."
    return {
        **base,
        "method": chosen,
        "reason": f"{capital(long_name(chosen))}{', ' + where if where else ''}: {told}",
        "why": f"{where}: {told}" if where else told,
        "ties": [name for name in names if name != chosen],
    }


def cheapest(names: Sequence[str], methods: Mapping[str, Method]) -> tuple[str, list[str]]:
    """The method with the lowest cost, and the reasons against the others in words.

    A method is dropped if its lowest figure is above the highest figure of another method, so that timing noise decides
    nothing and the order of the checks does not matter. ``names`` are sorted, best first; the first one left is taken.
    """
    left = list(names)
    why: list[tuple[list[str], str, _Cost]] = []
    for cost in _COSTS:
        known = {name: pair for name in left if (pair := cost.range_of(name, methods[name])) is not None}
        if len(known) < 2:
            continue
        least = min(known, key=lambda name: (known[name][1], name))
        out = [name for name in known if is_above(known[name], known[least])]
        if out:
            why.append((out, least, cost))
            left = [name for name in left if name not in out]
    chosen = left[0]
    said = [_against(out, least, cost, chosen) for out, least, cost in why]
    if len(left) > 1:
        said.append(f"its cost does not differ from that of {_named(left[1:])}, whose mean is worse")
    if methods[chosen]["seeds"] < 2:
        said.insert(0, "one measurement of time has no range, so time does not count")
    return chosen, said


@dataclasses.dataclass(frozen=True)
class _Cost:
    """One kind of cost, with the phrases for one method and for several methods that cost more."""

    range_of: Callable[[str, Method], Range | None]
    one: str
    several: str
    # Whether the phrase names the method that it compares with.
    is_relative: bool = True


def _parameters(name: str, method: Method) -> Range | None:
    count = method.get("trainable_parameters")
    return None if count is None else (count, count)


def _refusals(name: str, method: Method) -> Range:
    is_refused = variant_of(name)[0] in REFUSED_BY_SERVERS
    return is_refused, is_refused


# The costs, in the order in which they decide.
_COSTS = (
    _Cost(lambda _, method: seconds_range(method), "takes longer", "take longer"),
    _Cost(lambda _, method: memory_range(method), "needs more memory", "need more memory"),
    _Cost(_parameters, "trains more parameters", "train more parameters"),
    _Cost(_refusals, f"is refused by {refusing('dora')}", f"are refused by {refusing('dora')}", is_relative=False),
)


def _against(out: Sequence[str], least: str, cost: _Cost, chosen: str) -> str:
    text = f"{_named(out)} {cost.several if len(out) > 1 else cost.one}"
    return text if least == chosen or not cost.is_relative else f"{text} than {long_name(least)}"


def _named(names: Sequence[str]) -> str:
    return listed(map(long_name, names)) if len(names) <= MOST_NAMED else f"{len(names)} methods"


def _empty(metric: str, memory: int | None, hours: float | None, points: list[ParetoPoint]) -> Recommendation:
    return {
        "method": None,
        "reason": "",
        "why": "",
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


def _fits(point: ParetoPoint, memory: int | None, hours: float | None) -> bool:
    enough = memory is None or (point["peak_memory_bytes"] or math.inf) <= memory
    return enough and (hours is None or (point["wall_seconds"] or math.inf) <= hours * 3600)


def _is_tied(
    best: ParetoPoint, other: ParetoPoint, metric: str, margin: float, differences: Sequence[Difference]
) -> bool:
    found = _tested(best["method"], other["method"], metric, differences)
    if found is None:
        return abs(other["quality"] - best["quality"]) <= margin * abs(best["quality"])
    return found["verdict"] in ("equivalent", "cannot tell")


def _out(names: Sequence[str], metric: str, differences: Sequence[Difference], *, higher_is_better: bool) -> set[str]:
    """The methods that a test found worse than another one of ``names``.

    The verdicts are corrected over all pairs of methods. To leave out a method by mistake that is the best of k, one of
    its k - 1 own tests has to fail, so that here p < ALPHA / (k - 1) is enough too (multiple comparisons with the best,
    Hsu 1984). Equivalent methods stay; where tests on different seeds contradict each other, all do.
    """
    found = set()
    for item in differences:
        if item["metric"] != metric or not {item["a"], item["b"]} <= set(names) or item["verdict"] == "equivalent":
            continue
        if item["verdict"] != "cannot tell":
            found.add(item["b"] if item["verdict"] == "better" else item["a"])
        elif item["p_value"] is not None and item["p_value"] * (len(names) - 1) < ALPHA:
            found.add(item["b"] if (item["difference"] > 0) == higher_is_better else item["a"])
    return found if len(found) < len(names) else set()


def _untested(metric: str, differences: Sequence[Difference]) -> str:
    """Why a pair has no test: one seed in common, or evaluation rows of one prompt."""
    found = [item for item in differences if item["metric"] == metric and item["interval"] is None]
    return "on one evaluation row or prompt" if any(item["seeds"] > 1 for item in found) else "on one seed"


def _tested(a: str, b: str, metric: str, differences: Sequence[Difference]) -> Difference | None:
    """The difference of the two methods, if it has an interval; else None."""
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
    least = min(
        points,
        key=lambda point: (
            (point["peak_memory_bytes"] if memory else point["wall_seconds"]) or math.inf,
            point["method"],
        ),
    )
    return (
        f"No method stays within {_limits(memory, hours)}; {long_name(least['method'])} needs least "
        f"{'memory' if memory else 'time'} ({_cost(least['peak_memory_bytes'], least['wall_seconds'])})."
    )


def _reason(
    chosen: str,
    best: tuple[str, str],
    tied: Sequence[str],
    verdicts: Mapping[str, str | None],
    why: Sequence[str],
    untested: str,
) -> str:
    """The text after the name: the verdicts, then what decided where no verdict does. ``best``: its name and a clause
    that says why it is the best.
    """
    if len(tied) > 1:
        return f"{_ties(chosen, best, tied, verdicts, untested)}; {', and '.join(why)}"
    tested = [name for name in sorted(verdicts) if verdicts[name] in ("better", "worse")]
    others = [name for name in sorted(verdicts) if verdicts[name] is None]
    parts = [f"it is better than {_named(tested)}"] if tested else []
    if others:
        parts.append(f"{untested}, which proves nothing, its figure is better than that of {_named(others)}")
    return listed(parts or ["no test found it worse than another method"])


def _ties(
    chosen: str, best: tuple[str, str], tied: Sequence[str], verdicts: Mapping[str, str | None], untested: str
) -> str:
    """The results of the tests against the best mean and each method that is not worse: a predicate of ``chosen``."""
    words = {
        "equivalent": "it is equivalent to",
        "cannot tell": "the runs cannot tell it from",
        None: f"{untested} it lies within the margin of",
    }
    name_of_best, praise = best
    if chosen != name_of_best:
        return f"{words[verdicts[chosen]]} {long_name(name_of_best)}, {praise}"
    groups = {text: [name for name in tied if name != chosen and verdicts[name] == key] for key, text in words.items()}
    return listed(f"{text} {_named(names)}" for text, names in groups.items() if names)


def _worse_ones(names: Sequence[str], comparisons: int) -> str:
    if not names:
        return ""
    verb = "is" if len(names) == 1 else "are"
    tested = f"p < {ALPHA:.2g}, corrected for {comparisons} comparisons"
    return f"; {_named(names)} {verb} worse than another method ({tested})"


def _failures(method: Method) -> str:
    failed = method["failed"]
    return f"; {failed} of its {failed + method['seeds']} runs failed" if failed else ""


def _limits(memory: int | None, hours: float | None) -> str:
    parts = [byte_size(memory) if memory else "", f"{hours:g} h" if hours else ""]
    return " and ".join(part for part in parts if part)


def _figures(method: Method, metric: str) -> str:
    figure = f"{metric_in_sentence(metric)} {significant(method['mean'][metric], 4)}"
    return f" ({figure}, {_cost(method['peak_memory_bytes'], method['wall_seconds'])})"


def _cost(memory: float | None, seconds: float | None) -> str:
    """``2.08 GB, 1 min 52 s a run``."""
    peak = byte_size(memory) if memory else "memory not measured"
    return f"{peak}, time not measured" if seconds is None else f"{peak}, {duration(seconds)} a run"

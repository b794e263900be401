"""Recommend one of the compared methods: the best within the user's limits, and the cheapest of equal ones.

The result is fields alone; ``reports/words.py`` puts them into sentences.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import get_args

from rankwise.config import DORA, is_own, variant_of
from rankwise.reports.numbers import is_above
from rankwise.reports.schema import CostName, DecidingCost, Difference, Method, MethodVerdict, Recommendation, Verdict

# Words of a variant that change a rate or a scale, and no computation.
SAME_COMPUTE = ("plus", "rslora")
# Peaks that are closer count as equal: a run's peak is that of its largest batch, which depends on the seed, and the
# plan is not more exact.
MEMORY_TOLERANCE = 0.05
TURNED: dict[Verdict, Verdict] = {"better": "worse", "worse": "better"}


def comparable_costs(methods: Mapping[str, Method]) -> dict[str, dict[CostName, list[float]]]:
    """{method: {cost: its [lowest, highest] over the seeds}}. A cost that cannot be compared is left out: time of one
    run, or of runs that others ran beside; memory or parameters that are not known.

    Methods that compute the same, such as LoRA and LoRA+, share a range: only noise parts their times.
    """
    alike: dict[str, list[str]] = {}
    for name in methods:
        alike.setdefault("+".join(word for word in name.split("+") if word not in SAME_COMPUTE), []).append(name)
    found: dict[str, dict[CostName, list[float]]] = {}
    for names in alike.values():
        costs = [_own_costs(name, methods[name]) for name in names]
        shared = {
            cost: [min(own[cost][0] for own in known), max(own[cost][1] for own in known)]
            for cost in get_args(CostName)
            if (known := [own for own in costs if cost in own])
        }
        found |= dict.fromkeys(names, shared)
    return found


def _own_costs(name: str, method: Method) -> dict[str, list[float]]:
    ranges, parameters, method_alone = method["ranges"], method["trainable_parameters"], variant_of(name)[0]
    costs = {"servers": [float(method_alone in DORA or not is_own(name))] * 2}
    if method["alone"] and method["seeds"] > 1 and "wall_seconds" in ranges:
        costs["wall_seconds"] = ranges["wall_seconds"]
    if "peak_memory_bytes" in ranges:
        low, high = ranges["peak_memory_bytes"]
        costs["peak_memory_bytes"] = [low / (1 + MEMORY_TOLERANCE), high]
    if parameters is not None:
        costs["trainable_parameters"] = [parameters, parameters]
    return costs


def recommend(
    methods: Mapping[str, Method],
    differences: Sequence[Difference],
    *,
    metric: str,
    higher_is_better: bool,
    margin: float,
    detectable: float | None,
    memory_bytes: int | None,
    hours: float | None,
) -> tuple[Recommendation, dict[str, MethodVerdict]]:
    """The recommendation, and the verdict on each method against the best one.

    The best one is chosen from the tuned methods within the limits: it has the best mean of those that no test found
    worse. (The best mean may be of a method that a test found worse: a test takes the seeds that both methods have.)
    The cheapest of the best one and its equals is taken. Methods that the runs cannot tell from the best one are its
    equals if the comparison could have seen a difference that matters: ``detectable`` is at most ``margin``, both
    shares of the metric. Otherwise nothing is decided.
    """
    sign = -1 if higher_is_better else 1
    means = {name: sign * item["mean"][metric] for name, item in methods.items() if metric in item["mean"]}
    # Baselines are measured for comparison; their adapters neither merge nor load elsewhere.
    usable = [name for name in means if is_own(name)] or list(means)
    fitting = [name for name in usable if _fits(methods[name], memory_bytes, hours)]
    candidates = [name for name in fitting if not methods[name]["learning_rate_at_edge"]] or fitting
    found: Recommendation = {
        "method": None,
        "decided": False,
        "best": None,
        "candidates": candidates,
        "equals": [],
        "open": [],
        "costs": [],
        "deciding": None,
        "metric": metric,
        "margin": margin,
        "limits": {"memory_bytes": memory_bytes, "hours": hours},
        "config": None,
        "command": None,
        "run": None,
        "adapter": None,
        "merged": None,
    }
    if not candidates:
        return found, {}
    pairs = [item for item in differences if item["metric"] == metric]
    inside = [item for item in pairs if {item["a"], item["b"]} <= set(candidates)]
    lost = {item["a"] for item in inside if item["verdict"] == "worse"}
    lost |= {item["b"] for item in inside if item["verdict"] == "better"}
    best = min(candidates, key=lambda name: (name in lost, means[name], name))
    comparisons = max((item["comparisons"] for item in pairs), default=1)
    verdicts = {name: _against(name, best, pairs, comparisons) for name in means}
    if methods[best]["learning_rate_at_edge"]:
        verdicts[best]["verdict"] = "not tuned"
    can_see = detectable is not None and detectable <= margin
    equals, unsure = [], []
    for name in sorted(set(fitting) - {best}, key=lambda name: (means[name], name)):
        said, p_value = verdicts[name]["verdict"], verdicts[name]["p_value"]
        if said == "equivalent" or (said == "cannot tell" and can_see and p_value is not None):
            equals.append(name)
        elif said == "cannot tell" or (said == "not tuned" and (name in candidates or means[name] < means[best])):
            unsure.append(name)
    method, costs = cheapest([best, *equals], methods)
    found |= {"method": method, "decided": not unsure, "best": best, "equals": equals, "open": unsure, "costs": costs}
    return found, verdicts


def _against(name: str, best: str, pairs: Sequence[Difference], comparisons: int) -> MethodVerdict:
    said: MethodVerdict = {"verdict": "cannot tell", "against": best, "p_value": None, "comparisons": comparisons}
    if name == best:
        return {**said, "verdict": "best"}
    for item in pairs:
        if {item["a"], item["b"]} == {name, best}:
            said["verdict"] = item["verdict"] if item["a"] == name else TURNED.get(item["verdict"], item["verdict"])
            said["p_value"] = None if item["p_value"] is None else min(1.0, item["p_value"] * comparisons)
    return said


def cheapest(names: Sequence[str], methods: Mapping[str, Method]) -> tuple[str, list[DecidingCost]]:
    """The method with the lowest cost, and the costs for which the others were dropped.

    A method is dropped if its lowest figure is above the highest figure of another method, so that timing noise decides
    nothing and the order of the checks does not matter. ``names`` are sorted, best first; the first one left is taken.
    """
    left = list(names)
    decided: list[DecidingCost] = []
    for cost in get_args(CostName):
        known = {name: methods[name]["costs"][cost] for name in left if cost in methods[name]["costs"]}
        if not known:
            continue
        least = min(known, key=lambda name: (known[name][1], left.index(name)))
        out = [name for name in known if is_above(known[name], known[least])]
        if out:
            decided.append({"cost": cost, "methods": out, "than": least})
            left = [name for name in left if name not in out]
    if left[1:]:
        decided.append({"cost": "mean", "methods": left[1:], "than": left[0]})
    return left[0], decided


def _fits(method: Method, memory: int | None, hours: float | None) -> bool:
    enough = memory is None or (method["peak_memory_bytes"] or math.inf) <= memory
    return enough and (hours is None or (method["wall_seconds"] or math.inf) <= hours * 3600)

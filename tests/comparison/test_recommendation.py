"""What is recommended and why: equals, costs, what is left open; and that no sentence contradicts a field."""

from __future__ import annotations

import itertools
import random
import re
from pathlib import Path
from typing import Any

import pytest

from rankwise.comparison.results import conclusions
from rankwise.comparison.verdicts import Scores, Spreads, comparable_costs, recommend
from rankwise.reports.comparison import TURNED, Comparison
from rankwise.reports.numbers import capital
from rankwise.reports.summary import cell
from rankwise.reports.words import MOST_NAMED, heading, headline, long_name


def method(
    loss: float, memory: float, seconds: float, seeds: int = 3, spread: float = 0.01, **changes: Any
) -> dict[str, Any]:
    times = [seconds * (1 - spread), seconds * (1 + spread)]
    return {
        "mean": {"eval_loss": loss},
        "interval": {},
        "higher_is_better": {"eval_loss": False},
        "peak_memory_bytes": int(memory * 1e9),
        "wall_seconds": seconds,
        "ranges": {"wall_seconds": times, "peak_memory_bytes": [memory * 1e9, memory * 1e9]},
        "trainable_parameters": None,
        "seeds": seeds,
        "failed": 3 - seeds,
        "alone": True,
        "learning_rate": 1e-3,
        "learning_rate_at_edge": False,
        "retained": None,
        **changes,
    }


METHODS = {"lora": method(1.50, 6, 600), "qlora": method(1.51, 3, 900), "dora": method(1.49, 6, 660)}


def differences(verdict: str, methods: Any) -> list[dict[str, Any]]:
    """Of every pair, "better" said of the lower mean; one without two common seeds has no test."""
    found = []
    for pair in itertools.combinations(methods, 2):
        a, b = sorted(pair, key=lambda name: (methods[name]["mean"]["eval_loss"], name))
        is_tested = min(methods[a]["seeds"], methods[b]["seeds"]) > 1
        known = {"verdict": verdict if is_tested else "cannot tell", "p_value": 0.01 if is_tested else None}
        gap = methods[a]["mean"]["eval_loss"] - methods[b]["mean"]["eval_loss"]
        known |= {"difference": gap, "standard_error": 0.011 if is_tested else None, "margin": 0.0}
        found.append({"a": a, "b": b, "metric": "eval_loss", "comparisons": len(methods) - 1, **known})
    return found


def choice(
    verdict: str,
    methods: Any = METHODS,
    pairs: Any = None,
    detectable: float | None = 0.009,
) -> Any:
    """The recommendation with its sentences under ``said``."""
    costs = comparable_costs(methods)
    methods = {name: {**item, "costs": costs[name]} for name, item in methods.items()}
    found, verdicts = recommend(
        methods,
        differences(verdict, methods) if pairs is None else pairs,
        metric="eval_loss",
        higher_is_better=False,
        margin=0.01,
        detectable=detectable,
    )
    document = {
        "methods": {name: {**item, "verdict": verdicts.get(name)} for name, item in methods.items()},
        "recommendation": found,
        "minimum_detectable_effect": {"relative": detectable, "absolute": None},
        "primary_metric": "eval_loss",
        "settings": {"objective": "sft"},
        "base": {"tasks": {}},
    }
    return {**found, "said": headline(document), "heading": heading(document)}


def test_the_best_one_is_taken_where_it_is_told_apart():
    found = choice("better")
    assert (found["method"], found["equals"], found["decided"]) == ("dora", [], True)
    assert found["said"] == (
        "DoRA (evaluation loss 1.490, 6.00 GB, 11 min 00 s a run) is the best one. LoRA and QLoRA are worse than DoRA. "
        "The comparison could detect a difference of 0.90 % with 80 % power."
    )


def test_equal_ones_go_to_the_shortest_runs_where_ranges_part():
    found = choice("equivalent")
    assert (found["method"], found["equals"]) == ("lora", ["lora", "qlora"])
    assert found["said"] == (
        "LoRA (evaluation loss 1.500, 6.00 GB, 10 min 00 s a run) counts as equal to DoRA, the best one. "
        "The comparison could detect a difference of 0.90 % with 80 % power. DoRA and QLoRA take longer than LoRA."
    )


def test_what_the_runs_cannot_tell_is_left_open_unless_they_could_have_seen_what_matters():
    seeing = choice("cannot tell", detectable=0.01)
    assert (seeing["method"], seeing["decided"]) == ("lora", True)
    blind = choice("cannot tell", detectable=0.1)
    assert (blind["best"], blind["decided"], blind["open"]) == ("dora", False, ["lora", "qlora"])
    assert blind["heading"] == "Not decided"
    # QLoRA's mean is more than a standard error away; LoRA costs less than DoRA.
    assert blind["method"] == "lora"
    assert "LoRA (evaluation loss 1.500, 6.00 GB, 10 min 00 s a run) is what to take meanwhile" in blind["said"]
    told = "The runs cannot tell LoRA and QLoRA from DoRA: the comparison could detect a difference of 10 %"
    assert told in blind["said"]
    assert "DoRA takes longer than LoRA" in blind["said"]
    untested = choice("", {name: {**item, "seeds": 1} for name, item in METHODS.items()}, detectable=None)
    assert (untested["method"], untested["decided"]) == ("dora", False)
    assert "is too small to detect any difference" in untested["said"]


def test_methods_without_a_common_seed_leave_it_open():
    found = choice("", {name: METHODS[name] for name in ("lora", "dora")}, pairs=[])
    assert (found["method"], found["decided"], found["open"]) == ("dora", False, ["lora"])


def test_many_methods_are_counted_and_not_named():
    names = ["lora", "full", "qlora+loftq", "lora+pissa", "qlora+pissa", "dora", "qlora", "qdora"]
    methods = {name: method(1.5 + place / 100, 6.0, 600 + 60 * place) for place, name in enumerate(names)}
    assert "LoRA counts as equal to 7 methods" in re.sub(r" \(.*?\)", "", choice("equivalent", methods)["said"])


def test_the_clock_decides_nothing_within_its_noise_and_nothing_beside_other_runs():
    methods = {
        "lora": method(2.70, 0.43, 9.8, spread=0.1, trainable_parameters=4_880_000),
        "dora": method(2.71, 0.44, 9.0, spread=0.1, trainable_parameters=5_040_000),
    }
    found = choice("equivalent", methods)
    assert found["costs"] == [{"cost": "trainable_parameters", "methods": ["dora"], "than": "lora"}]
    methods["dora"] = method(2.71, 0.44, 7.0, spread=0.1, trainable_parameters=5_040_000)
    assert choice("equivalent", methods)["costs"] == [{"cost": "wall_seconds", "methods": ["lora"], "than": "dora"}]
    beside = choice("equivalent", {name: {**item, "alone": False} for name, item in methods.items()})
    assert beside["method"] == "lora"
    assert beside["said"].endswith("Runs took place side by side or only once, so their times are not compared.")
    assert "wall_seconds" not in comparable_costs({"lora": method(2.7, 1, 60, seeds=1)})["lora"]


@pytest.mark.parametrize("variant", ["plus", "rslora"])
def test_a_variant_that_computes_the_same_is_not_faster(variant: str):
    """The clock's noise parted LoRA from LoRA+ on a machine with other work."""
    other = f"lora+{variant}"
    methods = {"lora": method(1.406, 1.35, 228), other: method(1.41, 1.35, 208), "dora": method(1.407, 1.35, 269)}
    found = choice("equivalent", methods)
    assert found["method"] == "lora"
    assert [(item["cost"], item["methods"]) for item in found["costs"]] == [
        ("wall_seconds", ["dora"]),
        ("mean", [other]),
    ]


def test_memory_counts_where_it_really_parts_then_parameters_then_servers_then_the_mean():
    def decided(**methods: Any) -> tuple[str, list[str]]:
        found = choice("equivalent", methods)
        return found["method"], [item["cost"] for item in found["costs"]]

    less = {"qlora": method(1.5, 2.0, 600), "lora": method(1.4, 2.2, 600)}
    assert decided(**less) == ("qlora", ["peak_memory_bytes"])
    near = {"dora": {**less["qlora"], "trainable_parameters": 11}, "lora": method(1.5, 2.05, 600)}
    near["lora"]["trainable_parameters"] = 10
    assert decided(**near) == ("lora", ["trainable_parameters"])
    assert decided(dora=method(1.4, 2.0, 600), lora=method(1.5, 2.0, 600)) == ("lora", ["servers"])
    assert decided(lora=method(1.5, 2.0, 600), qlora=method(1.4, 2.0, 600)) == ("qlora", ["mean"])


def test_a_method_at_the_edge_of_the_grid_is_not_judged():
    worse = {**METHODS, "lora": {**METHODS["lora"], "learning_rate_at_edge": True}}
    pairs = [{**item, "verdict": "not tuned"} if "lora" in (item["a"], item["b"]) else item
             for item in differences("better", METHODS)]  # fmt: skip
    found = choice("", worse, pairs=pairs)
    assert (found["method"], found["decided"]) == ("dora", True)
    assert "LoRA is not tuned: its best rate lies at the edge of those tried." in found["said"]
    assert "QLoRA is worse than DoRA." in found["said"]
    better = {**METHODS, "dora": {**METHODS["dora"], "learning_rate_at_edge": True}}
    pairs = [{**item, "verdict": "not tuned"} if "dora" in (item["a"], item["b"]) else item
             for item in differences("better", METHODS)]  # fmt: skip
    found = choice("", better, pairs=pairs)
    assert (found["method"], found["decided"], found["open"]) == ("lora", False, ["dora"])
    every = {name: {**item, "learning_rate_at_edge": True} for name, item in METHODS.items()}
    found = choice("not tuned", every)
    assert (found["best"], found["decided"], found["open"]) == ("dora", False, ["lora", "qlora"])
    assert "LoRA, QLoRA and DoRA are not tuned" in found["said"]


def random_table(draw: random.Random) -> dict[str, Any]:
    names = draw.sample(["lora", "lora+plus", "lora+rslora", "dora", "qlora", "qdora", "full"], draw.randint(2, 6))
    return {
        name: method(
            draw.choice([1.0, 1.1, draw.random() + 1]),
            draw.choice([2.0, 2.05, draw.random() + 1]),
            draw.choice([60.0, draw.uniform(50, 90)]),
            spread=draw.choice([0.0, 0.02, 0.2]),
            trainable_parameters=draw.choice([10, 11, None]),
        )
        for name in names
    }


@pytest.mark.parametrize("seed", range(10))
def test_neither_noise_within_the_ranges_nor_the_order_matters(seed: int):
    draw = random.Random(seed)
    methods = random_table(draw)
    verdict = draw.choice(["better", "equivalent", "cannot tell"])
    found = choice(verdict, methods)
    names = list(methods)
    draw.shuffle(names)
    again = {
        name: {**methods[name], "wall_seconds": draw.uniform(*methods[name]["ranges"]["wall_seconds"])}
        for name in names
    }
    other = choice(verdict, again)
    assert (other["method"], set(other["equals"])) == (found["method"], set(found["equals"]))


def test_the_best_mean_does_not_stand_against_a_test():
    """DoRA's third seed failed, and LoRA's went badly: on the seeds that both have, LoRA is better."""
    methods = {"lora": method(1.50, 6, 600), "dora": method(1.49, 6, 600, seeds=2)}
    pair = {"a": "dora", "b": "lora", "metric": "eval_loss", "verdict": "worse", "p_value": 0.01, "comparisons": 1}
    found = choice("", methods, pairs=[pair])
    assert (found["method"], found["decided"]) == ("lora", True)
    assert "DoRA is worse than LoRA" in found["said"]


def test_a_baseline_is_not_recommended_beside_methods_of_use():
    methods = {**METHODS, "prefix": method(1.0, 1, 1)}
    found = choice("better", methods)
    assert found["method"] == "dora"
    assert "Prefix, for comparison only, is better" in found["said"]
    assert choice("better", {"prefix": method(1.0, 1, 1)})["said"].endswith("is the only method with a result.")


def simulated(seed: int) -> Comparison:
    """A comparison of random methods, seeds, spreads, grids and costs, as its folder would hold it."""
    draw = random.Random(seed)
    methods, seeds = random_table(draw), draw.choice([1, 2, 3, 5])
    scores, alone = {}, draw.random() < 0.5
    rows, gap, noise = draw.choice([20, 200]), draw.choice([0.0, 0.005, 0.2]), draw.choice([0.001, 0.05])
    common = [draw.gauss(0, 0.5) for _ in range(rows)]
    for place, (name, item) in enumerate(methods.items()):
        shift = gap * place
        examples = {
            number: [2 + shift + noise * offset + own + draw.gauss(0, noise) for own in common]
            for number in range(seeds)
            for offset in [draw.gauss(0, 0.3)]
        }
        values = {number: sum(row) / rows for number, row in examples.items()}
        scores[name] = Scores(values=values, examples=examples, ids=[str(number) for number in range(rows)])
        item |= {"alone": alone, "seeds": seeds, "learning_rate_at_edge": draw.random() < 0.2, "failed": 0}
        item["mean"] = {"eval_loss": sum(values.values()) / seeds}
    margin = draw.choice([0.002, 0.01, 0.05])
    spreads = Spreads(scores, metric="eval_loss", margin=margin)
    found = conclusions(methods, {"eval_loss": scores}, {"eval_loss": False}, spreads, {})
    more = {"primary_metric": "eval_loss", "settings": {"objective": "sft"}, "base": {"tasks": {}}}
    return Comparison({**found, **more}, Path())


def said_to_be(text: str, predicate: str) -> set[str]:
    """The names in the sentence of this predicate, which has no figures."""
    found = re.search(rf"(?:^|\. )([^.]*?) (?:is|are) {predicate}", re.sub(r"\([^)]*\d[^)]*\)|\d\.\d+", "", text))
    return {capital(name) for name in re.split(r", | and ", found[1])} if found else set()


@pytest.mark.parametrize("seed", range(40))
def test_no_sentence_mark_or_cell_contradicts_a_field(seed: int):
    comparison = simulated(seed)
    found, methods = comparison["recommendation"], comparison["methods"]
    text = headline(comparison.document)
    best = found["best"]
    verdicts = {name: item["verdict"]["verdict"] for name, item in methods.items()}
    edges = [name for name, item in methods.items() if item["learning_rate_at_edge"]]
    of = {word: [name for name in methods if verdicts[name] == word] for word in ("worse", "better")}
    for names, predicate in ((of["worse"], "worse than"), (of["better"], "better"), (edges, "not tuned")):
        if len(names) <= MOST_NAMED:
            assert said_to_be(text, predicate) == {capital(long_name(name)) for name in names}, text
    # The forest plot, the table, and the fields say the same of every method.
    pairs = comparison.differences_from_best()
    for pair in pairs:
        name = pair["b"] if pair["a"] == best else pair["a"]
        turned = pair["verdict"] if pair["a"] == name else TURNED.get(pair["verdict"], pair["verdict"])
        assert turned == verdicts[name] == cell(methods[name], "verdict").text
    assert len(pairs) == len(methods) - 1
    # A method at the edge of its grid has no other verdict, and costs nobody the first place while others are tuned.
    for name in methods:
        assert (verdicts[name] == "not tuned") == (name in edges or best in edges)
    assert verdicts[best] in ("best", "not tuned")
    assert verdicts[found["method"]] in ("best", "equivalent", "cannot tell", "not tuned")
    # Nothing is better, and what is decided leaves nothing that could be.
    effect = comparison["minimum_detectable_effect"]["relative"]
    for name in {*found["candidates"]} - {best}:
        assert verdicts[name] != "better"
        if found["decided"]:
            sees = effect is not None and effect <= found["margin"]
            assert verdicts[name] in ("worse", "equivalent") or (verdicts[name] == "cannot tell" and sees)
    assert (heading(comparison.document) == "Not decided") == (not found["decided"]) == bool(found["open"])
    assert "could detect" in text or "too small to detect" in text or len(methods) == 1
    # Time needs runs that were alone, and several of them; variants that compute the same do not differ in cost.
    timed = all(item["alone"] and item["seeds"] > 1 for item in methods.values())
    assert timed or "longer" not in text
    for item in found["costs"]:
        alike = {name.replace("+plus", "").replace("+rslora", "") for name in item["methods"]}
        assert item["cost"] == "mean" or item["than"].replace("+plus", "").replace("+rslora", "") not in alike

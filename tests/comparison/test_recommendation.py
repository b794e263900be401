"""Limits, ties and the Pareto set."""

from __future__ import annotations

import itertools
from typing import Any

from rankwise.comparison.recommendation import pareto_points, pareto_set, recommend


def method(loss: float, memory: float, seconds: float, seeds: int = 3) -> dict[str, Any]:
    return {
        "mean": {"eval_loss": loss},
        "peak_memory_bytes": int(memory * 1e9),
        "wall_seconds": seconds,
        "seeds": seeds,
        "failed": 3 - seeds,
    }


METHODS = {"lora": method(1.50, 6, 600), "qlora": method(1.51, 3, 900), "dora": method(1.49, 6, 660)}


def differences(verdict: str, methods: Any) -> list[dict[str, Any]]:
    """Of every pair; one without two common seeds has no interval."""
    return [
        {
            "a": a,
            "b": b,
            "metric": "eval_loss",
            "verdict": verdict if (known := min(methods[a]["seeds"], methods[b]["seeds"]) > 1) else "cannot tell",
            "interval": [-1.0, 1.0] if known else None,
        }
        for a, b in itertools.combinations(methods, 2)
    ]


def choice(verdict: str, methods: Any = METHODS, memory: float | None = None, hours: float | None = None) -> Any:
    return recommend(
        methods,
        differences(verdict, methods),  # type: ignore[arg-type]
        metric="eval_loss",
        higher_is_better=False,
        margin=0.01,
        memory_bytes=None if memory is None else int(memory * 1e9),
        hours=hours,
    )


def test_the_best_one_wins_where_it_is_told_apart():
    found = choice("better")
    assert found["method"] == "dora"
    assert found["ties"] == []


def test_ties_go_to_the_cheaper_one():
    found = choice("cannot tell")
    assert found["method"] == "qlora"
    assert set(found["ties"]) == {"lora", "dora"}
    assert found["reason"].count(".") >= 1
    assert "costs least" in found["reason"]
    # In the words of the report's tables.
    assert found["reason"].startswith("QLoRA: its quality could not be told apart from ")
    assert "LoRA and DoRA" in found["reason"] or "DoRA and LoRA" in found["reason"]
    assert "(evaluation loss " in found["reason"]


def test_limits_come_first():
    assert choice("better", memory=4)["method"] == "qlora"
    assert choice("better", hours=650 / 3600)["method"] == "lora"
    nothing = choice("better", memory=1)
    assert nothing["method"] is None
    assert "QLoRA needs least memory" in nothing["reason"]


def test_one_seed_ties_within_the_margin_only():
    methods = {name: {**item, "seeds": 1} for name, item in METHODS.items()}
    assert choice("cannot tell", methods)["method"] == "lora"
    far = {**methods, "dora": method(1.2, 6, 660, seeds=1)}
    found = choice("cannot tell", far)
    assert found["method"] == "dora"
    assert "one seed" in found["reason"]


def test_a_method_whose_seeds_failed_is_not_tied_by_ignorance():
    methods = {**METHODS, "qlora": method(1.9, 3, 300, seeds=1)}
    found = choice("better", methods)
    assert found["method"] == "dora"
    near = choice("better", {**METHODS, "qlora": method(1.492, 3, 300, seeds=1)})
    assert near["method"] == "qlora"
    assert "2 of its 3 runs failed" in near["reason"]


def test_a_baseline_is_not_recommended_beside_methods_of_use():
    methods = {**METHODS, "prefix": method(1.0, 1, 1)}
    assert choice("better", methods)["method"] == "dora"


def test_the_pareto_set_holds_what_nothing_beats():
    methods: Any = {**METHODS, "full": method(1.52, 12, 1200)}
    assert pareto_set(pareto_points(methods, "eval_loss"), higher_is_better=False) == {"lora", "qlora", "dora"}
    assert pareto_set(pareto_points(methods, "eval_loss"), higher_is_better=True) == {"full", "qlora", "lora"}

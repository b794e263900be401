"""The smallest difference found: from the runs themselves, and nothing before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.comparison.conclusion import spreads_of
from rankwise.comparison.settings import CompareSettings
from rankwise.comparison.verdicts import Scores, wider_rates


def given(methods: str = "lora,dora", **more: Any) -> Any:
    return CompareSettings(model="demo", data="x.csv", output=Path("out"), methods=methods, **more)


def detectable_effect(given: Any, scores: Any, *, seeds: int) -> Any:
    return spreads_of(given, scores).effect(seeds, len(given.methods) - 1)


def test_nothing_is_promised_before_two_methods_have_two_seeds():
    apart = {"lora": Scores(values={0: 1.0, 1: 1.1}), "dora": Scores(values={1: 1.0, 2: 1.0})}
    for found in ({}, apart):
        effect = detectable_effect(given(), found, seeds=3)
        assert (effect["relative"], effect["absolute"]) == (None, None)


def test_no_effect_below_the_margin_is_promised():
    found = {name: scores(np.random.default_rng(0), 0.0) for name in ("lora", "dora")}
    assert detectable_effect(given(margin=0.2), found, seeds=10)["relative"] > 0.18


def scores(draw: np.random.Generator, row_noise: float) -> Scores:
    losses = 2 + draw.normal(0, 0.01, (3, 1)) + draw.normal(0, row_noise, 200)
    values = dict(enumerate(losses.mean(1).tolist()))
    return Scores(values=values, examples=dict(enumerate(losses.tolist())), ids=[str(index) for index in range(200)])


def test_the_effect_follows_from_the_spreads_of_the_runs():
    draw = np.random.default_rng(0)
    quiet, noisy = ({name: scores(draw, noise) for name in ("lora", "dora")} for noise in (0.01, 0.5))
    small, large = (detectable_effect(given(), found, seeds=3) for found in (quiet, noisy))
    assert large["absolute"] > 1.5 * small["absolute"]
    assert large["relative"] == pytest.approx(large["absolute"] / 2, rel=0.05)


def test_more_methods_need_a_larger_difference():
    draw = np.random.default_rng(0)
    found = {name: scores(draw, 0.1) for name in ("lora", "dora")}
    two, five = (
        detectable_effect(given(methods), found, seeds=3) for methods in ("lora,dora", "lora,dora,qlora,qdora,full")
    )
    assert (two["comparisons"], five["comparisons"]) == (1, 4)
    assert five["relative"] > 1.1 * two["relative"]


def test_the_run_that_would_decide_detects_the_margin_and_no_cheaper_one_does():
    draw = np.random.default_rng(0)
    known = spreads_of(given(margin=0.005), {name: scores(draw, 0.2) for name in ("lora", "dora")})
    seeds, methods, rates = 3, 2, 3
    assert known.effect(seeds, 1)["relative"] > 0.005
    runs, factor, count = known.deciding(seeds, methods, rates, anew=False)
    assert known.smallest(count, 1, factor) <= 0.005 * known.level
    assert known.smallest(count - 1, 1, factor) > 0.005 * known.level or count == 3
    assert runs == (methods * (count - seeds) if factor == 1 else methods * (rates + count - 1))


def test_one_seed_is_followed_by_two_more_and_hopeless_noise_by_nothing():
    assert spreads_of(given(), {}).deciding(1, 2, 3, anew=False) == (4, 1, 3)
    loud = {
        name: Scores(values=dict(enumerate(losses))) for name, losses in (("lora", [1.0, 9.0]), ("dora", [7.0, 2.0]))
    }
    assert spreads_of(given(margin=1e-6), loud).deciding(3, 2, 3, anew=False) is None


def test_rates_to_try_lie_beyond_the_edge():
    methods: Any = {
        name: {"learning_rate": rate, "learning_rate_at_edge": rate != 3e-4}
        for name, rate in (("low", 1e-4), ("middle", 3e-4), ("high", 1e-3))
    }
    assert wider_rates(methods, list(methods), dict.fromkeys(methods, (3e-4, 1e-4, 1e-3))) == [3.3e-5, 3.3e-3]

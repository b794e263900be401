"""The smallest difference found: from assumptions before there are runs, from the runs themselves after."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from rankwise.comparison import verdicts
from rankwise.comparison.conclusion import spreads_of
from rankwise.comparison.settings import CompareSettings
from rankwise.comparison.verdicts import Scores, Spreads, wider_rates


def given(methods: str = "lora,dora", **more: Any) -> Any:
    return CompareSettings(model="demo", data="x.csv", output=Path("out"), methods=methods, **more)


def spreads(given: Any, scores: Any, rows: int) -> Spreads:
    return spreads_of(given, scores, SimpleNamespace(eval_rows=rows))


def detectable_effect(given: Any, scores: Any, *, seeds: int, rows: int) -> Any:
    return spreads(given, scores, rows).effect(seeds, len(given.methods) - 1)


def test_rows_are_counted_for_the_loss_and_not_for_a_metric_of_a_task():
    few, many = (detectable_effect(given(seeds=5), {}, seeds=5, rows=rows)["relative"] for rows in (50, 5000))
    assert few > 1.3 * many
    assert detectable_effect(given(), {}, seeds=3, rows=50)["assumed"] == {"seed_sd": 0.005, "row_sd": 0.04}
    task = given(metric="e2e.BLEU", task=("e2e",))
    effects = [detectable_effect(task, {}, seeds=5, rows=rows) for rows in (50, 5000)]
    assert effects[0] == effects[1]
    assert effects[0]["assumed"]["row_sd"] == 0


def test_no_effect_below_the_margin_is_promised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verdicts, "SEED_SD", 0.0001)
    monkeypatch.setattr(verdicts, "ROW_SD", 0.0)
    effect = detectable_effect(given(seeds=10, margin=0.02), {}, seeds=10, rows=100)
    assert effect["relative"] > 0.018


def test_one_seed_promises_nothing():
    effect = detectable_effect(given(seeds=1), {}, seeds=1, rows=100)
    assert (effect["relative"], effect["absolute"]) == (None, None)


def test_one_evaluation_row_promises_nothing_for_the_loss():
    effect = detectable_effect(given(), {}, seeds=3, rows=1)
    assert (effect["relative"], effect["absolute"]) == (None, None)
    assert detectable_effect(given(metric="e2e.BLEU", task=("e2e",)), {}, seeds=3, rows=1)["relative"]


def scores(draw: np.random.Generator, row_noise: float) -> Scores:
    losses = 2 + draw.normal(0, 0.01, (3, 1)) + draw.normal(0, row_noise, 200)
    values = dict(enumerate(losses.mean(1).tolist()))
    return Scores(values, dict(enumerate(losses.tolist())), [str(index) for index in range(200)])


def test_finished_runs_replace_what_is_assumed():
    draw = np.random.default_rng(0)
    quiet, noisy = ({name: scores(draw, noise) for name in ("lora", "dora")} for noise in (0.01, 0.5))
    small, large = (detectable_effect(given(), found, seeds=3, rows=200) for found in (quiet, noisy))
    assert large["absolute"] > 1.5 * small["absolute"]
    assert large["relative"] == pytest.approx(large["absolute"] / 2, rel=0.05)
    assert large["assumed"] is None


@pytest.mark.parametrize("measured", [False, True])
def test_more_methods_need_a_larger_difference(measured):
    draw = np.random.default_rng(0)
    found = {name: scores(draw, 0.1) for name in ("lora", "dora")} if measured else {}
    two, five = (
        detectable_effect(given(methods), found, seeds=3, rows=200)
        for methods in ("lora,dora", "lora,dora,qlora,qdora,full")
    )
    assert (two["comparisons"], five["comparisons"]) == (1, 4)
    assert five["relative"] > 1.1 * two["relative"]


def test_methods_without_a_common_seed_measure_nothing():
    apart = {"lora": Scores({0: 1.0, 1: 1.1}), "dora": Scores({2: 1.0})}
    assert detectable_effect(given(), apart, seeds=3, rows=200) == detectable_effect(given(), {}, seeds=3, rows=200)


@pytest.mark.parametrize("measured", [False, True])
def test_the_run_that_would_decide_detects_the_margin_and_no_cheaper_one_does(measured):
    draw = np.random.default_rng(0)
    found = {name: scores(draw, 0.2) for name in ("lora", "dora")} if measured else {}
    known = spreads(given(margin=0.005), found, 200)
    seeds, methods, rates = 3, 2, 3
    assert known.effect(seeds, 1)["relative"] > 0.005
    runs, factor, count = known.deciding(seeds, methods, rates, anew=False)
    assert known.smallest(count, 1, factor) <= 0.005 * known.level
    assert known.smallest(count - 1, 1, factor) > 0.005 * known.level or count == 3
    assert runs == (methods * (count - seeds) if factor == 1 else methods * (rates + count - 1))


def test_noise_that_no_run_of_reasonable_size_overcomes_is_not_promised(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(verdicts, "SEED_SD", 0.5)
    assert spreads(given(margin=1e-6), {}, 100).deciding(3, 2, 3, anew=False) is None


def test_rates_to_try_lie_beyond_the_edge():
    methods: Any = {
        name: {"learning_rate": rate, "learning_rate_at_edge": rate != 3e-4}
        for name, rate in (("low", 1e-4), ("middle", 3e-4), ("high", 1e-3))
    }
    assert wider_rates(methods, list(methods), dict.fromkeys(methods, (3e-4, 1e-4, 1e-3))) == [3.3e-5, 3.3e-3]

"""The smallest difference found: from assumptions before there are runs, from the runs themselves after."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rankwise.comparison.detectable import detectable_effect
from rankwise.comparison.settings import CompareSettings
from rankwise.comparison.verdicts import Scores


def given(methods: str = "lora,dora", **more: Any) -> Any:
    return CompareSettings(model="demo", data="x.csv", output=Path("out"), methods=methods, **more)


def test_rows_are_counted_for_the_loss_and_not_for_a_metric_of_a_task():
    few, many = (detectable_effect(given(seeds=5), {}, seeds=5, rows=rows)["relative"] for rows in (50, 5000))
    assert few > 1.3 * many
    assert "--row-sd" in detectable_effect(given(), {}, seeds=3, rows=50)["assumption"]
    task = given(metric="e2e.BLEU", task=("e2e",))
    effects = [detectable_effect(task, {}, seeds=5, rows=rows) for rows in (50, 5000)]
    assert effects[0] == effects[1]
    assert "examples enough" in effects[0]["assumption"]


def test_no_effect_below_the_margin_is_promised():
    effect = detectable_effect(given(seeds=10, margin=0.02, seed_sd=0.0001, row_sd=0.0), {}, seeds=10, rows=100)
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
    assert "finished ones" in large["assumption"]


@pytest.mark.parametrize("measured", [False, True])
def test_more_methods_need_a_larger_difference(measured):
    draw = np.random.default_rng(0)
    found = {name: scores(draw, 0.1) for name in ("lora", "dora")} if measured else {}
    two, five = (
        detectable_effect(given(methods), found, seeds=3, rows=200)
        for methods in ("lora,dora", "lora,dora,qlora,qdora,full")
    )
    assert (two["comparisons"], five["comparisons"]) == (1, 10)
    assert five["relative"] > 1.2 * two["relative"]


def test_methods_without_a_common_seed_measure_nothing():
    apart = {"lora": Scores({0: 1.0, 1: 1.1}), "dora": Scores({2: 1.0})}
    assert detectable_effect(given(), apart, seeds=3, rows=200) == detectable_effect(given(), {}, seeds=3, rows=200)

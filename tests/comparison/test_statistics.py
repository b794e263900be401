"""Intervals and tests against scipy's own, against simulation, and against what must hold exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rankwise.comparison.statistics import (
    Estimate,
    holm,
    mean_of_seeds,
    minimum_detectable_effect,
    paired_by_example,
)
from rankwise.evaluation.errors_of_means import paired_difference


def test_the_interval_of_a_mean_is_students():
    values = [2.10, 2.13, 2.07, 2.11]
    estimate = mean_of_seeds(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert estimate.interval() == pytest.approx(expected)
    assert Estimate(0.5, ((0.04, 3.0),)).p_value() == pytest.approx(2 * stats.t.sf(2.5, 3))


def test_where_only_seeds_differ_it_is_the_paired_t_test_over_seeds():
    a, b = np.array([2.0, 2.2, 1.9]), np.array([1.7, 1.8, 1.75])
    spread = np.ones((1, 40))
    estimate = paired_by_example(a[:, None] * spread, b[:, None] * spread)
    expected = stats.ttest_rel(a, b)
    assert estimate.p_value() == pytest.approx(expected.pvalue)
    assert estimate.interval() == pytest.approx(tuple(expected.confidence_interval(0.95)))


def test_where_seeds_do_not_differ_it_is_the_clustered_error_of_the_examples():
    draw = np.random.default_rng(1)
    d = draw.normal(0.1, 1, 60)
    clusters = [index // 3 for index in range(60)]
    tokens = draw.integers(3, 30, 60)
    estimate = paired_by_example(np.tile(d, (3, 1)), np.zeros((3, 60)), weights=tokens, clusters=clusters)
    expected = paired_difference(d, np.zeros(60), clusters, tokens)
    assert estimate.mean == pytest.approx(expected.value)
    assert estimate.standard_error == pytest.approx(expected.standard_error)
    assert estimate.example_se == pytest.approx(expected.standard_error)
    assert estimate.seed_sd == 0


def test_the_difference_is_that_of_the_token_weighted_means():
    draw = np.random.default_rng(2)
    a, b, tokens = draw.random((2, 9)), draw.random((2, 9)), draw.integers(1, 50, 9)
    expected = np.mean([np.average(x, weights=tokens) - np.average(y, weights=tokens) for x, y in zip(a, b)])
    assert paired_by_example(a, b, weights=tokens).mean == pytest.approx(expected)


def test_copies_of_an_example_bring_no_certainty():
    draw = np.random.default_rng(3)
    a, b = draw.random((3, 20)), draw.random((3, 20))
    once = paired_by_example(a, b)
    copied = paired_by_example(np.repeat(a, 5, 1), np.repeat(b, 5, 1), clusters=np.repeat(np.arange(20), 5).tolist())
    assert copied.interval() == pytest.approx(once.interval())
    assert copied.clusters == 20


def test_the_level_of_the_p_value_is_where_the_interval_reaches_zero():
    estimate = Estimate(0.3, ((0.01, 2.0), (0.003, 99.0)))
    low, _ = estimate.interval(1 - estimate.p_value())
    assert low == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("seed_sd", [0.0, 0.02, 0.1])
def test_intervals_of_three_seeds_hold_what_they_promise(seed_sd):
    """Truth 0; nominal 95 %. Two methods' seeds, examples and their interaction all vary."""
    draw = np.random.default_rng(4)
    held = 0
    for _ in range(400):
        d = draw.normal(0, seed_sd, (3, 1)) + draw.normal(0, 0.3, (1, 200)) + draw.normal(0, 0.1, (3, 200))
        low, high = paired_by_example(d, np.zeros_like(d)).interval()
        held += low <= 0 <= high
    # Four standard errors below nominal would be 0.906; above it the interval may be wide, not useless.
    assert held / 400 >= 0.92


def test_a_single_seed_gives_no_interval():
    assert mean_of_seeds([2.0]).interval() is None
    estimate = paired_by_example([[1.0, 2.0, 3.0]], [[1.0, 1.5, 2.0]])
    assert estimate.interval() is None
    assert estimate.p_value() is None
    assert estimate.example_se > 0


def test_holm_corrects_by_rank_and_stays_monotone():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, None, 0.9]) == [1.0, None, 1.0]


def test_equivalence_is_two_one_sided_tests():
    estimate = Estimate(0.02, ((0.0004, 9.0),))
    lower = stats.t.sf((0.02 + 0.1) / 0.02, 9)
    upper = stats.t.sf((0.1 - 0.02) / 0.02, 9)
    assert estimate.equivalence_p(0.1) == pytest.approx(max(lower, upper))
    assert estimate.equivalence_p(0.01) > 0.5


def test_the_minimum_detectable_effect_is_found_four_times_in_five():
    draw = np.random.default_rng(5)
    effect = minimum_detectable_effect(seed_sd=1.0, seeds=4, comparisons=1)
    runs = draw.normal(0, 1, (2000, 2, 4))
    p_values = stats.ttest_rel(runs[:, 0] + effect, runs[:, 1], axis=1).pvalue
    assert 0.72 < np.mean(p_values < 0.05) < 0.88
    assert minimum_detectable_effect(seed_sd=1.0, seeds=1, comparisons=1) is None

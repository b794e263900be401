"""Intervals and tests against scipy's own, against simulation, and against what must hold exactly."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from rankwise.comparison.statistics import Estimate, mean_of_seeds, minimum_detectable_effect, paired_by_example, pooled
from rankwise.errors import RunError
from rankwise.evaluation.tasks.base import paired_difference


def spread_parts(
    seed_sd: float, seeds: int, row_sd: float, rows: int, rest_sd: float = 0.0
) -> list[tuple[float, float]]:
    """The parts of a difference's error for true spreads, that of seeds of one method."""
    return [((2 * seed_sd**2 + rest_sd**2 / rows) / seeds, seeds - 1.0), (row_sd**2 / rows, rows - 1.0)]


def test_the_interval_of_a_mean_is_students():
    values = [2.10, 2.13, 2.07, 2.11]
    estimate = mean_of_seeds(values)
    expected = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert estimate.interval() == pytest.approx(expected)
    assert Estimate(mean=0.5, parts=((0.04, 3.0),)).p_value() == pytest.approx(2 * stats.t.sf(2.5, 3))


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
    estimate = paired_by_example(np.tile(d, (3, 1)), np.zeros((3, 60)), clusters=clusters)
    expected = paired_difference(d, np.zeros(60), clusters)
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
    estimate = Estimate(mean=0.3, parts=((0.01, 2.0), (0.003, 99.0)))
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


@pytest.mark.parametrize(("seed_sd", "row_sd", "rest_sd"), [(0.05, 0.0, 0.01), (0.0, 0.3, 0.0), (0.0, 0.0, 0.3)])
def test_intervals_are_as_wide_as_their_sources_ask_and_no_wider(seed_sd, row_sd, rest_sd):
    """The square of the standard error is on the mean the variance, whatever its source is."""
    draw = np.random.default_rng(11)
    found = []
    for _ in range(300):
        d = draw.normal(0, seed_sd, (5, 1)) + draw.normal(0, row_sd, 300) + draw.normal(0, rest_sd, (5, 300))
        estimate = paired_by_example(d, np.zeros_like(d))
        found.append(estimate.standard_error**2)
        low, high = estimate.interval()
        # One source alone: Student's interval, with the degrees of freedom of that source; skewness adds little.
        reach = stats.t.ppf(0.975, 299 if row_sd else 4) * estimate.standard_error
        assert 0.65 * reach < (high - low) / 2 < 1.1 * reach
    assert np.mean(found) == pytest.approx(seed_sd**2 / 5 + row_sd**2 / 300 + rest_sd**2 / 1500, rel=0.15)


def test_a_single_seed_gives_no_interval():
    assert mean_of_seeds([2.0]).interval() is None
    estimate = paired_by_example([[1.0, 2.0, 3.0]], [[1.0, 1.5, 2.0]])
    assert estimate.interval() is None
    assert estimate.p_value() is None
    assert estimate.example_se > 0


def test_equivalence_is_two_one_sided_tests():
    estimate = Estimate(mean=0.02, parts=((0.0004, 9.0),))
    lower = stats.t.sf((0.02 + 0.1) / 0.02, 9)
    upper = stats.t.sf((0.1 - 0.02) / 0.02, 9)
    assert estimate.equivalence_p(0.1) == pytest.approx(max(lower, upper))
    assert estimate.equivalence_p(0.01) > 0.5


@pytest.mark.parametrize(
    ("seeds", "row_sd", "rest_sd", "margin"),
    [(3, 0.0, 0.0, 0.0), (3, 0.3, 0.1, 0.02), (5, 0.0, 0.1, 0.02), (10, 0.1, 0.05, 0.02)],
)
def test_the_minimum_detectable_effect_is_found_four_times_in_five(seeds, row_sd, rest_sd, margin):
    """Where rows dominate, and where it lies near the margin of equivalence."""
    draw = np.random.default_rng(5)
    parts = spread_parts(seed_sd=0.01, seeds=seeds, row_sd=row_sd, rows=200, rest_sd=rest_sd)
    effect = minimum_detectable_effect(parts, comparisons=1, margin=margin)
    found = 0
    for _ in range(400):
        d = effect + draw.normal(0, 0.01 * 2**0.5, (seeds, 1)) + draw.normal(0, row_sd, 200)
        d = d + draw.normal(0, rest_sd, (seeds, 200))
        estimate = paired_by_example(d, np.zeros_like(d))
        found += estimate.p_value() < 0.05 <= estimate.equivalence_p(margin)
    assert 0.74 < found / 400 < 0.88


@pytest.mark.parametrize("comparisons", [1, 2, 4])
def test_the_minimum_detectable_effect_counts_the_comparisons(comparisons):
    """With degrees of freedom without end the reach is the normal quantile."""
    expected = stats.norm.isf(0.025 / comparisons) + stats.norm.ppf(0.8)
    assert minimum_detectable_effect([(1.0, 1e7)], comparisons=comparisons) == pytest.approx(expected, rel=0.02)


def test_the_minimum_detectable_effect_needs_two_seeds_and_does_not_go_below_the_margin():
    assert minimum_detectable_effect((), comparisons=1) is None
    tiny = spread_parts(seed_sd=1e-6, seeds=10, row_sd=1e-5, rows=100)
    assert minimum_detectable_effect(tiny, comparisons=1, margin=0.1) == pytest.approx(0.1, rel=1e-3)


def test_measured_spreads_give_the_effect_that_the_true_ones_give():
    draw = np.random.default_rng(6)
    d = draw.normal(0, 0.02, (40, 30, 1)) + draw.normal(0, 0.3, (40, 1, 400)) + draw.normal(0, 0.1, (40, 30, 400))
    measured = pooled([paired_by_example(item, np.zeros_like(item)) for item in d], seeds=5).parts
    expected = spread_parts(seed_sd=0.02 / 2**0.5, seeds=5, row_sd=0.3, rows=400, rest_sd=0.1)
    assert minimum_detectable_effect(measured, comparisons=2) == pytest.approx(
        minimum_detectable_effect(expected, comparisons=2), rel=0.05
    )


def skewed(seed: int, seeds: int = 4, rows: int = 60) -> np.ndarray:
    draw = np.random.default_rng(seed)
    return draw.lognormal(0, 1, rows) - 1.2 + draw.normal(0, 0.1, (seeds, rows))


UNEVEN = np.repeat(np.arange(12), [20, 10, 7, 5, 4, 3, 3, 2, 2, 2, 1, 1]).tolist()


@pytest.mark.parametrize("clusters", [None, UNEVEN])
@pytest.mark.parametrize("seed", range(4))
def test_swapping_the_methods_negates_the_interval(seed, clusters):
    d = skewed(seed)
    one = paired_by_example(d, np.zeros_like(d), clusters=clusters)
    other = paired_by_example(np.zeros_like(d), d, clusters=clusters)
    low, high = one.interval()
    assert other.interval() == (-high, -low)
    assert other.p_value() == one.p_value()
    assert other.equivalence_p(0.4) == one.equivalence_p(0.4)


@pytest.mark.parametrize("factor", [1e-8, 3.0, 1e8])
def test_the_unit_does_not_matter(factor):
    d = skewed(1)
    one = paired_by_example(d, np.zeros_like(d), clusters=UNEVEN)
    other = paired_by_example(factor * d, np.zeros_like(d), clusters=UNEVEN)
    assert other.interval() == pytest.approx([factor * limit for limit in one.interval()])
    assert other.p_value() == pytest.approx(one.p_value())
    assert other.equivalence_p(factor * 0.4) == pytest.approx(one.equivalence_p(0.4))


def test_the_order_of_examples_and_seeds_does_not_matter():
    d, order = skewed(2), np.random.default_rng(0).permutation(60)
    one = paired_by_example(d, np.zeros_like(d), clusters=UNEVEN)
    other = paired_by_example(d[::-1, order], np.zeros_like(d), clusters=[UNEVEN[index] for index in order])
    assert other.interval() == pytest.approx(one.interval())


def test_the_interval_reaches_further_to_the_side_of_the_tail_and_no_less_to_the_other():
    estimate = paired_by_example(skewed(3), np.zeros((4, 60)))
    symmetric = Estimate(mean=estimate.mean, parts=estimate.parts)
    assert estimate.skewness > 0
    assert estimate.interval()[0] == symmetric.interval()[0]
    assert estimate.interval()[1] > symmetric.interval()[1]


def test_p_values_and_intervals_agree_on_both_sides():
    estimate = paired_by_example(skewed(3), np.zeros((4, 60)), clusters=UNEVEN)
    for shift in (-2.0, 2.0):
        moved = Estimate(mean=estimate.mean + shift, parts=estimate.parts, skewness=estimate.skewness)
        low, high = moved.interval(1 - moved.p_value())
        assert (high if moved.mean < 0 else low) == pytest.approx(0, abs=1e-9)


def test_differences_without_spread_are_sure():
    same = paired_by_example(np.full((3, 20), 1.3), np.full((3, 20), 1.3))
    assert (same.mean, same.interval(), same.p_value(), same.skewness) == (0, (0, 0), 1, 0)
    assert same.equivalence_p(0.1) == 0
    constant = paired_by_example(np.full((3, 20), 1.3), np.ones((3, 20)), clusters=UNEVEN[40:])
    assert constant.interval() == pytest.approx((0.3, 0.3))
    assert (constant.p_value(), constant.equivalence_p(0.2), constant.equivalence_p(0.4)) == (0, 1, 0)


def test_one_cluster_or_one_cluster_with_weight_gives_no_interval():
    d = skewed(0)
    assert paired_by_example(d, np.zeros_like(d), clusters=["x"] * 60).interval() is None
    alone = paired_by_example(d, np.zeros_like(d), weights=[1.0] + [0.0] * 59)
    assert (alone.interval(), alone.clusters) == (None, 1)


def test_one_cluster_of_nearly_all_examples_tells_little():
    d = skewed(0)
    low, high = paired_by_example(d, np.zeros_like(d), clusters=["x"] * 59 + ["y"]).interval()
    assert low < -1 < 1 < high


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_what_is_not_a_number_is_refused(wrong):
    d = skewed(0)
    d[1, 3] = wrong
    for call in (lambda: paired_by_example(d, np.zeros_like(d)), lambda: mean_of_seeds([1.0, wrong])):
        with pytest.raises(RunError, match="RW589"):
            call()
    with pytest.raises(RunError, match="RW589"):
        paired_by_example(np.ones((2, 2)), np.zeros((2, 2)), weights=[1.0, wrong])


@pytest.mark.parametrize(("sizes", "before"), [((83, 41, *[16] * 11), 0.09), ((3,) * 100, 0.08)])
def test_skewed_effects_of_rows_are_rarely_called_a_difference(sizes, before):
    """Lognormal effects of opposite signs with mean 0; Student's t over clusters, ``before``, found more."""
    draw = np.random.default_rng(8)
    clusters = np.repeat(np.arange(len(sizes)), sizes)
    false, students = 0, 0
    for _ in range(400):
        d = 2 * (draw.lognormal(0, 1.5, 300) - np.exp(1.5**2 / 2)) + draw.normal(0, 0.1, (5, 300))
        false += paired_by_example(d, np.zeros_like(d), clusters=clusters.tolist()).p_value() < 0.05
        sums = np.bincount(clusters, weights=d.mean(0) - d.mean())
        error = np.sqrt(len(sizes) / (len(sizes) - 1) * np.sum(sums**2)) / 300
        students += 2 * stats.t.sf(abs(d.mean()) / error, len(sizes) - 1) < 0.05
    assert students / 400 > before
    assert false / 400 <= 0.055


@pytest.mark.parametrize(("rows", "is_sure"), [(9, False), (40, False), (20_000, True)])
def test_equal_answers_to_a_few_rows_do_not_make_methods_equal(rows: int, is_sure: bool) -> None:
    right = np.ones((2, rows))
    found = paired_by_example(right, right).equivalence_p(0.01)
    assert found is not None
    assert (found < 0.05) == is_sure

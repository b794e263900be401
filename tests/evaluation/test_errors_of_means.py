"""Standard errors: against textbook formulas, and against the spread over many draws."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest

from rankwise.evaluation.tasks.base import clusters_of, mean_of, paired_difference


def test_without_clusters_it_is_the_standard_error_of_the_mean():
    scores = [0.0, 1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    found = mean_of(scores)
    assert found.value == pytest.approx(5 / 7)
    assert found.standard_error == pytest.approx(statistics.stdev(scores) / math.sqrt(7))


def test_repeating_each_question_does_not_shrink_the_clustered_error():
    scores = [0.0, 1.0, 1.0, 0.0, 1.0]
    once = mean_of(scores)
    thrice = mean_of(scores * 3, [str(index) for index in range(5)] * 3)
    assert thrice.standard_error == pytest.approx(once.standard_error)
    assert mean_of(scores * 3).standard_error < once.standard_error
    assert thrice.clusters == 5


def test_the_weighted_mean_is_the_mean_over_tokens():
    losses, tokens = [2.0, 1.0, 4.0], [10, 30, 10]
    assert mean_of(losses, weights=tokens).value == pytest.approx((20 + 30 + 40) / 50)


def test_the_clustered_error_is_the_spread_over_many_samples():
    random = np.random.default_rng(0)
    means, errors = [], []
    for _ in range(400):
        sources = random.normal(size=40)
        scores = np.repeat(sources, 5) + 0.3 * random.normal(size=200)
        found = mean_of(scores.tolist(), np.repeat(np.arange(40), 5).tolist())
        means.append(found.value)
        errors.append(found.standard_error)
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.1)


def test_a_paired_difference_is_tighter_than_two_separate_means():
    random = np.random.default_rng(1)
    hardness = random.normal(size=300)
    a, b = (hardness + 0.1 * random.normal(size=300) for _ in range(2))
    paired = paired_difference(a.tolist(), b.tolist())
    apart = math.hypot(mean_of(a.tolist()).standard_error, mean_of(b.tolist()).standard_error)
    assert paired.value == pytest.approx(a.mean() - b.mean())
    assert paired.standard_error < apart / 3
    low, high = paired.interval
    assert low < paired.value < high


@pytest.mark.parametrize("scores", [[], [1.0]])
def test_too_few_questions_have_no_error(scores):
    assert mean_of(scores).standard_error is None
    assert mean_of(scores).interval is None


@pytest.mark.parametrize("sources", [4, 12])
def test_intervals_of_few_sources_hold_the_truth_as_often_as_they_say(sources: int):
    """With the normal distribution's 1.96 they would hold it in 86 % of draws from four sources."""
    random = np.random.default_rng(3)
    names = np.repeat(np.arange(sources), 5).tolist()
    draws = random.normal(size=(1500, sources, 1)) + 0.3 * random.normal(size=(1500, sources, 5))
    intervals = [mean_of(draw.ravel().tolist(), names).interval for draw in draws]
    assert np.mean([low <= 0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.02)


def test_questions_without_a_source_stand_for_themselves():
    assert clusters_of([None, None]) is None
    named = clusters_of(["a", None, "a", None])
    assert named[0] == named[2]
    assert len(set(named)) == 3

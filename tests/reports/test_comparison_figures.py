"""The numbers, the pairs, the Pareto line and the examples of the comparison report."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from comparison_folders import write_comparison
from hypothesis import given
from hypothesis import strategies as st

from rankwise.reports import numbers
from rankwise.reports.comparison import load_comparison
from rankwise.reports.examples import answers_of, evenly
from rankwise.reports.page import page
from rankwise.reports.plotted import Spot, pairs_of, pareto_front


@pytest.fixture
def comparison(tmp_path):
    write_comparison(tmp_path)
    return load_comparison(tmp_path)


@pytest.mark.parametrize(
    ("mean", "interval", "expected"),
    [
        (1.28134, [1.2771, 1.2855], ("1.2813", "±\u202f0.0042")),
        (63.27, [62.1, 64.44], ("63.3", "±\u202f1.2")),
        (1234.5, [1100.0, 1369.0], ("1,234", "±\u202f134")),
        (0.5, None, ("0.5000", "")),
        (float("nan"), None, ("–", "")),
        (-0.5, [-0.6, -0.4], ("\u22120.50", "±\u202f0.10")),
    ],
)
def test_a_mean_has_the_digits_that_its_interval_supports(mean, interval, expected):
    assert numbers.estimate(mean, interval) == expected


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (numbers.byte_size, 2_741_234_567, "2.74 GB"),
        (numbers.span, (10.616, 10.70), "10.616 to 10.700"),
        (numbers.byte_size, None, "–"),
        (numbers.short_count, 4_884_480, "4.88M"),
        (numbers.duration, 48.4, "48 s"),
        (numbers.duration, 220, "3 min 40 s"),
        (numbers.duration, 8100, "2 h 15 min"),
        (numbers.rate, 2e-4, "2e-4"),
        (numbers.p_value, 0.0004, "< 0.001"),
        (numbers.significant, 123_456, "123,000"),
    ],
)
def test_figures_as_people_write_them(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (-0.0212, [-0.0293, -0.0131], ("\u22120.0212", "± 0.0081")),
        (0.592, [0.0969, 2.611], ("+0.6", "(0.1 to 2.6)")),
        (0.592, None, ("+0.59", "")),
    ],
)
def test_an_interval_with_unequal_sides_is_written_out(value, interval, text):
    assert numbers.difference(value, interval) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12), st.integers(1, 6))
def test_significant_digits_are_near_the_value(value, digits):
    text = numbers.significant(value, digits).replace(",", "").replace("\u2212", "-")
    # Eight decimals are the most that are written.
    assert float(text) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=1e-8)


@given(st.text())
def test_visible_text_has_no_hidden_character_but_line_ends(text):
    shown = numbers.visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown)


def test_in_every_pair_the_better_mean_stands_first(comparison):
    for metric in ("eval_loss", "e2e.BLEU"):
        higher = comparison.is_higher_better(metric)
        pairs = pairs_of(comparison, metric)
        assert len(pairs) == 6
        for pair in pairs:
            assert pair.difference >= 0 if higher else pair.difference <= 0
            means = [comparison["methods"][name]["mean"][metric] for name in (pair.a, pair.b)]
            assert pair.difference == pytest.approx(means[0] - means[1])
            assert pair.interval[0] <= pair.difference <= pair.interval[1]
            assert pair.verdict != "worse"


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=12)


@given(points, st.booleans())
def test_the_pareto_line_is_what_brute_force_finds(values, higher):
    spots = [
        Spot(str(index), cost, quality, (cost, cost), None, (cost, cost))
        for index, (cost, quality) in enumerate(values)
    ]
    sign = 1 if higher else -1

    def beaten(spot):
        return any(
            other.cost <= spot.cost
            and sign * other.quality >= sign * spot.quality
            and (other.cost, other.quality) != (spot.cost, spot.quality)
            for other in spots
        )

    front = pareto_front(spots, higher_is_better=higher)
    assert {spot.method for spot in front} == {spot.method for spot in spots if not beaten(spot)}
    assert [spot.cost for spot in front] == sorted(spot.cost for spot in front)


def test_costs_that_ranges_do_not_part_let_nothing_onto_the_pareto_line():
    better = Spot("lora", 9.8, 2.70, (9.0, 10.6), None, (9.0, 10.6))
    faster = Spot("dora", 9.0, 2.71, (8.2, 9.8), None, (8.2, 9.8))
    assert pareto_front([better, faster], higher_is_better=False) == [better]
    apart = Spot("dora", 7.0, 2.71, (6.5, 7.5), None, (6.5, 7.5))
    assert pareto_front([better, apart], higher_is_better=False) == [apart, better]
    # One seed: no range, so the better figure alone counts.
    once = [Spot(spot.method, spot.cost, spot.quality, spot.cost_range, None) for spot in (better, apart)]
    assert pareto_front(once, higher_is_better=False) == once[:1]


def test_outcomes_follow_the_scores_and_add_up(comparison):
    answers = answers_of(comparison)
    assert answers[0].method == comparison["recommendation"]["method"]
    assert {item.method for item in answers} == {"lora", "qlora", "dora", "qdora"}
    for item in answers:
        assert item.total == 60
        assert list(item.counts) == ["higher BLEU", "lower BLEU", "same BLEU"]
        assert all(item.counts.values())
        for example in item.shown:
            gap = example.answer.score - example.base.score
            assert example.change == ("better" if gap > 0 else "worse" if gap < 0 else "same")


def test_a_lower_loss_is_called_that_and_right_answers_right(tmp_path):
    write_comparison(tmp_path)
    file = tmp_path / "comparison.json"
    document = json.loads(file.read_text())
    before = next(item.counts for item in answers_of(load_comparison(tmp_path)) if item.method == "dora")
    document["base"]["tasks"]["e2e"]["higher_is_better"]["BLEU"] = False
    file.write_text(json.dumps(document))
    after = next(item.counts for item in answers_of(load_comparison(tmp_path)) if item.method == "dora")
    assert after == before
    assert list(after) == ["lower BLEU", "higher BLEU", "same BLEU"]
    document["base"]["tasks"]["e2e"]["higher_is_better"]["BLEU"] = True
    file.write_text(json.dumps(document))
    for rows in tmp_path.rglob("predictions.jsonl"):
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        for row in found:
            row |= {"scores": {"BLEU": float(row["scores"]["BLEU"] > 50)}, "is_cut": True}
        rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    item = next(item for item in answers_of(load_comparison(tmp_path)) if item.method == "dora")
    assert list(item.counts) == ["now right", "now wrong", "as right or wrong as before"]
    assert {answer.judgement for example in item.shown for answer in (example.base, example.answer)} == {
        "right",
        "wrong",
    }
    assert all(example.answer.text.endswith("(cut at the limit of tokens)") for example in item.shown)
    html = page(load_comparison(tmp_path))
    assert not re.search(r"\b(won|lost)\b", html)


@given(st.integers(0, 200), st.integers(1, 20))
def test_examples_are_taken_evenly(total, count):
    chosen = evenly(list(range(total)), count)
    assert len(chosen) == min(total, count)
    assert len(set(chosen)) == len(chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1

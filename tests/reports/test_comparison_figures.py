"""The numbers, the pairs and the examples of the comparison report."""

from __future__ import annotations

import itertools
import json
import re

import pytest
from comparison_folders import write_comparison
from hypothesis import given
from hypothesis import strategies as st

from rankwise.reports import numbers
from rankwise.reports.comparison import Comparison
from rankwise.reports.page import _bar, answers_of, evenly, page


@pytest.fixture
def comparison(tmp_path):
    return Comparison(write_comparison(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("mean", "interval", "expected"),
    [
        (1.28134, [1.2771, 1.2855], ("1.2813", "±\u202f0.0042")),
        (63.27, [62.1, 64.44], ("63.3", "±\u202f1.2")),
        (1234.5, [1100.0, 1369.0], ("1,234", "±\u202f134")),
        (0.5, None, ("0.5000", "")),
        (None, None, ("–", "")),
        (-0.5, [-0.6, -0.4], ("\u22120.50", "±\u202f0.10")),
    ],
)
def test_a_mean_has_the_digits_that_its_interval_supports(mean, interval, expected):
    assert numbers.estimate(mean, interval) == expected


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (numbers.byte_size, 2_741_234_567, "2.74 GB"),
        (numbers.byte_size, None, "–"),
        (numbers.short_count, 4_884_480, "4.88M"),
        (numbers.duration, 48.4, "48 s"),
        (numbers.duration, 220, "3 min 40 s"),
        (numbers.duration, 8100, "2 h 15 min"),
        (numbers.rate, 2e-4, "2e-4"),
        (numbers.significant, 123_456, "123,000"),
    ],
)
def test_figures_as_people_write_them(function, value, text):
    assert function(value) == text


@pytest.mark.parametrize(
    ("value", "interval", "text"),
    [
        (-0.0212, [-0.0293, -0.0131], ("\u22120.0212", "±\u202f0.0081")),
        (0.592, [0.0969, 2.611], ("+0.6", "(0.1 to 2.6)")),
        (0.592, None, ("+0.59", "")),
    ],
)
def test_an_interval_with_unequal_sides_is_written_out(value, interval, text):
    assert numbers.estimate(value, interval, signed=True) == text


@given(st.floats(allow_nan=False, allow_infinity=False, min_value=-1e12, max_value=1e12), st.integers(1, 6))
def test_significant_digits_are_near_the_value(value, digits):
    text = numbers.significant(value, digits).replace(",", "").replace("\u2212", "-")
    # Eight decimals are the most that are written.
    assert float(text) == pytest.approx(value, rel=0.51 * 10 ** (1 - digits), abs=1e-8)


@given(st.text())
def test_visible_text_has_no_hidden_character_but_line_ends(text):
    shown = numbers.visible(text)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e\u2066-\u2069]", shown)


def test_the_bar_of_a_loss_does_not_reach_below_zero():
    facts = {
        "interval": {"x": [-0.02, 0.08]},
        "per_seed": {"x": {"0": 0.02, "1": 0.04}},
        "higher_is_better": {"x": False},
    }
    assert _bar(facts, "x") == [0.0, 0.08]
    assert _bar({**facts, "higher_is_better": {"x": True}}, "x") == [-0.02, 0.08]


def test_in_every_pair_the_better_mean_stands_first(comparison):
    pairs = comparison.differences_from_best()
    assert len(pairs) == 3
    for pair in pairs:
        assert pair["difference"] <= 0
        means = [comparison["methods"][pair[side]]["mean"]["eval_loss"] for side in "ab"]
        assert pair["difference"] == pytest.approx(means[0] - means[1])
        assert pair["interval"][0] <= pair["difference"] <= pair["interval"][1]
        assert pair["verdict"] != "worse"


def test_outcomes_follow_the_scores_and_add_up(comparison):
    answers = answers_of(comparison)
    assert answers[0].method == comparison["recommendation"]["method"]
    assert {item.method for item in answers} == {"lora", "qlora", "dora", "qdora"}
    for item in answers:
        assert sum(item.counts.values()) == 60
        assert list(item.counts) == ["higher BLEU", "lower BLEU", "same BLEU"]
        assert all(item.counts.values())
        for example in item.shown:
            old, new = (float(words.removeprefix("BLEU ")) for _, words in (example.base, example.answer))
            assert example.outcome.split()[0] == ("higher" if new > old else "lower" if new < old else "same")


def test_a_lower_loss_is_called_that_and_right_answers_right(tmp_path):
    document = write_comparison(tmp_path)
    better = document["base"]["tasks"]["e2e"]["higher_is_better"]

    def answers():
        return next(item for item in answers_of(Comparison(document, tmp_path)) if item.method == "dora")

    before = answers().counts
    better["BLEU"] = False
    after = answers().counts
    assert after == before
    assert list(after) == ["lower BLEU", "higher BLEU", "same BLEU"]
    better["BLEU"] = True
    for rows in tmp_path.rglob("predictions.jsonl"):
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        for row in found:
            row |= {"scores": {"BLEU": float(row["scores"]["BLEU"] > 50)}, "is_cut": True}
        rows.write_text("".join(json.dumps(row) + "\n" for row in found))
    item = answers()
    assert list(item.counts) == ["now right", "now wrong", "as right or wrong as before"]
    assert {words for example in item.shown for _, words in (example.base, example.answer)} == {"right", "wrong"}
    assert all(example.answer[0].endswith("(cut at the limit of tokens)") for example in item.shown)
    assert not re.search(r"\b(won|lost)\b", page(Comparison(document, tmp_path)))


@given(st.integers(0, 200), st.integers(1, 20))
def test_examples_are_taken_evenly(total, count):
    chosen = evenly(list(range(total)), count)
    assert len(chosen) == min(total, count)
    assert len(set(chosen)) == len(chosen)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert not gaps or max(gaps) - min(gaps) <= 1

"""Planted truths, the correction, and what one seed allows to say."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from rankwise.comparison.results import conclusions
from rankwise.comparison.statistics import LOOKS
from rankwise.comparison.verdicts import Scores, Spreads, compare_all, next_seeds, retentions

NEUTRAL = {"equivalent", "cannot tell"}


def simulated(draw: np.random.Generator, gap: float, seeds: int = 3) -> Scores:
    """Losses around 2 of a method: seeds spread by 0.5 %, examples by half, and each run adds its own noise."""
    examples = np.random.default_rng(7).normal(0, 0.5, 150)
    losses = 2 + gap + draw.normal(0, 0.01, (seeds, 1)) + examples + draw.normal(0, 0.1, (seeds, 150))
    values = {seed: float(row.mean()) for seed, row in enumerate(losses)}
    return Scores(
        values=values,
        examples={seed: row.tolist() for seed, row in enumerate(losses)},
        ids=[str(i) for i in range(150)],
    )


def verdicts(gap: float, times: int, names: tuple[str, ...] = ("one", "two")) -> list[str]:
    found = []
    for number in range(times):
        draw = np.random.default_rng(1000 + number)
        methods = {name: simulated(draw, gap * index) for index, name in enumerate(names)}
        found.append(compare_all("eval_loss", methods, higher_is_better=False, relative_margin=0.01)[0]["verdict"])
    return found


def test_the_same_method_under_two_names_is_not_told_apart():
    assert sum(verdict in NEUTRAL for verdict in verdicts(0.0, 100)) >= 95


def test_a_true_gap_is_found_and_has_the_right_sign():
    found = verdicts(0.2, 100)
    assert found.count("better") >= 95
    assert "worse" not in found


def test_the_best_of_five_is_rarely_called_worse():
    """Only its own four comparisons can do so: p-values are corrected for four and not for ten pairs."""
    wrong = 0
    for number in range(100):
        draw = np.random.default_rng(5000 + number)
        methods = {name: simulated(draw, 0.0 if name == "a" else 1e-9) for name in "abcde"}
        found = compare_all("eval_loss", methods, higher_is_better=False, relative_margin=0.01)
        assert {item["comparisons"] for item in found} == {4}
        wrong += any(item["verdict"] == "worse" for item in found if item["a"] == "a")
    assert wrong <= 8


def test_verdicts_are_those_of_p_values_times_the_comparisons_with_the_best():
    methods = {name: simulated(np.random.default_rng(number), 0.03 * number) for number, name in enumerate("abcd")}
    found = compare_all("eval_loss", methods, higher_is_better=False, relative_margin=0.01)
    told = {item["verdict"] for item in found}
    assert {"better", "cannot tell"} <= told
    for item in found:
        assert (item["p_value"] * 3 < 0.05) == (item["verdict"] in ("better", "worse"))


def test_a_method_that_is_not_tuned_is_not_judged_and_counts_in_no_correction():
    methods = {name: simulated(np.random.default_rng(number), 0.5 * number) for number, name in enumerate("abc")}
    found = compare_all("eval_loss", methods, higher_is_better=False, relative_margin=0.01, untuned={"c"})
    assert [item["verdict"] for item in found] == ["better", "not tuned", "not tuned"]
    assert {item["comparisons"] for item in found} == {1}


def test_runs_that_are_equal_to_the_bit_are_equivalent():
    scores = simulated(np.random.default_rng(1), 0.0)
    (found,) = compare_all("eval_loss", {"a": scores, "b": scores}, higher_is_better=False, relative_margin=0.01)
    assert found["verdict"] == "equivalent"
    assert found["difference"] == 0


def test_a_difference_below_the_margin_that_is_sure_is_equivalence():
    base = np.random.default_rng(2).normal(2, 0.5, (3, 400))
    noise = np.random.default_rng(3).normal(0.002, 0.0005, (3, 400))
    ids = [str(index) for index in range(400)]
    a = Scores(values=dict(enumerate(base.mean(1))), examples=dict(enumerate(base.tolist())), ids=ids)
    b = Scores(
        values=dict(enumerate((base + noise).mean(1))), examples=dict(enumerate((base + noise).tolist())), ids=ids
    )
    (found,) = compare_all("eval_loss", {"a": a, "b": b}, higher_is_better=False, relative_margin=0.01)
    assert found["p_value"] < 0.001
    assert found["verdict"] == "equivalent"


def test_equivalence_to_the_best_at_the_margin_is_false_in_one_comparison_of_twenty():
    """Four methods, of which three differ from the first by the margin."""
    false = 0
    for number in range(200):
        draw = np.random.default_rng(9000 + number)
        values = {name: 2 + 0.02 * (name != "a") + draw.normal(0, 0.002, 6) for name in "abcd"}
        scores = {name: Scores(values=dict(enumerate(found.tolist()))) for name, found in values.items()}
        found = compare_all("t.loss", scores, higher_is_better=False, relative_margin=0.02 / 2.015)
        false += any(item["verdict"] == "equivalent" for item in found if item["a"] == "a")
    assert false <= 15


def test_one_seed_gives_figures_and_no_verdict():
    methods = {name: simulated(np.random.default_rng(index), 0.5 * index, seeds=1) for index, name in enumerate("ab")}
    (found,) = compare_all("eval_loss", methods, higher_is_better=False, relative_margin=0.01)
    assert found["verdict"] == "cannot tell"
    assert found["interval"] is None
    assert found["p_value"] is None
    assert found["pairs"] == 150


def test_a_corpus_metric_is_paired_by_seed_alone_and_higher_may_be_better():
    methods = {"a": Scores(values={0: 70.1, 1: 70.3, 2: 70.2}), "b": Scores(values={0: 65.0, 1: 65.3, 2: 65.1})}
    (found,) = compare_all("e2e.BLEU", methods, higher_is_better=True, relative_margin=0.01)
    assert found["verdict"] == "better"
    assert not found["paired_by_example"]
    assert found["seeds"] == 3


def test_seeds_that_only_one_method_has_are_left_out():
    methods = {"a": Scores(values={0: 1.0, 1: 2.0}), "b": Scores(values={1: 1.5, 2: 9.0})}
    (found,) = compare_all("t.m", methods, higher_is_better=True, relative_margin=0.01)
    assert found["difference"] == 0.5
    assert found["seeds"] == 1


MARGIN = 0.02


def kept_of(true_loss: float, number: int, seeds: int = 3) -> list[str]:
    """The verdicts on four methods that truly lost this share of the base's loss: rows change by 8 % of it, runs
    by 0.2 %, and each row of a run by 4 %. The base was measured once.
    """
    draw = np.random.default_rng(9000 + number)
    rows, tokens = draw.lognormal(0.7, 0.5, 200), draw.integers(20, 80, 200).astype(float)
    level = float(np.average(rows, weights=tokens))
    ids = [str(index) for index in range(200)]
    base = Scores(values={0: level}, examples={0: rows.tolist()}, ids=ids, weights=tokens.tolist())
    methods = {}
    for name in "abcd":
        noise = draw.normal(0, 0.08, 200) + draw.normal(0, 0.04, (seeds, 200)) + draw.normal(0, 0.002, (seeds, 1))
        losses = rows + level * (true_loss + noise)
        values = {seed: float(np.average(row, weights=tokens)) for seed, row in enumerate(losses)}
        methods[name] = Scores(
            values=values, examples={s: row.tolist() for s, row in enumerate(losses)}, ids=ids, weights=tokens.tolist()
        )
    return [item["verdict"] for item in retentions(methods, base, relative_margin=MARGIN).values()]


def test_planted_losses_are_found_and_none_is_found_where_there_is_none():
    """Of 100 comparisons each: all four methods lost twice the margin, or nothing."""
    lost, nothing = ([kept_of(loss, number) for number in range(100)] for loss in (2 * MARGIN, 0.0))
    found = [sum(said[method] == "lost" for said in lost) for method in range(4)]
    assert min(found) >= 95, found
    assert sum("kept" in said for said in lost) <= 5
    assert sum("lost" in said for said in nothing) <= 5


@pytest.mark.parametrize(("true_loss", "seeds", "said"), [(-0.1, 3, "kept"), (0.0, 1, "cannot tell")])
def test_a_loss_that_fell_is_kept_and_one_seed_tells_nothing(true_loss: float, seeds: int, said: str):
    assert set(kept_of(true_loss, 1, seeds)) == {said}


def looking(scores: Scores, seeds: int | None = None) -> Scores:
    """Its first seeds, in a comparison that looks at two methods."""
    return dataclasses.replace(scores.first(seeds or len(scores.values)), looks=(("one", "two"),))


@pytest.mark.parametrize(("looks", "least", "most"), [(True, 0, 15), (False, 25, 300)])
def test_verdicts_at_nine_looks_are_as_rarely_wrong_as_at_one(looks: bool, least: int, most: int):
    """Of 300 comparisons without a difference; with the fixed level at every look more than 25 are wrong."""
    wrong = 0
    for number in range(300):
        draw = np.random.default_rng(number)
        one, two = (Scores(values=dict(enumerate(2 + draw.normal(0, 0.01, LOOKS[-1])))) for _ in range(2))
        seen = [(one.first(look), two.first(look)) for look in LOOKS]
        pairs = [dict(zip(("one", "two"), map(looking, pair) if looks else pair)) for pair in seen]
        said = [compare_all("x", pair, higher_is_better=False, relative_margin=1e-9)[0]["verdict"] for pair in pairs]
        wrong += any(verdict in ("better", "worse") for verdict in said)
    assert least <= wrong <= most


def test_between_looks_and_before_the_first_one_nothing_new_is_told():
    one, two = (simulated(np.random.default_rng(number), 0.3 * number, seeds=6) for number in (0, 1))

    def told(seeds: int) -> Any:
        pair = {"one": looking(one, seeds), "two": looking(two, seeds)}
        return compare_all("x", pair, higher_is_better=False, relative_margin=0.01)[0]

    assert (told(2)["verdict"], told(2)["p_value"]) == ("cannot tell", None)
    assert told(5)["p_value"] == told(4)["p_value"] != told(6)["p_value"]
    assert told(5)["interval"] == told(4)["interval"]


@pytest.mark.parametrize(("row_noise", "expected"), [(0.001, {"lora": 4, "dora": 4}), (5.0, {})])
def test_more_seeds_are_run_where_seeds_and_not_rows_hide_the_difference(row_noise: float, expected: dict[str, int]):
    draw, facts = np.random.default_rng(0), {"ranges": {}, "trainable_parameters": None, "alone": False}
    facts |= {"seeds": 3, "learning_rate_at_edge": False, "retained": None}
    scores = {}
    for name in ("lora", "dora"):
        losses = 2 + draw.normal(0, 0.05, (3, 1)) + draw.normal(0, row_noise, 150)
        values = dict(enumerate(losses.mean(1).tolist()))
        plain = Scores(
            values=values, examples=dict(enumerate(losses.tolist())), ids=[str(index) for index in range(150)]
        )
        scores[name] = dataclasses.replace(plain, looks=(("lora", "dora"),))
    methods: Any = {name: {**facts, "mean": {"x": np.mean([*item.values.values()])}} for name, item in scores.items()}
    spreads = Spreads(scores, metric="x", margin=0.01)
    found = conclusions(methods, {"x": scores}, {"x": False}, spreads, {})
    assert next_seeds(found, scores, spreads, {"lora": 3, "dora": 3}) == expected
    assert spreads.of_rows(3) == (not expected)

"""``report.html``: one file that contains its style, runs no script and makes no network request.

Answers of the adapted models stand beside the base model's, by the task's own score of each example. Where answers are
right or wrong, that is said; otherwise a score is higher or lower, which is no judgement of an answer. The examples
shown are not chosen by hand: they are spread evenly over those of each outcome.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from markupsafe import Markup

from rankwise.foreign import Fields, JsonObject
from rankwise.objectives import OBJECTIVES
from rankwise.reports import plots, summary
from rankwise.reports.comparison import Comparison, unit_of
from rankwise.reports.numbers import capital, percent, plural, shortened, significant, visible
from rankwise.reports.plots import Curve, Losses, Spot
from rankwise.reports.words import heading, headline, last_part, method_name, method_numbers, metric_name

TEMPLATES = Path(__file__).parent / "templates"


def page(comparison: Comparison) -> str:
    """The report as HTML. Everything that comes from a file is escaped, figures included."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    dark = f"@media screen and (prefers-color-scheme: dark) {{ {plots.DARK} }}\n"
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8") + dark)
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html").render(**_content(comparison), style=style)


def _content(comparison: Comparison) -> JsonObject:
    numbers = method_numbers(comparison["methods"])
    metric, recommendation = comparison.metric, comparison["recommendation"]
    differences = comparison.differences_from_best()
    columns = summary.columns(comparison)
    return {
        "title": summary.title(comparison),
        "data": visible(last_part(comparison["data"]["train"]["source"])),
        "created": comparison["created"][:10],
        "heading": heading(comparison.document),
        "verdict": headline(comparison.document),
        "recommendation": recommendation,
        "basis": summary.basis(comparison),
        "columns": columns,
        "rows": [
            (name, [(key, columns[key], summary.cell(comparison["methods"][name], key)) for key in columns])
            for name in comparison.ranked()
        ],
        "base_row": summary.base_row(comparison),
        "verdict_note": summary.verdict_note(comparison),
        "has_intervals": summary.seeds_of(comparison) > 1,
        "metric": metric_name(metric),
        "unit": unit_of(comparison.document),
        "reference": comparison.reference,
        "loss_name": capital(OBJECTIVES[comparison.objective].loss_name),
        "better": "higher is better" if comparison.is_higher_better(metric) else "lower is better",
        "forest": plots.forest(differences) if differences else "",
        "margin": significant(differences[0]["margin"], 2) if differences else "",
        "comparisons": summary.correction(comparison),
        "standing": plots.standing(comparison["standings"], numbers, recommendation["best"])
        if comparison["standings"]
        else "",
        "tradeoffs": _tradeoffs(comparison, numbers),
        **_retained(comparison, numbers),
        **_curves(comparison, numbers),
        "stopped": summary.stopped_rates(comparison),
        "answers": answers_of(comparison),
        "messages": [*summary.left_out(comparison), *summary.warnings_of(comparison)],
        "command": visible(comparison["command"]),
        "swatch": lambda name: plots.swatch(numbers[name]),
        "method_name": method_name,
        "plural": plural,
    }


def _tradeoffs(comparison: Comparison, numbers: Mapping[str, int]) -> list[Markup]:
    """Quality against memory, and against time where no runs took place side by side."""
    metric, found = comparison.metric, []
    for key, scale, axis in (
        ("peak_memory_bytes", 1e9, "peak memory, GB"),
        ("wall_seconds", 60.0, "time a run, minutes"),
    ):
        spots = []
        for name in comparison.ranked():
            facts = comparison["methods"][name]
            if facts[key] is not None and (key != "wall_seconds" or facts["alone"]):
                reach = [cost / scale for cost in facts["ranges"][key]]
                spots.append(Spot(name, facts[key] / scale, facts["mean"][metric], reach, _bar(facts, metric)))
        if spots:
            found.append(plots.quality_against_cost(spots, numbers, axis, metric_name(metric)))
    return found


def _bar(facts: Fields, metric: str) -> Sequence[float] | None:
    """The interval of the mean; of a loss without what lies below zero, where no loss is."""
    interval = facts["interval"][metric]
    is_loss = not facts["higher_is_better"][metric] and min(facts["per_seed"][metric].values()) >= 0
    return [max(0.0, bound) for bound in interval] if interval and is_loss else interval


def _retained(comparison: Comparison, numbers: Mapping[str, int]) -> JsonObject:
    """Quality against what was lost; without --retain nothing."""
    metric, spots = comparison.metric, []
    measured = [name for name in comparison.ranked() if comparison["methods"][name]["retained"] is not None]
    if not measured:
        return {"retained": ""}
    # The base's loss and the margin are those of every method.
    base = comparison["methods"][measured[0]]["retained"]
    scale = base["base"] / 100
    for name in measured:
        facts = comparison["methods"][name]
        interval, rise = facts["retained"]["interval"], facts["retained"]["difference"] / scale
        reach = interval and [bound / scale for bound in interval]
        spots.append(Spot(name, rise, facts["mean"][metric], reach, _bar(facts, metric)))
    margin, what = base["margin"] / base["base"], comparison["data"]["retain"]
    axis = "loss on the retained rows, change in %"
    return {
        "retained": plots.quality_against_cost(spots, numbers, axis, metric_name(metric), 100 * margin),
        "retained_rows": f"{plural(what['rows'], 'question' if what['unit'] == 'question' else 'row')} of "
        f"{visible(last_part(what['source']))}",
        "retained_base": f"{significant(base['base'], 4)} nats per {what['unit']}",
        "retained_margin": percent(margin),
    }


def _curves(comparison: Comparison, numbers: Mapping[str, int]) -> JsonObject:
    curves = []
    for run in comparison["runs"]:
        losses = Losses.of(comparison.metrics_of(run), run.get("kept_step"))
        if losses.training or losses.evaluation:
            curves.append(Curve(run["method"], run["phase"] == "final", losses))
    limits = plots.curve_limits(curves)
    searches = {name: search for name, search in comparison["learning_rates"].items() if search["tried"]}
    return {
        "curves": [
            (name, plots.curve_panel(name, numbers[name], curves, limits))
            for name in dict.fromkeys(curve.method for curve in curves)
        ],
        "rates": plots.rates(searches, numbers) if any(len(item["tried"]) > 1 for item in searches.values()) else "",
    }


# --- answers of the adapted models beside the base model's ---


# The outcomes of a method whose score is better, worse, and the same.
RIGHT_OR_WRONG = ("now right", "now wrong", "as right or wrong as before")
AGAINST_A_CONSTANT = (
    "right where the constant is wrong",
    "wrong where the constant is right",
    "as right or wrong as the constant",
)
# Number of examples that are shown for each outcome, method and task.
SHOWN = 4
LONGEST_TEXT = 1200
# The end of an answer that its limit of tokens ended.
CUT = " … (cut at the limit of tokens)"


@dataclasses.dataclass(frozen=True)
class ShownExample:
    """A prompt with the base model's answer and the method's, each with its score in words."""

    prompt: str
    references: Sequence[str]
    base: tuple[str, str]
    answer: tuple[str, str]
    outcome: str


@dataclasses.dataclass(frozen=True)
class ShownAnswers:
    """One method against the base model on one task: the number of each outcome, and some examples of each."""

    method: str
    # What was answered, in words: a task, or the rows of the evaluation data.
    place: str
    counts: Mapping[str, int]
    shown: Sequence[ShownExample]


def answers_of(comparison: Comparison) -> list[ShownAnswers]:
    """The answers of each method to each task that the base model was measured on; the recommended method first."""
    chosen = comparison["recommendation"]["method"]
    found = []
    for task in comparison["base"]["tasks"]:
        base = comparison.answers_of(comparison["base"], task)
        for name in sorted(comparison.ranked(), key=lambda name: name != chosen):
            rows = comparison.answers_of(_shown_run(comparison, name), task)
            if any(row["prediction"] for row in rows.values()):
                found.append(_compared(comparison, task, name, base, rows))
    return [answers for answers in found if answers.counts]


def _shown_run(comparison: Comparison, method: str) -> Fields:
    """The recommended run if it is this method's, else the method's final run with the lowest seed."""
    runs = [run for run in comparison.finals if run["method"] == method]
    return min(runs, key=lambda run: (run["id"] != comparison["recommendation"]["run"], run["seed"]))


def _compared(
    comparison: Comparison, task: str, method: str, base: Mapping[str, Fields], rows: Mapping[str, Fields]
) -> ShownAnswers:
    place = "the evaluation rows" if task in ("perplexity", "labels") else visible(task)
    result = comparison["base"]["tasks"][task]
    known = next(iter(rows.values()))["scores"]
    score = result["primary"] if result["primary"] in known else min(known, default="")
    pairs = [(base[key], rows[key]) for key in base if key in rows and score in base[key]["scores"]]
    higher = result["higher_is_better"].get(score, True)
    is_right = all(row["scores"][score] in (0, 1) for pair in pairs for row in pair)
    more, less = f"higher {visible(score)}", f"lower {visible(score)}"
    words = (more, less, f"same {visible(score)}") if higher else (less, more, f"same {visible(score)}")
    if is_right:
        words = AGAINST_A_CONSTANT if OBJECTIVES[comparison.objective].of_labels else RIGHT_OR_WRONG

    def answer(row: Fields) -> tuple[str, str]:
        value = row["scores"][score]
        right = "right" if (value == 1) == higher else "wrong"
        text = row["prediction"] + CUT * row.get("is_cut", False)
        return _clean(text), right if is_right else f"{visible(score)} {significant(value)}"

    examples: dict[str, list[ShownExample]] = {word: [] for word in words}
    for before, after in pairs:
        old, new = before["scores"][score], after["scores"][score]
        is_same = math.isclose(old, new, rel_tol=1e-6)
        outcome = words[2] if is_same else words[0] if (new > old) == higher else words[1]
        references = [_clean(text) for text in (before.get("references") or ())[:3]]
        prompt = _clean(before["prompt"])
        examples[outcome].append(ShownExample(prompt, references, answer(before), answer(after), outcome))
    shown = [item for found in examples.values() for item in evenly(_changed_first(found), SHOWN)]
    return ShownAnswers(method, place, {word: len(found) for word, found in examples.items() if pairs}, shown)


def evenly(items: Sequence[ShownExample], count: int) -> list[ShownExample]:
    """``count`` of the items, spread evenly over the whole list."""
    if len(items) <= count:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * count)] for index in range(count)]


def _changed_first(items: Sequence[ShownExample]) -> Sequence[ShownExample]:
    """The items whose two answers differ, if there are any: equal texts show nothing."""
    answered = [item for item in items if item.base[0] and item.answer[0]]
    return [item for item in answered if item.base[0] != item.answer[0]] or answered


def _clean(text: str) -> str:
    return visible(shortened(text, LONGEST_TEXT)).strip()

"""``report.html``: one file that contains its style, runs no script and makes no network request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from rankwise.foreign import JsonObject
from rankwise.reports import plots, summary
from rankwise.reports.comparison import Comparison, unit_of
from rankwise.reports.examples import answers_of
from rankwise.reports.naming import last_part, method_name, method_numbers, metric_name
from rankwise.reports.numbers import capital, percent, plural, significant, visible
from rankwise.reports.plots import Curve, Losses, Spot
from rankwise.reports.words import heading, headline

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
        "loss_name": capital(plots.LOSS_NAMES.get(comparison.objective, "loss")),
        "better": "higher is better" if comparison.is_higher_better(metric) else "lower is better",
        "forest": plots.forest(differences) if differences else "",
        "margin": significant(differences[0]["margin"], 2) if differences else "",
        "comparisons": differences[0]["comparisons"] if differences else 0,
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
                spots.append(Spot(name, facts[key] / scale, facts["mean"][metric], reach, facts["interval"][metric]))
        if spots:
            found.append(plots.quality_against_cost(spots, numbers, axis, metric_name(metric)))
    return found


def _retained(comparison: Comparison, numbers: Mapping[str, int]) -> JsonObject:
    """Quality against what was lost; without --retain nothing."""
    metric, spots = comparison.metric, []
    for name in comparison.ranked():
        facts = comparison["methods"][name]
        if (kept := facts["retained"]) is not None:
            base, scale, interval = kept, kept["base"] / 100, kept["interval"]
            reach = interval and [bound / scale for bound in interval]
            rise = kept["difference"] / scale
            spots.append(Spot(name, rise, facts["mean"][metric], reach, facts["interval"][metric]))
    if not spots:
        return {"retained": ""}
    margin, what = base["margin"] / base["base"], comparison["data"]["retain"]
    axis = "loss on what must stay, change in %"
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

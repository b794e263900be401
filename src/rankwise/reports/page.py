"""``report.html``: one file that contains its style and its script and makes no network request.

A content security policy allows the one script by its hash. Nothing in a prompt or a name could run, even if it were
not escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from pathlib import Path

from markupsafe import Markup

from rankwise.foreign import Fields, JsonObject
from rankwise.reports import plots, summary
from rankwise.reports.comparison import Comparison
from rankwise.reports.examples import answers_of
from rankwise.reports.losses import loss_name
from rankwise.reports.naming import method_name, method_numbers, metric_name
from rankwise.reports.numbers import (
    byte_size,
    capital,
    duration,
    is_number,
    p_value,
    percent,
    plural,
    rate,
    significant,
    visible,
)
from rankwise.reports.plotted import curves_of, losses_of, pairs_of, spots_of, with_best
from rankwise.reports.words import heading, headline, limits_in_words

TEMPLATES = Path(__file__).parent / "templates"
TIME_UNITS = (("hours", 3600.0), ("minutes", 60.0), ("seconds", 1.0))


def page(comparison: Comparison) -> str:
    """The report as HTML. Everything that comes from a file is escaped, figures included."""
    script = Markup((TEMPLATES / "report.js").read_text(encoding="utf-8"))
    dark = f"@media screen and (prefers-color-scheme: dark) {{ {plots.DARK} }}\n"
    style = Markup((TEMPLATES / "report.css").read_text(encoding="utf-8") + dark)
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'; "
        f"script-src 'sha256-{_sha256(script)}'"
    )
    return rendered("report.html", **_content(comparison), policy=policy, script=script, style=style)


def rendered(template: str, **content: object) -> Markup:
    """A template with ``content``, which is escaped unless it is Markup."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["capitalize_first"] = capital
    return Markup(environment.get_template(template).render(**content))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")


def _content(comparison: Comparison) -> JsonObject:
    numbers = method_numbers(comparison["methods"])
    metric = comparison.metric
    return {
        "title": summary.title(comparison),
        "model": summary.model_title(comparison),
        "data": summary.data_title(comparison),
        "created": str(comparison["created"])[:10],
        "verdict": headline(comparison.document),
        "recommendation": _recommendation(comparison),
        "has_one_seed": summary.seeds_of(comparison) == 1,
        "trust": summary.trust(comparison),
        "columns": summary.columns(comparison),
        "rows": summary.rows(comparison),
        "verdict_note": summary.verdict_note(comparison),
        "metric": metric_name(metric),
        "unit": comparison.unit,
        "reference": comparison.reference,
        "loss_name": loss_name(comparison.objective),
        "better": "higher is better" if comparison.is_higher_better(metric) else "lower is better",
        "metrics_table": _metrics_table(comparison),
        "forest": _forest(comparison),
        "tradeoffs": _tradeoffs(comparison, numbers),
        "retained": _retained(comparison, numbers),
        "memory": _memory(comparison, numbers),
        **_curves(comparison, numbers),
        "answers": answers_of(comparison),
        "warnings": summary.told_warnings(comparison),
        "left_out": summary.left_out(comparison),
        "runs": _runs(comparison),
        "reproduce": _reproduce(comparison),
        "swatch": lambda name: plots.swatch(numbers.get(name, 0)),
        "method_name": method_name,
        "metric_name": metric_name,
        "plural": plural,
    }


def _recommendation(comparison: Comparison) -> JsonObject:
    given = comparison["recommendation"]
    keys = ("method", "config", "command", "adapter", "run")
    texts = {key: visible(given[key]) if given.get(key) else "" for key in keys}
    texts["deciding"] = visible((given.get("deciding") or {}).get("command") or "")
    more = {"heading": heading(comparison.document), "decided": given.get("decided")}
    return {
        **texts,
        **more,
        "limits": limits_in_words(given.get("limits") or {}),
    }


def _metrics_table(comparison: Comparison) -> JsonObject:
    metrics = summary.all_metrics(comparison)
    methods = comparison["methods"]
    lines = [(name, [summary.cell(methods[name], metric) for metric in metrics]) for name in comparison.with_result()]
    base = {
        f"{task}.{key}": value
        for task, result in comparison["base"].get("tasks", {}).items()
        for key, value in (result.get("metrics") or {}).items()
    }
    starts = [run["record"].get("initial_eval_loss") for run in comparison.finals if run["record"]]
    # A constant has a loss of its own.
    base["eval_loss"] = base.get("labels.loss", next((value for value in starts if is_number(value)), None))
    return {"metrics": metrics, "rows": lines, "base": [significant(base.get(metric), 4) for metric in metrics]}


def _forest(comparison: Comparison) -> JsonObject:
    pairs = with_best(comparison, pairs_of(comparison, comparison.metric))
    everything = [pair for metric in summary.all_metrics(comparison) for pair in pairs_of(comparison, metric)]
    margin = pairs[0].margin if pairs else None
    return {
        "svg": plots.forest(pairs) if pairs else "",
        "margin": significant(margin, 2) if margin else "",
        "corrected": max((item["comparisons"] for item in comparison["differences"]), default=0),
        "all": [
            {
                "pair": pair,
                "metric": metric_name(pair.metric),
                "p": p_value(pair.p_value),
                "equivalence_p": p_value(pair.equivalence_p),
                "margin": significant(pair.margin, 2),
                "seed_sd": significant(pair.seed_sd, 2),
            }
            for pair in everything
        ],
    }


def _tradeoffs(comparison: Comparison, numbers: Mapping[str, int]) -> list[Markup]:
    limits = comparison["recommendation"].get("limits") or {}
    seconds = [run["record"]["wall_seconds"] for run in comparison.finals if _seconds(run)]
    longest = max(seconds, default=0.0)
    unit, size = next((item for item in TIME_UNITS if longest > 2 * item[1]), TIME_UNITS[-1])
    limit_time = 3600 * limits["hours"] / size if is_number(limits.get("hours")) else None
    limit_memory = limits["memory_bytes"] / 1e9 if is_number(limits.get("memory_bytes")) else None
    metric = metric_name(comparison.metric)
    found = []
    for key, scale, axis, limit in (
        ("peak_memory_bytes", 1e9, "peak memory, GB", limit_memory),
        ("wall_seconds", size, f"time a run, {unit}", limit_time),
    ):
        if spots := spots_of(comparison, key, scale):
            higher = comparison.is_higher_better(comparison.metric)
            found.append(plots.quality_against_cost(spots, numbers, axis, metric, higher_is_better=higher, limit=limit))
    return found


def _retained(comparison: Comparison, numbers: Mapping[str, int]) -> JsonObject:
    """Quality against what was lost; without --retain nothing."""
    spots = losses_of(comparison)
    if not spots:
        return {"svg": ""}
    kept = comparison["methods"][spots[0].method]["retained"]
    margin, metric = kept["margin"] / kept["base"], comparison.metric
    svg = plots.quality_against_cost(
        spots,
        numbers,
        "loss on what must stay, change in %",
        metric_name(metric),
        higher_is_better=comparison.is_higher_better(metric),
        limit=100 * margin,
        limit_name="margin",
    )
    what = comparison["data"].get("retain") or {}
    rows, unit = what.get("rows"), what.get("unit", "token")
    measured = plural(int(rows), "row") if is_number(rows) else "the rows of --retain"
    if unit == "question":
        measured = f"{plural(int(what['rows']), unit)} of {visible(what['source'])}"
    found = {"svg": svg, "base": significant(kept["base"], 4), "margin": percent(margin)}
    return {**found, "rows": measured, "unit": unit}


def _seconds(run: Fields) -> bool:
    return bool(run["record"]) and is_number(run["record"].get("wall_seconds"))


def _memory(comparison: Comparison, numbers: Mapping[str, int]) -> JsonObject:
    limit = (comparison["recommendation"].get("limits") or {}).get("memory_bytes")
    methods = comparison["methods"]
    shown = {name: methods[name] for name in comparison.ranked() if is_number(methods[name]["peak_memory_bytes"])}
    return {
        "svg": plots.memory(shown, numbers, limit if is_number(limit) else None) if shown else "",
        "predicted": any(is_number(facts["predicted_peak_memory_bytes"]) for facts in shown.values()),
        "has_limit": is_number(limit),
    }


def _curves(comparison: Comparison, numbers: Mapping[str, int]) -> JsonObject:
    curves = curves_of(comparison)
    limits = plots.curve_limits(curves)
    panels = []
    for name in comparison.ranked():
        own = [curve for curve in curves if curve.method == name]
        finals = [curve for curve in own if curve.is_final]
        best = min((curve.losses.best[1] for curve in finals if curve.losses.best), default=None)
        note = plural(len(finals), "final run") + (f", best {best:.3f}" if best is not None else "")
        if own:
            svg = plots.curve_panel(name, numbers[name], curves, limits)
            panels.append({"method": name, "svg": svg, "note": note})
    return {
        "curves": panels,
        "is_cut": any(loss > limits[1] for curve in curves for _, loss in curve.losses.evaluation),
        "has_search": any(not curve.is_final for curve in curves),
        "rates": plots.rates(comparison["learning_rates"], numbers),
        "stopped": summary.stopped_rates(comparison),
    }


def _runs(comparison: Comparison) -> list[JsonObject]:
    records = [(run, run["record"] or {}) for run in comparison["runs"]]
    return [
        {
            "method": run["method"],
            "seed": run["seed"],
            "rate": rate(run["learning_rate"]),
            "phase": run["phase"],
            "status": run["status"],
            "loss": significant(record.get("eval_loss"), 5),
            "kept": record.get("kept_step") or "–",
            "memory": byte_size(record.get("peak_memory_bytes")),
            "memory_sort": record.get("peak_memory_bytes") or "",
            "time": duration(record.get("wall_seconds")),
            "time_sort": record.get("wall_seconds") or "",
            "folder": visible(run["folder"]),
        }
        for run, record in records
    ]


def _broken(command: str) -> str:
    """The command on several lines, as a shell reads it. A command with quotes is left as it is."""
    return command if any(quote in command for quote in "'\"\\") else command.replace(" --", " \\\n    --")


def _reproduce(comparison: Comparison) -> JsonObject:
    recommended = comparison["recommendation"].get("config")
    path = comparison.folder / str(recommended).replace("\\", "/").rpartition("/")[2] if recommended else None
    text = path.read_text(encoding="utf-8", errors="replace") if path is not None and path.is_file() else ""
    return {
        "command": _broken(visible(comparison["command"])),
        "config": visible(text),
        "config_name": path.name if path else "",
        "tables": [
            ("Settings", summary.settings_rows(comparison["settings"])),
            ("Base model", summary.settings_rows(comparison["model"])),
            ("Data", summary.settings_rows(comparison["data"])),
            ("Versions", summary.settings_rows(comparison["versions"])),
            ("Device", summary.settings_rows(comparison["device"])),
        ],
        "seconds": duration(comparison["seconds"]),
    }

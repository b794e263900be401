"""How far a report can be trusted, and the rows of its tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from rankwise.foreign import Fields, Json
from rankwise.reports.comparison import KEPT_ROWS_LOSS, RETAINED, RETAINED_LOSS, Comparison
from rankwise.reports.examples import EVALUATION_ROWS
from rankwise.reports.naming import last_part, long_name, method_name, metric_in_sentence, metric_name
from rankwise.reports.numbers import (
    byte_size,
    difference,
    duration,
    estimate,
    is_number,
    listed,
    percent,
    plural,
    rate,
    short_count,
    significant,
    visible,
)

# Verdicts as their column is sorted.
ORDER = ("better", "best", "equivalent", "cannot tell", "not tuned", "worse", "")


@dataclasses.dataclass(frozen=True)
class Fact:
    """One item of the list that says how far to trust the report. ``is_weak`` marks a reason to be careful."""

    title: str
    value: str
    note: str
    is_weak: bool = False


@dataclasses.dataclass(frozen=True)
class Cell:
    """A cell of the table: its text, its sort key, and the interval."""

    text: str
    sort: float | str | None = None
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    method: str
    # ``recommended`` or ``best so far``; empty for the other methods.
    mark: str
    cells: tuple[Cell, ...]


def seeds_of(comparison: Comparison) -> int:
    """The largest number of seeds that a method finished with."""
    return max((int(facts["seeds"] or 0) for facts in comparison["methods"].values()), default=0)


def title(comparison: Comparison) -> str:
    names = [method_name(name) for name in comparison["methods"]]
    return f"{listed(names)} on {model_title(comparison)}" if names else "Comparison of methods"


def model_title(comparison: Comparison) -> str:
    """The last part of the base model's name."""
    model = comparison["model"]
    name = model.get("base_model") or model.get("name") or comparison["settings"].get("model") or "a model"
    return visible(last_part(name))


def data_title(comparison: Comparison) -> str:
    train = _part(comparison, "train")
    source = train.get("source") or comparison["settings"].get("data") or "the data"
    return visible(last_part(source))


def trust(comparison: Comparison) -> list[Fact]:
    """The facts that say how far to trust the report, from what was run to the hardware."""
    facts = [_learned(comparison), _seeds(comparison), _evaluated(comparison), _test(comparison), _tuning(comparison)]
    return [fact for fact in [*facts, _hardware(comparison)] if fact is not None]


def _learned(comparison: Comparison) -> Fact | None:
    if comparison.objective == "sft":
        return None
    if comparison.objective == "classify":
        return Fact("Learned from", "Texts with labels", "compared with the best answer that is the same for every row")
    sources = {"dpo": "Pairs of answers (DPO)", "kto": "Marked answers (KTO)"}
    note = "a reward says how much likelier than its base a run makes an answer: beta times the log-ratio"
    return Fact("Learned from", sources.get(comparison.objective) or visible(comparison.objective), note)


def _seeds(comparison: Comparison) -> Fact:
    seeds = seeds_of(comparison)
    finals = [run for run in comparison["runs"] if run["phase"] == "final" and run["status"] != "skipped"]
    finished = sum(run["status"] == "finished" for run in finals)
    search = sum(run["phase"] == "search" for run in comparison["runs"])
    note = f"{finished} of {plural(len(finals), 'final run')} finished"
    note += f", {search} more tried learning rates" if search else ""
    text = plural(seeds, "seed") if seeds != 1 else "1 seed, no interval"
    return Fact("Repeated", text, note, seeds < 3 or finished < len(finals))


def _evaluated(comparison: Comparison) -> Fact:
    rows = _part(comparison, "eval").get("rows")
    tasks = [
        f"{'what must stay' if name == RETAINED else visible(name)}: {plural(int(result.get('count') or 0), 'example')}"
        for name, result in comparison["base"].get("tasks", {}).items()
        if name not in EVALUATION_ROWS
    ]
    overlap = comparison["data"].get("overlap")
    if is_number(overlap) and overlap:
        tasks.append(f"{plural(int(overlap), 'row')} of it also in the training data")
    text = plural(int(rows), "row") if is_number(rows) else "the evaluation data"
    return Fact("Evaluated on", text, "; ".join(tasks) or "the same for every run", bool(overlap))


def _test(comparison: Comparison) -> Fact | None:
    items = [item for item in comparison["differences"] if item["metric"] == comparison.metric]
    if not items:
        return None
    if seeds_of(comparison) < 2:
        return Fact("Tested", "Not at all", "one seed cannot tell a difference from luck", True)
    tested = [item for item in items if item["p_value"] is not None]
    if not tested:
        is_single = any(item["seeds"] > 1 for item in items)
        why = (
            "the evaluation data hold a single row or prompt"
            if is_single
            else "no two methods share two finished seeds"
        )
        return Fact("Tested", "Not at all", why, True)
    paired = all(item["paired_by_example"] for item in tested)
    how = "Paired by example" if paired else "Paired by seed"
    count = plural(tested[0]["comparisons"], "comparison")
    note = f"corrected for {count} with the best method, {percent(comparison['confidence'])} intervals"
    return Fact("Tested", how, note)


def _tuning(comparison: Comparison) -> Fact | None:
    searches = comparison["learning_rates"]
    counts = {name: len(search.get("tried") or []) for name, search in searches.items()}
    if not counts:
        return None
    edge = [method_name(name) for name, search in searches.items() if search.get("at_edge")]
    most = max(counts.values())
    if most < 2:
        return Fact("Tuned", "One learning rate", "no search: the rate may suit one method more than another", True)
    equal = len(set(counts.values())) == 1
    text = f"{most} rates for each method" if equal else f"{min(counts.values())} to {most} rates a method"
    note = f"at the edge of the rates tried: {listed(edge)}" if edge else "each at its best, none at the edge"
    if stopped_rates(comparison):
        note += "; by short runs, judged on training rows"
    return Fact("Tuned", text, note, bool(edge) or not equal)


def stopped_rates(comparison: Comparison) -> list[str]:
    """A line for each method whose rates were searched by halving: which rates stopped after how many steps."""
    lines = []
    for name, search in comparison["learning_rates"].items():
        tried = [item for item in search.get("tried") or [] if item.get("metric") == KEPT_ROWS_LOSS]
        by_steps: dict[int, list[str]] = {}
        for item in tried:
            if item["learning_rate"] != search["chosen"]:
                by_steps.setdefault(item["steps"] or 0, []).append(rate(item["learning_rate"]))
        stopped = [f"{listed(rates)} after {plural(steps, 'step')}" for steps, rates in sorted(by_steps.items())]
        if tried:
            lines.append(f"{method_name(name)}: {', '.join(stopped)}; {rate(search['chosen'])} was taken")
    return lines


def _hardware(comparison: Comparison) -> Fact | None:
    device = comparison["device"]
    if not device:
        return None
    threads = device.get("threads")
    more = [str(device.get("dtype") or ""), plural(int(threads), "thread") if is_number(threads) else ""]
    more += [] if all(run["alone"] for run in comparison.finals) else ["runs side by side: no times are compared"]
    name = visible(device.get("name") or device.get("type") or "unknown")
    return Fact("Hardware", name, ", ".join(part for part in [str(device.get("type") or ""), *more] if part))


def columns(comparison: Comparison) -> list[tuple[str, str]]:
    """The (key, heading) pairs of the table: the primary metric, each task's own metric, then the costs."""
    best = comparison["recommendation"].get("best")
    found = [
        ("verdict", f"Against {method_name(best)}" if best else "Verdict"),
        (comparison.metric, metric_name(comparison.metric)),
    ]
    for metric in shown_metrics(comparison):
        found.append((metric, metric_name(metric)))
    if any(facts.get("retained") for facts in comparison["methods"].values()):
        found.append(("retained", "What must stay"))
    return [
        *found,
        ("trainable_parameters", "Trainable"),
        ("adapter_bytes", "On disk"),
        ("peak_memory_bytes", "Peak memory"),
        ("tokens_per_second", "Tokens/s"),
        ("wall_seconds", "Time a run"),
        ("learning_rate", "Learning rate"),
        ("serving", "Can be served"),
    ]


def shown_metrics(comparison: Comparison) -> list[str]:
    """The metrics besides the primary one: the evaluation loss, and the primary metric of each task."""
    primary = ["eval_loss", *(f"{name}.{result.get('primary')}" for name, result in _tasks(comparison).items())]
    known = all_metrics(comparison)
    shown = [metric for metric in dict.fromkeys(primary) if metric in known]
    # What must stay has a column of its own.
    return [metric for metric in shown if metric not in (comparison.metric, RETAINED_LOSS)]


def all_metrics(comparison: Comparison) -> list[str]:
    found = dict.fromkeys(metric for facts in comparison["methods"].values() for metric in facts["mean"])
    return [comparison.metric, *(metric for metric in found if metric != comparison.metric)] if found else []


def rows(comparison: Comparison) -> list[Row]:
    """Methods with a result, the best first."""
    found, methods = comparison["recommendation"], comparison["methods"]
    mark = {found.get("method"): "recommended" if found.get("decided") else "best so far"}
    keys = [key for key, _ in columns(comparison)]
    return [
        Row(name, mark.get(name, ""), tuple(cell(methods[name], key) for key in keys))
        for name in comparison.with_result()
    ]


FORMATS = {
    "trainable_parameters": short_count,
    "adapter_bytes": byte_size,
    "peak_memory_bytes": byte_size,
    "tokens_per_second": significant,
    "wall_seconds": duration,
}


def cell(facts: Fields, key: str) -> Cell:
    """The figure ``key`` of a method as a cell."""
    if key == "verdict":
        said = (facts["verdict"] or {}).get("verdict", "")
        return Cell("–" if said in ("best", "") else said, ORDER.index(said))
    if key == "retained":
        if (kept := facts.get("retained")) is None:
            return Cell("–")
        return Cell(kept["verdict"], kept["difference"] / kept["base"], change_of(kept))
    if key == "serving":
        places = [visible(place) for place in facts["serving"]]
        return Cell("; ".join(places) or "–", len(places))
    if key == "learning_rate":
        value = facts["learning_rate"]
        note = "edge" if facts["learning_rate_at_edge"] else ""
        return Cell(rate(value), value if is_number(value) else None, note)
    if key in FORMATS:
        value = facts[key]
        return Cell(FORMATS[key](value), value if is_number(value) else None)
    mean = facts["mean"].get(key)
    text, note = estimate(mean, facts["interval"].get(key))
    return Cell(text, mean if is_number(mean) else None, note)


def change_of(kept: Fields) -> str:
    """``+3.2 % ± 0.5``: the change of the loss on what must stay, as a share of the base's."""
    interval = kept["interval"] and [100 * bound / kept["base"] for bound in kept["interval"]]
    change, reach = difference(100 * kept["difference"] / kept["base"], interval)
    return f"{change} % {reach}".strip()


def verdict_note(comparison: Comparison) -> str:
    best = comparison["recommendation"].get("best")
    if not best or seeds_of(comparison) < 2:
        return "Verdicts need at least two seeds."
    told = f"Verdicts compare each method with {long_name(best)} on {metric_in_sentence(comparison.metric)}."
    return (
        f"{told} “Not tuned”: the best rate lies at the edge of those tried, so the method is neither better nor worse."
    )


def left_out(comparison: Comparison) -> list[dict[str, str]]:
    """Methods and runs that have no figures, with the reason."""
    found = [
        {"what": method_name(name), "kind": "skipped", "code": "", "why": visible(facts["skipped"])}
        for name, facts in comparison["methods"].items()
        if facts["skipped"]
    ]
    skipped = {name for name, facts in comparison["methods"].items() if facts["skipped"]}
    for run in comparison["runs"]:
        is_whole = run["status"] == "finished" and not run["error"]
        if is_whole or (run["status"] == "skipped" and run["method"] in skipped):
            continue
        error = run["error"] or {}
        why = visible(error.get("message") or "no reason was recorded")
        what = f"{method_name(run['method'])}, seed {run['seed']}, learning rate {rate(run['learning_rate'])}"
        found.append(
            {
                "what": what,
                "kind": "not measured" if run["status"] == "finished" else str(run["status"]),
                "code": str(error.get("code") or ""),
                "why": why,
            }
        )
    return found


def told_warnings(comparison: Comparison) -> list[dict[str, str]]:
    """Warnings of the comparison and of its runs, each once, with the number of runs that had it."""
    counts: dict[tuple[str, str], int] = {}
    for run in comparison["runs"]:
        for item in (run["record"] or {}).get("warnings") or []:
            key = (str(item.get("code") or ""), str(item.get("message") or ""))
            counts[key] = counts.get(key, 0) + 1
    own = {(str(item.get("code") or ""), str(item.get("message") or "")): 0 for item in comparison["warnings"]}
    return [
        {"code": code, "message": visible(message), "runs": plural(count, "run") if count else ""}
        for (code, message), count in (own | counts).items()
    ]


def settings_rows(settings: Fields) -> list[tuple[str, str]]:
    return [(visible(name), plain(value)) for name, value in settings.items() if value is not None]


def plain(value: Json) -> str:
    """A setting, a version or a fact as text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{visible(key)}: {plain(item)}" for key, item in value.items()) or "–"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(plain(item) for item in value) or "–"
    return visible(value)


def _tasks(comparison: Comparison) -> Fields:
    """Task -> result, of the base model or of the first run that has it."""
    found = dict(comparison["base"].get("tasks", {}))
    for run in comparison.finals:
        for name, result in run["tasks"].items():
            found.setdefault(name, result)
    return found


def _part(comparison: Comparison, part: str) -> Fields:
    facts = comparison["data"].get(part)
    return facts if isinstance(facts, Mapping) else {}

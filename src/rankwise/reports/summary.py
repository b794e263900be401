"""What a report says beside its verdicts: its basis, the rows of its table, what failed."""

from __future__ import annotations

import dataclasses

from rankwise.foreign import Fields
from rankwise.objectives import OBJECTIVES
from rankwise.reports.comparison import EVAL_LOSS, KEPT_ROWS_LOSS, RETAINED, RETAINED_LOSS, Comparison
from rankwise.reports.numbers import (
    byte_size,
    duration,
    estimate,
    listed,
    percent,
    plural,
    rate,
    short_count,
    significant,
    visible,
)
from rankwise.reports.words import last_part, long_name, method_name, metric_in_sentence, metric_name


@dataclasses.dataclass(frozen=True)
class Cell:
    """A figure of the table, and in small letters its interval or a remark."""

    text: str
    note: str = ""


def seeds_of(comparison: Comparison) -> int:
    """The largest number of seeds that a method finished with."""
    return max(facts["seeds"] for facts in comparison["methods"].values())


def title(comparison: Comparison) -> str:
    names = [method_name(name) for name in comparison["methods"]]
    return f"{listed(names)} on {visible(last_part(comparison['settings']['model']))}"


def basis(comparison: Comparison) -> dict[str, str]:
    """What the conclusions rest on, from the runs to the hardware."""
    found = {
        "Runs": _runs(comparison),
        "Evaluated on": _evaluated(comparison),
        "Tested": _tested(comparison),
        "Learning rates": _tuned(comparison),
        "Hardware": _hardware(comparison),
    }
    if OBJECTIVES[comparison.objective].of_preferences:
        found["Rewards"] = "how much likelier than its base a run makes an answer: beta times the log-ratio"
    return found


def _runs(comparison: Comparison) -> str:
    finals = [run for run in comparison["runs"] if run["phase"] == "final"]
    search = len(comparison["runs"]) - len(finals)
    more = f", and {search} more that tried learning rates" if search else ""
    count = plural(seeds_of(comparison), "seed")
    return f"{count}; {len(comparison.finals)} of {plural(len(finals), 'final run')} finished{more}"


def _evaluated(comparison: Comparison) -> str:
    parts = [plural(comparison["data"]["eval"]["rows"], "row")]
    for name, result in comparison["base"]["tasks"].items():
        if name not in ("perplexity", "labels"):
            what = "the retained rows" if name == RETAINED else visible(name)
            parts.append(f"{what}: {plural(result['count'], 'example')}")
    if overlap := comparison["data"]["overlap"]:
        parts.append(f"{plural(overlap, 'row')} also in the training data")
    return "; ".join(parts)


def _tested(comparison: Comparison) -> str:
    items = [item for item in comparison["differences"] if item["metric"] == comparison.metric]
    tested = [item for item in items if item["p_value"] is not None]
    if not tested:
        return "not at all: that takes two methods, two seeds, and two evaluation rows"
    how = "by example" if all(item["paired_by_example"] for item in tested) else "by seed"
    corrected = f"corrected for {found}, " if (found := correction(comparison)) else ""
    return f"paired {how}, {corrected}{percent(comparison['confidence'])} intervals"


def correction(comparison: Comparison) -> str:
    """What verdicts are corrected for, in words; empty if for nothing."""
    if comparison["standings"]:
        return "all pairs and all looks"
    count = max((item["comparisons"] for item in comparison.differences_from_best()), default=1)
    return f"{count} comparisons with the best method" if count > 1 else ""


def _tuned(comparison: Comparison) -> str:
    searches = comparison["learning_rates"]
    counts = sorted({len(search["tried"]) for search in searches.values() if search["tried"]})
    if counts[-1] < 2:
        return "one for each method, which may suit one more than another"
    edge = [method_name(name) for name, search in searches.items() if search["at_edge"]]
    how = " in short runs, judged on training rows" if stopped_rates(comparison) else ""
    best = f"; best at the edge: {listed(edge)}" if edge else "; none best at the edge"
    return f"{' to '.join(map(str, counts[:: len(counts) - 1 or 1]))} tried for each method{how}{best}"


def stopped_rates(comparison: Comparison) -> list[str]:
    """A line for each method whose rates were searched by halving: which rates stopped after how many steps."""
    lines = []
    for name, search in comparison["learning_rates"].items():
        tried = [item for item in search["tried"] if item["metric"] == KEPT_ROWS_LOSS]
        stopped = [
            f"{rate(item['learning_rate'])} after {plural(item['steps'], 'step')}"
            for item in sorted(tried, key=lambda item: item["steps"])
            if item["learning_rate"] != search["chosen"]
        ]
        # Beyond the edge.
        whole = [f", {rate(item['learning_rate'])} in a whole run" for item in search["tried"] if item not in tried]
        if tried:
            lines.append(
                f"{method_name(name)}: {', '.join(stopped)}{''.join(whole)}; {rate(search['chosen'])} was taken"
            )
    return lines


def _hardware(comparison: Comparison) -> str:
    device = comparison["device"]
    parts = [visible(device["name"]), device["type"], device["dtype"]]
    parts += [plural(device["threads"], "thread")] if device.get("threads") else []
    parts += [] if all(run["alone"] for run in comparison.finals) else ["runs side by side: no times are compared"]
    return ", ".join(parts)


def columns(comparison: Comparison) -> dict[str, str]:
    """{key: heading} of the table: the verdict, the metric that decides, each task's own, and the costs."""
    found = {
        "verdict": f"Against {method_name(comparison['recommendation']['best'])}",
        comparison.metric: metric_name(comparison.metric),
    }
    metrics = {metric for facts in comparison["methods"].values() for metric in facts["mean"]}
    tasks = {task: result["primary"] for run in comparison.finals for task, result in run["tasks"].items()}
    for metric in (EVAL_LOSS, *(f"{task}.{primary}" for task, primary in tasks.items())):
        if metric in metrics - {RETAINED_LOSS}:
            found[metric] = metric_name(metric)
    if RETAINED_LOSS in metrics:
        found["retained"] = "Retained rows"
    return found | {
        "trainable_parameters": "Trainable",
        "adapter_bytes": "On disk",
        "peak_memory_bytes": "Peak memory",
        "tokens_per_second": "Tokens/s",
        "wall_seconds": "Time a run",
        "learning_rate": "Learning rate",
        "serving": "Can be served",
    }


FORMATS = {
    "trainable_parameters": short_count,
    "adapter_bytes": byte_size,
    "tokens_per_second": significant,
    "wall_seconds": duration,
}


def cell(facts: Fields, key: str) -> Cell:
    """The figure ``key`` of a method."""
    if key == "verdict":
        return Cell(facts["verdict"]["verdict"].replace("best", "–"))
    if key == "retained":
        kept = facts["retained"]
        return Cell("–") if kept is None else Cell(kept["verdict"], change_of(kept))
    if key == "serving":
        return Cell("; ".join(map(visible, facts["serving"])))
    if key == "learning_rate":
        return Cell(rate(facts["learning_rate"]), "edge" if facts["learning_rate_at_edge"] else "")
    if key == "peak_memory_bytes":
        peak, planned = facts[key], facts["predicted_peak_memory_bytes"]
        return Cell(byte_size(peak), f"planned {byte_size(planned)}" if planned else "")
    if key in FORMATS:
        return Cell(FORMATS[key](facts[key]))
    return Cell(*estimate(facts["mean"].get(key), facts["interval"].get(key)))


def base_row(comparison: Comparison) -> list[tuple[str, str]]:
    """(heading, figure of the model before training) of each column. A 4-bit base starts from another loss."""
    found = {
        f"{task}.{name}": value
        for task, result in comparison["base"]["tasks"].items()
        for name, value in result["metrics"].items()
    }
    starts = [run["initial_eval_loss"] for run in comparison.finals if run.get("initial_eval_loss") is not None]
    # A constant answer has a loss of its own.
    found["eval_loss"] = found.get("labels.loss", next(iter(starts), None))
    return [
        (heading, "" if found.get(key) is None else significant(found[key], 4))
        for key, heading in columns(comparison).items()
    ]


def change_of(kept: Fields) -> str:
    """``+3.2 % ± 0.5``: the change of the loss on the retained rows, as a share of the base's."""
    interval = kept["interval"] and [100 * bound / kept["base"] for bound in kept["interval"]]
    change, reach = estimate(100 * kept["difference"] / kept["base"], interval, signed=True)
    return f"{change} % {reach}".strip()


def verdict_note(comparison: Comparison) -> str:
    if seeds_of(comparison) < 2:
        return "Verdicts need at least two seeds."
    best = long_name(comparison["recommendation"]["best"])
    told = f"Verdicts compare each method with {best} on {metric_in_sentence(comparison.metric)}."
    return f"{told} “Not tuned”: the best rate lies at the edge of those tried; neither better nor worse."


def left_out(comparison: Comparison) -> list[str]:
    """Methods and runs that have no figures, with the reason."""
    skipped = {name: facts["skipped"] for name, facts in comparison["methods"].items() if facts["skipped"]}
    found = [f"{method_name(name)} was skipped: {visible(reason)}" for name, reason in skipped.items()]
    for run in comparison["runs"]:
        if run["error"] is not None and run["method"] not in skipped:
            state = "was not measured" if run["status"] == "finished" else run["status"]
            found.append(f"{run['id']} {state}: {run['error']['code']}: {visible(run['error']['message'])}")
    return found


def warnings_of(comparison: Comparison) -> list[str]:
    """Warnings of the comparison and of its runs, each once."""
    items = [*comparison["warnings"], *(item for run in comparison["runs"] for item in run.get("warnings", ()))]
    return list(dict.fromkeys(f"{item['code']}: {visible(item['message'])}" for item in items))

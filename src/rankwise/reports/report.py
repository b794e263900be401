"""The report of a comparison, or of several folders joined: ``report.html``, ``report.md`` and ``report.json``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise.errors import RunError, warn
from rankwise.foreign import Fields, Json, JsonObject
from rankwise.records import write_json, write_text
from rankwise.reports.comparison import Comparison, as_expected, load_comparison, unlike_hardware
from rankwise.reports.markdown import markdown
from rankwise.reports.page import page

HTML_FILE, MARKDOWN_FILE, JSON_FILE = "report.html", "report.md", "report.json"


def write_report(folder: Path, output: Path | None = None) -> list[Path]:
    """Write the three reports of the comparison in ``folder`` to ``output`` (default: the folder itself).

    Returns their paths: HTML, Markdown, JSON. Raises RunError: RW593 no comparison here, RW593 it cannot be read.
    """
    return write_reports(load_comparison(folder), output or folder)


def merged_report(folders: Sequence[Path], output: Path, summarise: Summarise) -> list[Path]:
    """Write one report of several folders of the same comparison.

    ``summarise(document, place_of_run)`` computes methods, differences and the recommendation of the joined runs again.

    Raises RunError: RW593 as ``write_report``; RW594 the folders are of different comparisons.
    """
    joined = merge([load_comparison(folder) for folder in folders])
    document = {**joined.document, **summarise(joined.document, joined.place_of)}
    return write_reports(Comparison(document, joined.folder, joined.places), output)


def write_reports(comparison: Comparison, output: Path) -> list[Path]:
    """The three files, each whole or not at all.

    Raises RunError (RW593) when a part of the comparison has a form that cannot be shown.
    """
    with as_expected(comparison):
        html, text = page(comparison), markdown(comparison)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / HTML_FILE, html)
    write_text(output / MARKDOWN_FILE, text)
    write_json(output / JSON_FILE, report_json(comparison))
    return [output / name for name in (HTML_FILE, MARKDOWN_FILE, JSON_FILE)]


def report_json(comparison: Comparison) -> JsonObject:
    """The report for programs. ``runs`` holds the record of each run and its place in the comparison."""
    return {
        "runs": [_flat(run) for run in comparison["runs"]],
        "methods": comparison["methods"],
        "differences": comparison["differences"],
        "recommendation": {key: value for key, value in comparison["recommendation"].items() if key != "config_text"},
        **{key: comparison[key] for key in ("primary_metric", "minimum_detectable_effect", "learning_rates", "base")},
        **{key: comparison[key] for key in ("command", "created", "settings", "model", "data", "versions", "device")},
        "warnings": comparison["warnings"],
    }


def _flat(run: Fields) -> JsonObject:
    """The fields of the record, overridden by what the comparison says of the run."""
    record = run["record"] or {}
    return {**record, **{key: value for key, value in run.items() if key != "record" and value is not None}}


Summarise = Callable[[Fields, Callable[[Fields], Path]], Fields]
# Settings that may differ between the folders; with any other one they are no longer the same comparison.
FREE = ("seeds", "methods", "learning_rates", "output", "jobs", "retry", "memory", "max_hours", "device")


def merge(comparisons: Sequence[Comparison]) -> Comparison:
    """The union of the runs. A cell that is in two folders counts once, with the values of the first.

    The figures of methods and differences are still those of the first folder and must be computed again. Raises
    RunError (RW594) with everything that differs where the folders are not of one comparison.
    """
    first, *rest = comparisons
    differing = [line for other in rest for line in _differing(first, other)]
    if differing:
        raise RunError("RW594", "these folders are not of one comparison: " + "; ".join(differing) + ".")
    runs: dict[str, Fields] = {}
    places: dict[str, Path] = {}
    for comparison in comparisons:
        for run in comparison["runs"]:
            if run["id"] in runs and runs[run["id"]]["status"] == "finished":
                warn("RW595", f"{run['id']} is in several folders; the one in {places[run['id']]} counts.")
                continue
            runs[run["id"]], places[run["id"]] = run, comparison.folder
    document = {**first.document, "runs": list(runs.values()), **_joined(comparisons)}
    return Comparison(document, first.folder, places)


def _joined(comparisons: Sequence[Comparison]) -> JsonObject:
    warnings = {(item.get("code"), item.get("message")): item for each in comparisons for item in each["warnings"]}
    rates = {name: search for each in reversed(comparisons) for name, search in each["learning_rates"].items()}
    methods: JsonObject = {}
    for name, facts in (item for each in comparisons for item in each["methods"].items()):
        # A method that one machine skipped and a different one ran is not skipped.
        if name not in methods or (methods[name]["seeds"] == 0 and facts["seeds"]):
            methods[name] = facts
    if (message := unlike_hardware([run for each in comparisons for run in each.finals])) is not None:
        warn("RW595", message)
        warnings["RW595", message] = {"code": "RW595", "message": message}
    order = dict.fromkeys(name for each in comparisons for name in each["methods"])
    # The commands show what differs.
    settings = {
        key: value
        for key, value in comparisons[0]["settings"].items()
        if all(each["settings"].get(key) == value for each in comparisons)
    }
    return {
        "command": "\n".join(dict.fromkeys(each["command"] for each in comparisons)),
        "settings": settings,
        "created": max(each["created"] for each in comparisons),
        "warnings": list(warnings.values()),
        "learning_rates": rates,
        "methods": {name: methods[name] for name in order},
        "seconds": sum(each["seconds"] for each in comparisons),
    }


def _differing(a: Comparison, b: Comparison) -> list[str]:
    """The differences that make two folders different comparisons, in words."""
    pairs = {f"setting {key}": (a["settings"].get(key), b["settings"].get(key)) for key in _settings(a, b)}
    pairs |= {f"{part} data": (_sha(a, part), _sha(b, part)) for part in ("train", "eval")}
    for name in dict.fromkeys([*a["methods"], *b["methods"]]):
        chosen = [each["methods"].get(name, {}).get("learning_rate") for each in (a, b)]
        pairs[f"learning rate of {name}"] = (chosen[0], chosen[1]) if None not in chosen else (None, None)
    pairs["base model"] = (a["model"].get("sha256"), b["model"].get("sha256"))
    pairs["metric"] = (a.metric, b.metric)
    where = f"{a.folder} and {b.folder}"
    return [f"{what} is {x!r} and {y!r} in {where}" for what, (x, y) in pairs.items() if x != y]


def _settings(a: Comparison, b: Comparison) -> list[str]:
    return [key for key in dict.fromkeys([*a["settings"], *b["settings"]]) if key not in FREE]


def _sha(comparison: Comparison, part: str) -> Json:
    facts = comparison["data"].get(part)
    return facts.get("sha256") if isinstance(facts, Mapping) else None

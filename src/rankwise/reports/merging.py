"""Join several folders of the same comparison, which ran on several machines by seeds, rates or methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rankwise.errors import RunError, warn
from rankwise.foreign import Fields, Json, JsonObject
from rankwise.reports.folder import Comparison
from rankwise.reports.numbers import is_number, plural

Summarise = Callable[[Fields, Callable[[Fields], Path]], Fields]
# Settings that may differ between the folders; with any other one they are no longer the same comparison.
FREE = (
    "seeds",
    "methods",
    "learning_rates",
    "output",
    "jobs",
    "retry",
    "merge",
    "memory",
    "max_hours",
    "device",
)


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
                warn("RW595", f"{run['id']} stands in several folders; the one in {places[run['id']]} counts.")
                continue
            runs[run["id"]], places[run["id"]] = run, comparison.folder
    document = {**first.document, "runs": list(runs.values()), **_joined(comparisons)}
    return Comparison(document, first.folder, places)


def figures_of(runs: Sequence[Fields]) -> JsonObject:
    """The figures of one method from its final runs: means, and the largest memory."""
    good = [run for run in runs if run["status"] == "finished"]
    records = [run["record"] or {} for run in good]
    means = {key: _known(records, key) for key in ("tokens_per_second", "examples_per_second", "wall_seconds")}
    largest = {
        key: _known(records, key)
        for key in ("peak_memory_bytes", "predicted_peak_memory_bytes", "trainable_parameters")
    }
    costs = {key: _known(records, key) for key in ("wall_seconds", "peak_memory_bytes")}
    return {
        "seeds": len(good),
        "failed": sum(run["status"] == "failed" for run in runs),
        "alone": all(run["alone"] for run in good),
        **{key: fmean(values) if values else None for key, values in means.items()},
        **{key: max(values, default=None) for key, values in largest.items()},
        "adapter_bytes": max(_known(good, "adapter_bytes"), default=None),
        "ranges": {key: [min(values), max(values)] for key, values in costs.items() if values},
    }


def unlike_hardware(runs: Sequence[Fields]) -> str | None:
    """What to warn of where the runs trained on several devices or numbers of threads; None where on one."""
    devices = dict.fromkeys(_hardware((run["record"] or {}).get("device") or {}) for run in runs)
    known = [device for device in devices if device]
    if len(known) < 2:
        return None
    return f"the runs are of different hardware ({'; '.join(known)}): their times, speeds and memory differ."


def _hardware(device: Fields) -> str:
    threads = device.get("threads")
    name = str(device.get("name") or device.get("type") or "")
    return f"{name}, {plural(threads, 'thread')}" if isinstance(threads, int) else name


def _known(items: Sequence[Fields], key: str) -> list[float]:
    return [value for item in items if is_number(value := item.get(key))]


def _joined(comparisons: Sequence[Comparison]) -> JsonObject:
    warnings = {(item.get("code"), item.get("message")): item for each in comparisons for item in each["warnings"]}
    rates = {name: search for each in reversed(comparisons) for name, search in each["learning_rates"].items()}
    methods: JsonObject = {}
    for name, facts in (item for each in comparisons for item in each["methods"].items()):
        # A method that one machine skipped and another ran is not skipped.
        if name not in methods or (methods[name]["seeds"] == 0 and facts["seeds"]):
            methods[name] = facts
    if (message := unlike_hardware([run for each in comparisons for run in each.finals])) is not None:
        warn("RW595", message)
        warnings["RW595", message] = {"code": "RW595", "message": message}
    order = dict.fromkeys(name for each in comparisons for name in each["methods"])
    seconds = {
        key: sum(each["seconds"].get(key) or 0.0 for each in comparisons) for key in ("total", "runs", "overhead")
    }
    # What differs stands in the commands.
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
        "seconds": seconds,
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

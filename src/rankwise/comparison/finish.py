"""The end of a comparison: the recommended settings, the adapter of the best run, and on request the merged model."""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from rankwise.comparison.collect import read_json, value_of
from rankwise.config import TrainSettings
from rankwise.disk import discard_folder, whole_folder
from rankwise.foreign import Fields
from rankwise.records import write_text
from rankwise.reports.schema import (
    BEST_FOLDER,
    COMPARISON_FILE,
    MERGED_FOLDER,
    RECOMMENDED_FILE,
    Recommendation,
    Run,
)

LEFT_OUT = ("checkpoints", "evaluation", "runs")
NOT_SETTINGS = {"output", "cache", "resume", "overwrite"}


def best_run(runs: Sequence[Run], method: str, metric: str, *, higher_is_better: bool) -> Run | None:
    """The final run of the method with the best value."""
    final = [run for run in runs if run["method"] == method and run["phase"] == "final" and run["status"] == "finished"]
    scored = [(value, run) for run in final if (value := value_of(run, metric)) is not None]
    if not scored:
        return None
    return (max if higher_is_better else min)(scored, key=lambda item: item[0])[1]


def hand_over(output: Path, found: Recommendation, run: Run) -> Recommendation:
    """Write ``recommended.yaml`` and ``best``, and return the recommendation with their paths."""
    record = run["record"] or {}
    write_text(output / RECOMMENDED_FILE, recommended_yaml(output, record["settings"]))
    with whole_folder(output / BEST_FOLDER, replace=True) as folder:
        left_out = shutil.ignore_patterns(*LEFT_OUT)
        shutil.copytree(output / run["folder"], folder, ignore=left_out, dirs_exist_ok=True)
    return {
        **found,
        "config": RECOMMENDED_FILE,
        "command": shlex.join(["rankwise", "train", "--config", str(output / RECOMMENDED_FILE)]),
        "run": run["id"],
        "adapter": BEST_FOLDER,
        "merged": MERGED_FOLDER if (output / MERGED_FOLDER).is_dir() else None,
    }


def forget_other_results(output: Path, run: str | None) -> None:
    """Remove the recommended files of an earlier call if they are of another run, so that its merged model is not
    mistaken for this run's.
    """
    before = read_json(output / COMPARISON_FILE).get("recommendation", {}).get("run")
    if before == run and run is not None:
        return
    discard_folder(output / MERGED_FOLDER)
    if run is None:
        discard_folder(output / BEST_FOLDER)
        (output / RECOMMENDED_FILE).unlink(missing_ok=True)


def recommended_yaml(output: Path, settings: Fields) -> str:
    """The run's settings, without those at their defaults, and with an output folder of its own."""
    import yaml

    defaults = TrainSettings.defaults()
    kept = {
        name.replace("_", "-"): settings[name]
        for name in ("model", "data", *defaults)
        if name in settings and name not in NOT_SETTINGS and settings[name] != defaults.get(name)
    }
    kept["method"] = settings["method"]
    kept["output"] = str(output.resolve() / "recommended")
    return yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=1000)

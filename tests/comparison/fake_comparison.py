"""`python fake_comparison.py SETTINGS.json`: a comparison whose runs are those of ``fake_stage``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from rankwise.comparison import run, stages
from rankwise.comparison.settings import CompareSettings
from rankwise.options import read_settings

# What differs from call to call. After a kill nobody knows what ran beside a run.
TIMES = {"wall_seconds", "seconds", "created", "total", "runs_seconds", "alone", "costs"}


class Quiet:
    def started(self, job: object) -> None: ...
    def ended(self, job: object, outcome: object, picture: object) -> None: ...
    def say(self, text: str) -> None: ...


def compare(*, watcher: Quiet | None = None, **given: object) -> object:
    stages.CLI = stages.STEPS = "fake_stage"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    run.environments = lambda jobs, device: [{} for _ in range(jobs)]
    return run.compare(read_settings(CompareSettings, None, given), watcher or Quiet()).document


def given(tmp_path: Path, name: str = "out", **changes: Any) -> dict[str, Any]:
    data = tmp_path / "rows.jsonl"
    if not data.exists():
        rows = [{"prompt": f"q{n}", "completion": f"a{n}"} for n in range(40)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = {"model": "demo", "data": str(data), "output": str(tmp_path / name), "methods": "lora,dora,full"}
    return {**common, "learning_rates": "1e-4,2e-4,5e-4", "seeds": 2, "max_steps": 6, **changes}


def without_times(value: Any, folder: Path) -> Any:
    """The comparison as it would be at any time and in any folder."""
    if isinstance(value, dict):
        return {key: without_times(item, folder) for key, item in value.items() if key not in TIMES}
    if isinstance(value, list):
        return [without_times(item, folder) for item in value]
    return value.replace(str(folder), "DIR") if isinstance(value, str) else value


if __name__ == "__main__":
    compare(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))


def starts(folder: Path) -> list[str]:
    return (folder / "started.txt").read_text().split()

"""`python fake_comparison.py SETTINGS.json`: a comparison whose runs are those of ``fake_stage``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from rankwise.comparison import run, stages
from rankwise.comparison.settings import CompareSettings
from rankwise.settings_file import read_settings


class Quiet:
    def started(self, job: object) -> None: ...
    def ended(self, job: object, outcome: object, picture: object) -> None: ...
    def tick(self, picture: object) -> None: ...
    def say(self, text: str) -> None: ...


def compare(*, watcher: Quiet | None = None, **given: object) -> object:
    stages.CLI = stages.MEASURE = stages.PREPARE = "fake_stage"
    os.environ["PYTHONPATH"] = str(Path(__file__).parent)
    run.environments = lambda jobs, device: [{} for _ in range(jobs)]
    return run.compare(read_settings(CompareSettings, None, given), watcher or Quiet())


if __name__ == "__main__":
    compare(**json.loads(Path(sys.argv[1]).read_text()))

"""Recognise rankwise's folders where a user gives the wrong kind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rankwise.errors import RunError
from rankwise.reports.schema import BEST_FOLDER, COMPARISON_FILE


def refuse_comparisons(folders: Iterable[Path]) -> None:
    """Raise RunError (RW560) for the folder of a comparison where a run's is expected."""
    for folder in folders:
        if (folder / COMPARISON_FILE).is_file() and not (folder / "adapter_config.json").is_file():
            best = folder / BEST_FOLDER
            where = f"give the run that it recommends, {best}" if best.is_dir() else f"give one of {folder / 'runs'}"
            raise RunError("RW560", f"{folder} is the folder of a comparison; {where}.")

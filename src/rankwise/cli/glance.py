"""Refuse wrong paths before a command loads torch and transformers, which takes seconds.

rankwise's own folders are recognised where a user gives the wrong kind.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rankwise.errors import RunError
from rankwise.reports.comparison import BEST_FOLDER, REPORT_FILE


def check_paths(*, model: str | None, data: Iterable[str | None] = (), output: Path | None = None) -> None:
    """Raise the errors that reading would raise for missing files: DataError (RW201), ModelError (RW301, RW302, RW311).

    Raises RunError (RW503) for an ``output`` that cannot be written.
    """
    from rankwise.data import check_there
    from rankwise.models.folder import read_config
    from rankwise.models.source import resolve_model
    from rankwise.records import check_writable

    if output is not None:
        check_writable(output)
    for source in data:
        if source is not None:
            check_there(source)
    if model is None:
        return
    found = resolve_model(model)
    if found.kind == "folder" and found.path is not None:
        read_config(found.path)


def refuse_comparisons(folders: Iterable[Path]) -> None:
    """Raise RunError (RW560) for the folder of a comparison where a run's is expected."""
    for folder in folders:
        if (folder / REPORT_FILE).is_file() and not (folder / "adapter_config.json").is_file():
            best = folder / BEST_FOLDER
            where = f"give the run that it recommends, {best}" if best.is_dir() else f"give one of {folder / 'runs'}"
            raise RunError("RW560", f"{folder} is the folder of a comparison; {where}.")

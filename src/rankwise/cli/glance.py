"""Refuse wrong paths before a command loads torch and transformers, which takes seconds.

rankwise's own folders are recognised where a user gives the wrong kind.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from rankwise.errors import ConfigError, RunError
from rankwise.options import Settings, flag
from rankwise.reports.comparison import BEST_FOLDER, REPORT_FILE

# Text fields that hold a hub id, or a path in which ~ means a home folder.
MAY_BE_PATHS = {"model", "data", "eval_data", "retain", "fewshot_data", "reference_answers"}


def check_path_options(settings: Settings) -> None:
    """Raise ConfigError (RW105) for a path of any option that cannot be a file or a folder."""
    for name, given in _paths(settings):
        fault = _fault_of(given)
        if fault is not None:
            raise ConfigError("RW105", f"{flag(name)} {given} {fault}.")


def _paths(settings: Settings) -> Iterator[tuple[str, Path | str]]:
    for name, value in settings:
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Path) or (isinstance(item, str) and name in MAY_BE_PATHS):
                yield name, item


def _fault_of(given: Path | str) -> str | None:
    """The rest of a sentence that starts with the path. A path where nothing exists is no fault here."""
    path = Path(given)
    try:
        mode = os.stat(path if isinstance(given, Path) else path.expanduser()).st_mode
    except FileNotFoundError:
        if any(part.is_symlink() and not part.exists() for part in (path, *path.parents)):
            return "leads over a link to what does not exist; make it, or give another path"
        return None
    except NotADirectoryError:
        return None
    except (OSError, RuntimeError) as error:
        return f"cannot be a file or a folder: {getattr(error, 'strerror', None) or error}; give another path"
    # Reading a named pipe waits for a writer, and a device may never end. /dev/stdin, a pipe too, is allowed.
    is_stream = stat.S_ISFIFO(mode) and path.parts[:2] == ("/", "dev")
    if stat.S_ISREG(mode) or stat.S_ISDIR(mode) or is_stream:
        return None
    return "is a device or a pipe; give a file or a folder"


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

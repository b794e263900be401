"""What a look at the paths can refuse before a verb loads torch and its relatives, which takes seconds."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def check_paths(*, model: str | None, data: Iterable[str | None] = (), output: Path | None = None) -> None:
    """Raise DataError (RW201) or ModelError (RW301, RW302, RW311), as reading them would, for what is not there;
    RunError (RW503) for an ``output`` that cannot be written.
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

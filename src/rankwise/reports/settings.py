"""The options of ``rankwise report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from rankwise.errors import ConfigError
from rankwise.options import Panel, Settings, option, text_list


class ReportSettings(Settings):
    """The options of ``rankwise report``."""

    folders: Annotated[
        tuple[Path, ...],
        BeforeValidator(text_list),
        option(
            Panel.OTHER,
            "Folders that `rankwise compare` wrote; several are joined into one report.",
            metavar="FOLDER...",
            argument=True,
            repeated=True,
            min_length=1,
        ),
    ]
    output: Annotated[
        Path | None,
        option(
            Panel.OTHER,
            "Folder for the report; default: the comparison's own. Needed for several folders.",
            metavar="DIR",
        ),
    ] = None


def output_of(settings: ReportSettings) -> Path:
    """Where the report goes. Raises ConfigError (RW112) for several folders without ``--output``."""
    if settings.output is not None:
        return settings.output
    if len(settings.folders) > 1:
        count = len(settings.folders)
        raise ConfigError("RW112", f"the report of {count} folders belongs in none of them; give --output DIR.")
    return settings.folders[0]

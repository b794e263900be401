"""The options of ``rankwise report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, Field

from rankwise.config import Settings, text_list
from rankwise.errors import ConfigError


class ReportSettings(Settings):
    """The options of ``rankwise report``."""

    folders: Annotated[tuple[Path, ...], BeforeValidator(text_list)] = Field(
        min_length=1,
        description="Folders that `rankwise compare` wrote; several are joined into one report.",
        json_schema_extra={"argument": True, "repeated": True},
    )
    output: Path | None = Field(
        None, description="Folder for the report; default: the comparison's own. Needed for several folders."
    )


def output_of(settings: ReportSettings) -> Path:
    """Where the report goes. Raises ConfigError (RW180) for several folders without ``--output``."""
    if settings.output is not None:
        return settings.output
    if len(settings.folders) > 1:
        count = len(settings.folders)
        raise ConfigError("RW180", f"the report of {count} folders belongs in none of them; give --output DIR.")
    return settings.folders[0]

"""The options of ``rankwise score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from rankwise.config import Settings


def path_list(value: Any) -> Any:
    """One path is a list of one."""
    return (value,) if isinstance(value, str | Path) else value


class ScoreSettings(Settings):
    """The options of ``rankwise score``. Which files are needed depends on ``what``."""

    what: Literal["e2e", "gsm8k", "vicuna"] = Field(
        description="e2e, gsm8k or vicuna.", json_schema_extra={"argument": True}
    )
    predictions: Path | None = Field(
        None, description="e2e: .tsv or .csv (MR, output), .jsonl, or a text a line; gsm8k: .jsonl with `prediction`."
    )
    references: Path | None = Field(
        None, description="e2e: .csv or .tsv (mr, ref), `context||reference` lines, or groups; gsm8k: .jsonl, `answer`."
    )
    ratings: Annotated[tuple[Path, ...] | None, BeforeValidator(path_list)] = Field(
        None,
        description="vicuna: a judge's ratings, .jsonl; may be given several times.",
        json_schema_extra={"repeated": True},
    )
    reference_answers: Path | None = Field(
        None, description="vicuna: answers of the reference system, .jsonl with `answer_id`."
    )

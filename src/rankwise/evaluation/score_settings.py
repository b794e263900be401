"""The options of ``rankwise score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator

from rankwise.options import Panel, Settings, option, text_list


class ScoreSettings(Settings):
    """The options of ``rankwise score``. Which files are needed depends on ``what``."""

    what: Annotated[
        Literal["e2e", "gsm8k", "vicuna"],
        option(Panel.OTHER, "e2e, gsm8k or vicuna.", metavar="e2e|gsm8k|vicuna", argument=True),
    ]
    predictions: Annotated[
        Path | None,
        option(
            Panel.OTHER,
            "e2e: .tsv or .csv (MR, output), .jsonl, or one text on each line; gsm8k: .jsonl with `prediction`.",
            metavar="FILE",
        ),
    ] = None
    references: Annotated[
        Path | None,
        option(
            Panel.OTHER,
            "e2e: .csv or .tsv (mr, ref), `context||reference` lines, or groups; gsm8k: .jsonl, `answer`.",
            metavar="FILE",
        ),
    ] = None
    ratings: Annotated[
        tuple[Path, ...] | None,
        BeforeValidator(text_list),
        option(
            Panel.OTHER,
            "vicuna: a judge's ratings, .jsonl; may be given several times.",
            metavar="FILE",
            repeated=True,
        ),
    ] = None
    reference_answers: Annotated[
        Path | None,
        option(Panel.OTHER, "vicuna: answers of the reference system, .jsonl with `answer_id`.", metavar="FILE"),
    ] = None

"""Bad rows: one error that names them, or one warning where they may be left out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rankwise.data.rows import Problem
from rankwise.errors import DataError, warn

# Value of ``skip_bad_rows`` for callers without such an option, which a message must not advise.
NEVER = -1
NAMED = 3
REMEDY = "Correct or remove these rows"
REMEDIES = {
    "RW211": "Correct these rows or the template",
    "RW212": "Give a template with {% generation %} marks by --chat-template FILE",
    "RW221": "Give a template that writes it by --chat-template FILE, or take it out of the rows",
}


def check_bad_rows(problems: Sequence[Problem], total: int, *, allowed: int | None = NEVER, before: int = 0) -> None:
    """Warn of bad rows (RW223) if at most ``allowed`` are bad (None: any number) and good rows remain.

    ``total`` counts good and bad rows; ``before``: number of rows of the source that were left out before. Raises
    DataError with the code of the first bad row where more than ``allowed`` are bad. The message advises
    --skip-bad-rows, except with NEVER.
    """
    if not problems:
        return
    count, code = len(problems), problems[0].code
    if count < total and (allowed is None or before + count <= allowed):
        warn("RW223", f"{count} of {total:,} rows of {problems[0].source} are left out: {listed(problems)}.")
        return
    has_option = allowed != NEVER and count < total
    skipping = f", or have `train` leave them out with --skip-bad-rows {before + count}" if has_option else ""
    spent = f" (--skip-bad-rows {allowed})" if allowed and allowed > 0 else ""
    rest = f"; and {count - NAMED} more of {total:,} rows" if count > NAMED else ""
    remedy = REMEDIES.get(code, REMEDY)
    raise DataError(code, f"{listed(problems)}{rest}{spent}. {remedy}{skipping}.")


def listed(problems: Sequence[Problem]) -> str:
    """The first few problems, with the source named once: ``train.csv, line 3, line 7: why; line 9: why``."""
    parts: list[str] = []
    source = None
    for why, alike in itertools.groupby(problems[:NAMED], key=lambda problem: problem.why):
        places = []
        for problem in alike:
            own = f"{problem.counted_in} {problem.line}"
            places.append(own if problem.source == source else problem.place)
            source = problem.source
        parts.append(f"{', '.join(places)}: {why}")
    return "; ".join(parts)

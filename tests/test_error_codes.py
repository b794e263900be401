"""Every code that the source raises has an entry in docs/errors, and every entry a code."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]
SOURCE = {path: path.read_text(encoding="utf-8") for path in (ROOT / "src").rglob("*.py")}
INDEX = runpy.run_path(str(ROOT / "dev" / "errors.py"))


def codes(pattern: str) -> set[str]:
    return {code for text in SOURCE.values() for code in re.findall(pattern, text)}


def test_documented_codes_are_the_raised_ones():
    entries = INDEX["entries"]()
    assert set(entries) == codes(r"[\"'](RW[1-9]\d\d)[\"']")
    for page in {name for name, _ in entries.values()}:
        there = re.findall(r"^## (RW\d{3})$", (ROOT / "docs" / "errors" / page).read_text("utf-8"), re.MULTILINE)
        assert there == sorted(code for code, (name, _) in entries.items() if name == page)
    text = INDEX["PAGE"].read_text("utf-8")
    assert text == INDEX["indexed"](text), "run python dev/errors.py"


def test_entries_of_warnings_say_so():
    marked = {code for code, (_, title) in INDEX["entries"]().items() if title.endswith(" (warning)")}
    warned, raised = codes(r"\bwarn\(\s*\"(RW\d{3})\""), codes(r"(?:Error|Interrupted)\(\s*\"(RW\d{3})\"")
    assert warned - raised <= marked
    assert not marked & (raised - warned) - {"RW515"}, "an older checkpoint makes that error a warning"


def test_each_code_keeps_to_one_kind_of_error():
    """From RW623 on codes are of later parts, of whichever kind fits."""
    hundreds = {"1": "ConfigError", "2": "DataError", "3": "ModelError", "4": "AdapterError", "5": "RunError"}
    kinds: dict[str, set[str]] = {}
    for text in SOURCE.values():
        for kind, code in re.findall(r"\b(\w+Error)\(\s*\"(RW[1-9]\d\d)\"", text):
            kinds.setdefault(code, set()).update({kind} - {"InternalError"})
    wrong = {code: found for code, found in kinds.items() if len(found) > 1}
    wrong |= {c: f for c, f in kinds.items() if c < "RW623" and f - {hundreds.get(c[2], "QuantizationError")}}
    assert not wrong

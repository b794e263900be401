"""Every code that the source raises has a section in docs/errors.md, and every section a code."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
CODE = re.compile(r"RW[1-9]\d\d")


def codes_in_source() -> set[str]:
    quoted = re.compile(r"[\"'](RW[1-9]\d\d)[\"']")
    return {code for path in (ROOT / "src").rglob("*.py") for code in quoted.findall(path.read_text(encoding="utf-8"))}


def test_documented_codes_are_the_raised_ones():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    sections = re.findall(r"^### (RW\d{3}) — \S", text, re.MULTILINE)
    assert len(sections) == len(set(sections))
    assert sections == sorted(sections)
    assert set(sections) == codes_in_source()


def test_each_code_keeps_to_one_kind_of_error():
    kinds = {
        "1": "ConfigError",
        "2": "DataError",
        "3": "ModelError",
        "4": "AdapterError",
        "5": "RunError",
    }
    raised = re.compile(r"\b(\w+Error)\(\s*\"(RW[1-9]\d\d)\"")
    wrong = []
    # From RW623 on they are of what came later, whatever it reads: the kind of each is that of its first use.
    later: dict[str, str] = {}
    for path in (ROOT / "src").rglob("*.py"):
        for kind, code in raised.findall(path.read_text(encoding="utf-8")):
            is_later = code >= "RW623"
            expected = later.setdefault(code, kind) if is_later else kinds.get(code[2], "QuantizationError")
            if kind != expected and kind != "InternalError":
                wrong.append(f"{path.name}: {kind}({code})")
    assert not wrong

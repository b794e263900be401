"""The index of ``docs/errors.md``: an anchor and a link for each code that ``docs/errors/`` explains.

python dev/errors.py    write it anew, after an entry was added or removed
"""

from __future__ import annotations

import re
from pathlib import Path

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "errors.md"
# "## RW101", then "**Title (warning).** What happened, and what to do."
ENTRY = re.compile(r"^## (RW\d{3})\n\n\*\*([^*]+)\.\*\* \S", re.MULTILINE)


def entries() -> dict[str, tuple[str, str]]:
    """{code: (file, title)} in the order of the pages."""
    pages = sorted((DOCS / "errors").glob("*.md"))
    found = [(code, page.name, title) for page in pages for code, title in ENTRY.findall(page.read_text("utf-8"))]
    assert len(found) == len({code for code, _, _ in found}), "a code has two entries"
    return {code: (name, title) for code, name, title in found}


def indexed(text: str) -> str:
    """The page with the index below its last heading made anew."""
    head = text[: text.index("## All codes")]
    hundreds: dict[str, list[str]] = {}
    for code, (name, _) in entries().items():
        anchor = code.lower()
        hundreds.setdefault(name, []).append(f'<a id="{anchor}"></a>[{code}](errors/{name}#{anchor})')
    return head + "## All codes\n\n" + "\n\n".join("\n".join(links) for links in hundreds.values()) + "\n"


if __name__ == "__main__":
    PAGE.write_text(indexed(PAGE.read_text("utf-8")), "utf-8")

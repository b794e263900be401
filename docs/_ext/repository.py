"""Links of the pages that lead out of ``docs/`` go to the repository, whose address RANKWISE_REPOSITORY holds.

RANKWISE_REF is the branch or tag. Without an address such a link is text that shows its path under the pointer.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"(?<!!)\[([^][]*)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")


def led_out(text: str, page: Path, repository: str, ref: str) -> str:
    """The Markdown of a page with its links out of ``docs/`` rewritten."""

    def to_repository(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(page.parent / match[2]))
        if not path.exists() or path.is_relative_to(ROOT / "docs"):
            return match[0]
        kind, inside = "tree" if path.is_dir() else "blob", path.relative_to(ROOT)
        if not repository:
            return f'<abbr title="{inside}">{match[1]}</abbr>'
        return f"[{match[1]}]({repository}/{kind}/{ref}/{inside}{match[3] or ''})"

    return LINK.sub(to_repository, text)


def setup(app: Any) -> dict[str, bool]:
    """Sphinx calls this: the sources are rewritten as they are read."""
    repository, ref = os.environ.get("RANKWISE_REPOSITORY", ""), os.environ.get("RANKWISE_REF", "main")

    def rewrite(app: Any, name: str, source: list[str]) -> None:
        source[0] = led_out(source[0], Path(app.env.doc2path(name)), repository, ref)

    app.connect("source-read", rewrite)
    return {"parallel_read_safe": True}

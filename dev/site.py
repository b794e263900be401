"""Add built pages to the published site, which has a folder for each version.

python dev/site.py docs/_build SITE v0.2.0

SITE also gets ``versions.json``, the newest release first, which the pages' selector reads, and an index that leads to
the newest release, or to ``main`` before the first one.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

RELEASE = re.compile(r"v(\d+)\.(\d+)\.(\d+)")
INDEX = '<!doctype html><meta charset="utf-8"><title>rankwise</title><meta http-equiv="refresh" content="0; url={}/">'


def add(built: Path, site: Path, version: str) -> None:
    """Replace SITE/VERSION by the built pages."""
    shutil.rmtree(site / version, ignore_errors=True)
    shutil.copytree(built, site / version, ignore=shutil.ignore_patterns(".doctrees", ".buildinfo"))
    names = [path.parent.name for path in site.glob("*/index.html")]
    releases = sorted(
        (name for name in names if RELEASE.fullmatch(name)),
        key=lambda name: [int(part) for part in RELEASE.fullmatch(name).groups()],
        reverse=True,
    )
    versions = [*releases, *sorted(set(names) - set(releases))]
    (site / "versions.json").write_text(json.dumps(versions), encoding="utf-8")
    (site / "index.html").write_text(INDEX.format(versions[0]), encoding="utf-8")
    # GitHub's pages would leave out folders that begin with an underscore.
    (site / ".nojekyll").touch()


if __name__ == "__main__":
    add(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])

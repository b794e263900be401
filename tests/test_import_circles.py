"""No module imports one that imports it: neither at its top nor inside a function, nor for type checkers alone."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def modules(source: Path) -> dict[str, Path]:
    found = {}
    for file in source.rglob("*.py"):
        parts = [source.name, *file.relative_to(source).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & known.keys()) or {node.module}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known.keys()


def circle(source: Path) -> list[str] | None:
    known = modules(source)
    graph = {name: imports(file, known) - {name} for name, file in known.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return None


@pytest.mark.parametrize("source", ["src/rankwise", "article/src/rankwise_article"])
def test_no_circle_at_any_depth(source: str) -> None:
    assert circle(ROOT / source) is None


def test_a_circle_is_found(tmp_path: Path) -> None:
    source = tmp_path / "room"
    source.mkdir()
    (source / "one.py").write_text("if TYPE_CHECKING:\n    from room.other import Other\n")
    (source / "other.py").write_text("def late():\n    from room import one\n")
    assert set(circle(source) or ()) == {"room.one", "room.other"}

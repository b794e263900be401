"""No module imports one that imports it: neither at its top nor inside a function."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import rankwise

SOURCE = Path(rankwise.__file__).parent


def modules(source: Path) -> dict[str, Path]:
    found = {}
    for file in source.rglob("*.py"):
        parts = [source.name, *file.relative_to(source).with_suffix("").parts]
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


def run_statements(tree: ast.AST) -> Iterator[ast.AST]:
    """Every node but those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from run_statements(node)


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    found = set()
    for node in run_statements(ast.parse(file.read_text(encoding="utf-8"))):
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


def test_no_circle_at_any_depth() -> None:
    assert circle(SOURCE) is None

"""Six values have names: large dataclasses are ``kw_only``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import rankwise

SOURCE = Path(rankwise.__file__).parent
MOST = 5


def positional(text: str) -> Iterator[str]:
    """The dataclasses of more than ``MOST`` arguments that take them by place."""
    for kind in ast.walk(ast.parse(text)):
        if isinstance(kind, ast.ClassDef):
            made = [ast.unparse(item) for item in kind.decorator_list if "dataclass" in ast.unparse(item)]
            fields = [
                item
                for item in kind.body
                if isinstance(item, ast.AnnAssign)
                and "ClassVar" not in ast.unparse(item.annotation)
                and "init=False" not in ast.unparse(item)
            ]
            if made and len(fields) > MOST and "kw_only=True" not in made[0]:
                yield kind.name


def test_large_dataclasses_are_made_by_keywords() -> None:
    found = {
        str(file.relative_to(SOURCE)): [*positional(file.read_text(encoding="utf-8"))] for file in SOURCE.rglob("*.py")
    }
    assert not {file: names for file, names in found.items() if names}


@pytest.mark.parametrize(("decorator", "count"), [("dataclass", 6), ("dataclasses.dataclass(frozen=True)", 6)])
def test_one_that_is_not_is_found(decorator: str, count: int) -> None:
    body = "".join(f"    field_{index}: int\n" for index in range(count))
    assert [*positional(f"@{decorator}\nclass Large:\n{body}")] == ["Large"]
    assert not [*positional(f"@{decorator}\nclass Small:\n{body}    # one less\n".replace("    field_0: int\n", ""))]

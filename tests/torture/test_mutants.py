"""What `mutants.py` plants, and that it sees which tests notice."""

from __future__ import annotations

from pathlib import Path

import mutants
import pytest

SOURCE = '''"""A docstring with 1 + 1."""

def f(x: int = 3, *, y: bool = True) -> int:
    if x < 2 and not y:
        raise ValueError(f"{x + 1} is {x < 3}")
    g(x, é="ü", k=x - 1)
    return min(x, 4)
'''
EXPECTED = {
    *("3 -> (4)", "True -> (False)", "x < 2 -> (x <= 2)", "2 -> (3)", "not y -> (y)"),
    "x < 2 and not y -> (x < 2 or not y)",
    *('g(x, é="ü", k=x - 1) -> pass', "g(x, é=\"ü\", k=x - 1) -> (g(x, é='ü'))"),
    *('g(x, é="ü", k=x - 1) -> (g(x, k=x - 1))', "x - 1 -> (x + 1)", "1 -> (2)"),
    *("min(x, 4) -> (max(x, 4))", "4 -> (5)"),
}


def test_each_place_is_changed_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(SOURCE, encoding="utf-8")
    found = list(mutants.mutants_of(path))
    assert {mutant.what for mutant in found} == EXPECTED
    for mutant in found:
        compile(mutant.source, "module.py", "exec")
        changed = [(a, b) for a, b in zip(SOURCE.splitlines(), mutant.source.splitlines(), strict=True) if a != b]
        assert len(changed) == 1, mutant.what


def test_a_mutant_is_imported_in_place_of_the_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = mutants.SOURCE / "ops" / "codes.py"
    package = mutants.linked(mutants.Mutant(path, 1, 1, "", "changed = 1\n"), tmp_path)
    assert (package / "rankwise" / "ops" / "codes.py").read_text() == "changed = 1\n"
    assert (package / "rankwise" / "ops" / "four_bit.py").samefile(mutants.SOURCE / "ops" / "four_bit.py")
    assert path.read_text() != "changed = 1\n"


@pytest.mark.parametrize(
    ("text", "found"), [("def test_it(): assert 1", "survived"), ("def test_it(): assert 0", "killed")]
)
def test_what_the_tests_say_is_seen(text: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "test_one.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert mutants.outcome(tmp_path, ["test_one.py::test_it"]) == found

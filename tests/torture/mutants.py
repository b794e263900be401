"""Small faults planted in the source one at a time, and whether the tests of the same folder notice.

    python tests/torture/mutants.py --seed 1 --count 300 --output mutants.jsonl

Every place that can be changed is listed; ``--seed`` draws ``--count`` of them. The source itself stays as it is: each
mutant lies in a folder of links with one other file, and the tests run in a process forked from one that has imported
the libraries, since importing them takes longer than most tests. cosmic-ray and mutmut know one command for all
mutants. What ``--output`` holds of an earlier call is not tried again.
"""

from __future__ import annotations

import argparse
import ast
import collections
import dataclasses
import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SOURCE = ROOT / "src" / "rankwise"
FOLDERS = ("ops", "adapters", "training", "quantization", "data", "comparison", "export", "planning")
# The tests that `make test` runs, first those that are quick.
USUAL = "not grid and not families and not long and not browser"
LIBRARIES = ("torch", "transformers", "trl", "datasets", "safetensors.torch", "scipy.stats", "hypothesis", "peft")
# Of a mutant that never ends.
LONGEST_SECONDS = 900

OTHER = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
}
OTHER_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any"}
# Messages, types and what is done at import.
LEFT_ALONE = (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)


@dataclasses.dataclass(frozen=True)
class Mutant:
    path: Path
    line: int
    # What stood there and what stands there now, each in one line.
    what: str
    source: str


def mutants_of(path: Path) -> Iterator[Mutant]:
    text = path.read_text(encoding="utf-8")
    # Columns of the syntax tree count bytes.
    lines = [line.encode() for line in text.splitlines(keepends=True)]
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    content = text.encode()
    for node in nodes(ast.parse(text)):
        first = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        last = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        for changed in changes(node):
            before = " ".join(content[first:last].decode().split())
            mutated = (content[:first] + changed.encode() + content[last:]).decode()
            yield Mutant(path, node.lineno, f"{before} -> {changed}", mutated)  # type: ignore[attr-defined]


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """What may be changed, in the order of the source."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns", "decorator_list", "bases"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, LEFT_ALONE) or is_warning(child):
                continue
            if hasattr(child, "lineno"):
                yield child
            yield from nodes(child)


def is_warning(node: ast.AST) -> bool:
    call = node.value if isinstance(node, ast.Expr) else node
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("warn", "cast")


def changes(node: ast.AST) -> Iterator[str]:
    """Source that may stand in a node's place."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"
    elif isinstance(node, ast.IfExp):
        yield f"({ast.unparse(node.body)})"
        yield f"({ast.unparse(node.orelse)})"
    elif isinstance(node, ast.Call):
        yield from (f"({ast.unparse(call)})" for call in other_calls(node))
    elif (other := other_expression(node)) is not None:
        yield f"({other})"


def other_calls(node: ast.Call) -> Iterator[ast.Call]:
    for index, keyword in enumerate(node.keywords):
        if keyword.arg is not None:
            yield ast.Call(node.func, node.args, node.keywords[:index] + node.keywords[index + 1 :])
    if isinstance(node.func, ast.Name) and node.func.id in OTHER_NAMES:
        yield ast.Call(ast.Name(OTHER_NAMES[node.func.id]), node.args, node.keywords)


def other_expression(node: ast.AST) -> str | None:
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return ast.unparse(ast.Compare(node.left, [OTHER[type(node.ops[0])]()], node.comparators))
    if isinstance(node, ast.BinOp) and type(node.op) in OTHER:
        return ast.unparse(ast.BinOp(node.left, OTHER[type(node.op)](), node.right))
    if isinstance(node, ast.BoolOp):
        return ast.unparse(ast.BoolOp(OTHER[type(node.op)](), node.values))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub):
        return ast.unparse(node.operand)
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float):
        value = node.value
        return repr(not value if isinstance(value, bool) else value + 1 if isinstance(value, int) else 2 * value or 1.0)
    return None


def linked(mutant: Mutant, folder: Path) -> Path:
    """A folder of links that imports as the package with the mutant in it."""
    place, original = folder / "rankwise", SOURCE
    for part in mutant.path.relative_to(SOURCE).parts:
        place.mkdir(parents=True)
        for item in original.iterdir():
            if item.name != part:
                (place / item.name).symlink_to(item)
        place, original = place / part, original / part
    place.write_text(mutant.source, encoding="utf-8")
    return folder


def tests_of(path: Path) -> tuple[list[str], list[str]]:
    """The test files of a module's folder: those that name the module, and the others."""
    folder, name = path.relative_to(SOURCE).parts[0], path.stem
    dotted = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    known = re.compile(rf"{re.escape(dotted)}\b|from {re.escape(dotted.rpartition('.')[0])} import [^\n]*\b{name}\b")
    files = sorted((TESTS / folder).glob("test_*.py"))
    near = [file for file in files if known.search(file.read_text(encoding="utf-8")) or file.stem == f"test_{name}"]
    return [str(file) for file in near], [str(file) for file in files if file not in near]


def rounds(path: Path) -> list[tuple[str, list[str]]]:
    """(marks, files) of the runs against a mutant, the telling and quick ones first."""
    near, others = tests_of(path)
    return [(f"not slow and {USUAL}", near), (f"not slow and {USUAL}", others), (f"slow and {USUAL}", [*near, *others])]


def outcome(package: Path, files: Sequence[str], seconds: float = LONGEST_SECONDS, marks: str = USUAL) -> str:
    """ "killed", "survived" or "endless": of one run of these tests with the package that lies in ``package``."""
    if not files:
        return "survived"
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(quiet, stream)
        os.environ["PYTHONPATH"] = f"{package}{os.pathsep}{TESTS}"
        sys.path[:0] = [str(package)]
        os._exit(int(pytest.main(["-x", "-q", "-m", marks, "-p", "no:cacheprovider", "-p", "no:xdist", *files])))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            # 5: no test was chosen, as where all are of a long form.
            return "survived" if os.waitstatus_to_exitcode(status) in (0, 5) else "killed"
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "endless"


def tried(mutant: Mutant) -> tuple[str, float]:
    """What became of it, and after how many seconds."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    try:
        package = linked(mutant, folder)
        found = "survived"
        for marks, files in rounds(mutant.path):
            if (found := outcome(package, files, marks=marks)) != "survived":
                break
        return found, time.monotonic() - began
    finally:
        shutil.rmtree(folder)


def prepare() -> None:
    """Import what takes long, and nothing of the package."""
    os.chdir(ROOT)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    sys.path[:] = [place for place in sys.path if Path(place or ".").resolve() != SOURCE.parent]
    for name in LIBRARIES:
        importlib.import_module(name)
    assert not any(name.split(".")[0] == "rankwise" for name in sys.modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--folders", default=",".join(FOLDERS))
    parser.add_argument("--minutes", type=float, default=600, help="begin no further mutant after so long")
    parser.add_argument("--output", type=Path, default=Path("mutants.jsonl"))
    given = parser.parse_args()
    output = given.output.resolve()
    places = [path for name in FOLDERS for path in sorted((SOURCE / name).rglob("*.py"))]
    everything = [mutant for path in places for mutant in mutants_of(path)]
    drawn = random.Random(given.seed).sample(everything, given.count)
    wanted = given.folders.split(",")
    drawn = [mutant for mutant in drawn if mutant.path.relative_to(SOURCE).parts[0] in wanted]
    prepare()
    known = [json.loads(line) for line in output.read_text().splitlines()] if output.exists() else []
    counts = collections.Counter({"killed": 0, "endless": 0, "survived": 0})
    counts.update(line["outcome"] for line in known)
    done, end = {(line["place"], line["what"]) for line in known}, time.monotonic() + 60 * given.minutes
    print(f"{len(everything)} places, {len(drawn)} drawn with seed {given.seed}, {len(done)} of them done", flush=True)
    with output.open("a", encoding="utf-8") as file:
        for mutant in drawn:
            place = f"{mutant.path.relative_to(SOURCE)}:{mutant.line}"
            if (place, mutant.what) in done:
                continue
            if time.monotonic() > end:
                break
            found, seconds = tried(mutant)
            counts[found] += 1
            line = {"place": place, "what": mutant.what, "outcome": found, "seconds": round(seconds, 1)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{found:9}{seconds:6.1f} s  {place}  {mutant.what[:90]}", flush=True)
    total = sum(counts.values())
    print(f"{total} tried: {dict(counts)}; {100 * (total - counts['survived']) / max(total, 1):.1f} % noticed")


if __name__ == "__main__":
    main()

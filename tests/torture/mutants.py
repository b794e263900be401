"""Small faults planted in the source one at a time, and whether the tests of the same folder notice.

    python tests/torture/mutants.py --seed 1 --count 300 --output mutants.jsonl

Every place that can be changed is listed; ``--seed`` draws ``--count`` of them. The source itself stays as it is: each
mutant lies in a folder of links with one other file, and the tests run in a process forked from one that has imported
the libraries, since importing them takes longer than most tests. A folder's tests run once without a mutant, to learn
which of them execute which line (``tests-FOLDER.json`` beside ``--output``); tests that fail there are left out. A
mutant then meets the tests that execute its line, the quick ones first, and after them all others.
cosmic-ray and mutmut know one command for all mutants. What ``--output`` holds of an earlier call is not tried again.
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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import coverage
import pytest

TESTS = Path(__file__).parents[1]
ROOT = TESTS.parent
SOURCE = ROOT / "src" / "rankwise"
FOLDERS = ("ops", "adapters", "training", "quantization", "data", "comparison", "export", "planning")
# The tests that `make test` runs.
USUAL = "not grid and not families and not long and not browser"
LIBRARIES = ("torch", "transformers", "trl", "datasets", "safetensors.torch", "scipy.stats", "hypothesis", "peft")
QUIETLY = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist")
# Of a folder's tests without a mutant.
LONGEST_SECONDS = 3600

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
    last_line: int
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
            yield Mutant(path, node.lineno, node.end_lineno, f"{before} -> {changed}", mutated)  # type: ignore[attr-defined]


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


@dataclasses.dataclass(frozen=True)
class Tests:
    """What a folder's tests do without a mutant."""

    # Seconds of each test that passes, by its name.
    seconds: dict[str, float]
    # Of each file of the folder, the names of the tests that execute a line.
    lines: dict[str, dict[str, list[str]]]

    def reaching(self, mutant: Mutant) -> list[str]:
        """The tests that execute one of a mutant's lines, the quick ones first."""
        lines = self.lines.get(str(mutant.path.relative_to(SOURCE)), {})
        names = {name for line in range(mutant.line, mutant.last_line + 1) for name in lines.get(str(line), ())}
        return sorted(names & self.seconds.keys(), key=self.seconds.__getitem__)

    def others(self, mutant: Mutant) -> list[str]:
        """All others: first those of files that execute or import the module, and of each part the quick ones.

        Of the tests that share a fixture of a module only the first counts as executing it. Lines that run while a
        module is imported, in another process or in Triton's interpreter count as executed by no test.
        """
        lines = self.lines.get(str(mutant.path.relative_to(SOURCE)), {})
        files = {name.partition("::")[0] for names in lines.values() for name in names} | set(near(mutant.path))
        left = self.seconds.keys() - set(self.reaching(mutant))
        return sorted(left, key=lambda name: (name.partition("::")[0] not in files, self.seconds[name]))


class Recorder:
    """A plugin of pytest that writes down which test executes which line."""

    def __init__(self, folder: str) -> None:
        self.coverage = coverage.Coverage(data_file=None, source=[str(SOURCE / folder)], config_file=False)
        self.seconds: dict[str, float] = {}
        self.failed: set[str] = set()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.coverage.switch_context(item.nodeid)
        return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] = self.seconds.get(report.nodeid, 0.0) + report.duration
        if not report.passed:
            self.failed.add(report.nodeid)

    def tests(self) -> Tests:
        data = self.coverage.get_data()
        lines: dict[str, dict[str, list[str]]] = {}
        for file in data.measured_files():
            named = lines[str(Path(file).resolve().relative_to(SOURCE))] = {}
            for line, names in data.contexts_by_lineno(file).items():
                named[str(line)] = [name for name in names if name]
        return Tests({name: took for name, took in self.seconds.items() if name not in self.failed}, lines)


class Chosen:
    """A plugin of pytest that runs these tests alone, in this order."""

    def __init__(self, names: Sequence[str]) -> None:
        self.order = {name: place for place, name in enumerate(names)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        chosen = [item for item in items if item.nodeid in self.order]
        items[:] = sorted(chosen, key=lambda item: self.order[item.nodeid])


def near(path: Path) -> list[str]:
    """The test files of a module's folder that are named as the module or import it."""
    folder, name = path.relative_to(SOURCE).parts[0], path.stem
    dotted = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts)
    known = re.compile(rf"{re.escape(dotted)}\b|from {re.escape(dotted.rpartition('.')[0])} import [^\n]*\b{name}\b")
    files = sorted((TESTS / folder).rglob("test_*.py"))
    found = [file for file in files if known.search(file.read_text(encoding="utf-8")) or file.stem == f"test_{name}"]
    return [str(file.relative_to(ROOT)) for file in found]


def tests_of(folder: str, output: Path) -> Tests:
    """A folder's tests as they run without a mutant, from ``output`` where it is newer than the source."""
    changed = max(path.stat().st_mtime for path in (SOURCE / folder).rglob("*.py"))
    if not output.exists() or output.stat().st_mtime < changed:
        began = time.monotonic()
        if forked(lambda: record(folder, output), LONGEST_SECONDS, SOURCE.parent) != 0:
            raise SystemExit(f"the tests of {folder} cannot be run without a mutant: try `pytest tests/{folder}`")
        print(f"{folder}: its tests took {time.monotonic() - began:.0f} s without a mutant", flush=True)
    tests = Tests(**json.loads(output.read_text()))
    print(f"{folder}: {len(tests.seconds)} tests pass", flush=True)
    return tests


def record(folder: str, output: Path) -> int:
    recorder = Recorder(folder)
    recorder.coverage.start()
    code = pytest.main([*QUIETLY, "-m", USUAL, str(TESTS / folder)], plugins=[recorder])
    recorder.coverage.stop()
    output.write_text(json.dumps(dataclasses.asdict(recorder.tests())))
    # 1: a test failed. Other codes say that none ran.
    return 0 if code in (0, 1) else int(code)


def run_tests(names: Sequence[str]) -> int:
    files = list(dict.fromkeys(name.partition("::")[0] for name in names))
    return int(pytest.main([*QUIETLY, "-x", "-m", USUAL, *files], plugins=[Chosen(names)]))


def forked(call: Callable[[], int], seconds: float, package: Path) -> int | None:
    """What a call returns in a process of its own that imports the package from here; None if it takes longer."""
    child = os.fork()
    if not child:
        os.setsid()
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in range(3):
            os.dup2(quiet, stream)
        os.environ["PYTHONPATH"] = f"{package}{os.pathsep}{TESTS}"
        sys.path[:0] = [str(package)]
        os._exit(call())
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return None


def outcome(package: Path, names: Sequence[str], seconds: float = LONGEST_SECONDS) -> str:
    """ "killed", "survived" or "endless": of one run of these tests with the package that lies in ``package``."""
    if not names:
        return "survived"
    code = forked(lambda: run_tests(names), seconds, package)
    return "endless" if code is None else "survived" if code == 0 else "killed"


def tried(mutant: Mutant, tests: Tests) -> tuple[str, float]:
    """What became of it, and after how many seconds."""
    began = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="mutant-"))
    try:
        package = linked(mutant, folder)
        found = "survived"
        for names in (tests.reaching(mutant), tests.others(mutant)):
            alone = sum(tests.seconds[name] for name in names)
            if (found := outcome(package, names, 60 + 10 * alone)) != "survived":
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
    tests: dict[str, Tests] = {}
    print(f"{len(everything)} places, {len(drawn)} drawn with seed {given.seed}, {len(done)} of them done", flush=True)
    with output.open("a", encoding="utf-8") as file:
        for mutant in drawn:
            place = f"{mutant.path.relative_to(SOURCE)}:{mutant.line}"
            if (place, mutant.what) in done:
                continue
            if time.monotonic() > end:
                break
            folder = mutant.path.relative_to(SOURCE).parts[0]
            if folder not in tests:
                tests[folder] = tests_of(folder, output.parent / f"tests-{folder}.json")
            found, seconds = tried(mutant, tests[folder])
            counts[found] += 1
            line = {"place": place, "what": mutant.what, "outcome": found, "seconds": round(seconds, 1)}
            file.write(json.dumps(line) + "\n")
            file.flush()
            print(f"{found:9}{seconds:6.1f} s  {place}  {mutant.what[:90]}", flush=True)
    total = sum(counts.values())
    print(f"{total} tried: {dict(counts)}; {100 * (total - counts['survived']) / max(total, 1):.1f} % noticed")


if __name__ == "__main__":
    main()

"""A LoRA step beside busy processes, and on one core, in multiples of its time alone: ours, PEFT's, and the frozen
products alone.

    python benchmarks/neighbours.py [MODEL] [--spins watched 300000 1000 passive] [--busy 1 2] [--dtype float32]

libgomp reads how long its threads spin when it is loaded, so each of ``--spins`` is a fresh process: a number is
GOMP_SPINCOUNT (300,000 by default), ``passive`` is OMP_WAIT_POLICY, and with ``watched`` rankwise changes it while
others compute. In every round of it, all sides are called in turn alone, beside each number of processes that only
count, and with all their threads moved to one core; medians.
Writes a JSON file into benchmarks/results, and neighbours.md beside it anew. Nothing else may run on the machine.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import contenders
import results
import steps
import timing
import torch

from rankwise.compat.system import WAIT_POLICIES, WATCH_SECONDS
from rankwise.records import write_json
from rankwise.reports.numbers import plural

SIDES = ("ours", "peft", "products")
ALONE = "alone"
COUNTING = "print(flush=True)\nwhile True: pass"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="demo", help="folder of a model, or demo")
    parser.add_argument("--spins", nargs="+", default=["watched", "300000", "1000", "passive"])
    parser.add_argument("--busy", nargs="+", type=int, default=[1, 2], help="numbers of busy processes")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=SIDES)
    parser.add_argument("--batch", type=int, default=2, help="sequences")
    parser.add_argument("--length", type=int, default=256, help="tokens of each, all labelled")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", choices=contenders.DTYPES, default="bfloat16", help="of the frozen weights")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    parser.add_argument("--answer", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    contenders.silence()
    if given.answer is not None:
        write_json(given.answer, measured(given))
        return
    options = ("--batch", given.batch, "--length", given.length, "--rounds", given.rounds, "--dtype", given.dtype)
    shared = [*map(str, options), "--busy", *map(str, given.busy), "--sides", *given.sides]
    found = {}
    with contenders.model_folder(given.model) as folder:
        for spin in given.spins:
            print(f"{spin} ...", file=sys.stderr, flush=True)
            for name in WAIT_POLICIES:
                os.environ.pop(name, None)
            os.environ.update(waiting(spin))
            found[spin] = timing.in_fresh_process(__file__, [folder, *shared])["seconds"]
    run = {
        "command": results.command(),
        "machine": results.machine(),
        "versions": results.versions(),
        "model": Path(given.model).name,
        "batch": given.batch,
        "length": given.length,
        "dtype": given.dtype,
        "seconds": found,
    }
    results.publish(given.output, "neighbours", run, results.sections(page))


def waiting(spin: str) -> dict[str, str]:
    if spin == "watched":
        return {}
    return {"OMP_WAIT_POLICY": spin} if spin == "passive" else {"GOMP_SPINCOUNT": spin}


def measured(given: argparse.Namespace) -> dict[str, Any]:
    """Median seconds of a call of each side: alone, beside busy processes, on one core."""
    sides = [side for side in contenders.SIDES if side in given.sides]
    models = {side: contenders.build(side, given.model, "lora", 0.0, given.dtype) for side in sides}
    ids = steps.batch_of(next(iter(models.values())), given)
    calls: dict[str, timing.Prepared] = {}
    for side, model in models.items():
        step = contenders.Step(model, ids)
        calls[side] = (step, step.forget)
    if "products" in given.sides:
        shapes = steps.dense_shapes(given.model)
        calls["products"] = (timing.Floor(shapes, ids.numel(), dtype=getattr(torch, given.dtype)), timing.nothing)
    cases: dict[str, Callable[[], contextlib.AbstractContextManager[None]]] = {ALONE: contextlib.nullcontext}
    cases |= {f"beside {count}": functools.partial(busy, count) for count in given.busy}
    cases["on one core"] = on_one_core
    seconds: dict[str, dict[str, list[float]]] = {case: {side: [] for side in calls} for case in cases}
    timing.alternate(calls, 1)
    for _ in range(given.rounds):
        for case, within in cases.items():
            with within():
                # The watch has noticed who computes.
                time.sleep(2 * WATCH_SECONDS)
                for side, (took,) in timing.alternate(calls, 1, warmup=0).items():
                    seconds[case][side].append(took)
    return {"seconds": {case: timing.medians(by_side) for case, by_side in seconds.items()}}


@contextlib.contextmanager
def busy(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", COUNTING], stdout=subprocess.PIPE) for _ in range(count)]
    try:
        for process in processes:
            # A process that has said so is past its start.
            assert process.stdout is not None
            process.stdout.readline()
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextlib.contextmanager
def on_one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    try:
        _move_threads({min(cores)})
        yield
    finally:
        _move_threads(cores)


def _move_threads(cores: set[int]) -> None:
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), cores)


def page(run: results.Run) -> list[str]:
    cases = [case for case in next(iter(run["seconds"].values())) if case != ALONE]
    headings = ["threads wait", "side", "alone, s", *(f"{case}, times as long" for case in cases)]
    return [
        f"# A LoRA step beside busy processes: {run['model']}",
        "",
        *results.where_from([run]),
        f"{plural(run['batch'], 'row')} of {run['length']} tokens, {run['dtype']}. *products* are the frozen products",
        "alone, by PyTorch. On two cores, a fair share beside one or two busy processes would be 1.5 or 2 times the",
        "time alone, and 2 times on one core. Where both share one core of the host, as in some virtual machines, one",
        "of them does more than half of the work of both, so that all figures are lower.",
        "",
        *results.table(headings, [_line(*key, by_case) for key, by_case in _sides(run)]),
        "",
    ]


def _sides(run: results.Run) -> Iterator[tuple[tuple[str, str], dict[str, float]]]:
    for spin, by_case in run["seconds"].items():
        for side in by_case[ALONE]:
            yield (spin, side), {case: medians[side] for case, medians in by_case.items()}


def _line(spin: str, side: str, seconds: dict[str, float]) -> list[str]:
    named = "=".join(*waiting(spin).items()) if waiting(spin) else "until others compute"
    alone = seconds[ALONE]
    return [
        *(named, side, results.number(alone, 3)),
        *(results.number(value / alone) for case, value in seconds.items() if case != ALONE),
    ]


if __name__ == "__main__":
    main()

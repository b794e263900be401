"""A long run and many switches of adapters: memory, file handles, threads, time of a step and logs do not grow.

    python tests/torture/long_run.py FOLDER --steps 20000 --switches 10000

Prints two JSON lines with what was measured, and ends with 1 where something grew: resident memory by more than 3 %
from the second tenth to the last, handles or threads by one, the time of a step by a fifth, a log beyond a line a step.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from disk_cases import Cases

import rankwise as rw
from rankwise.records import read_metrics
from tiny_models import tiny_llama

# Growth beyond these shares is a leak.
MEMORY_SHARE, TIME_SHARE = 0.03, 0.2
ADAPTERS = 24
SAMPLES = 400
# Pages come and go by some, however small the process is.
LEAST_BYTES = 8_000_000


class Sample(NamedTuple):
    rss: int
    handles: int
    threads: int


def sample() -> Sample:
    process = psutil.Process()
    return Sample(process.memory_info().rss, process.num_fds(), process.num_threads())


def growth(samples: Sequence[Sample]) -> dict[str, Any]:
    """The medians of the second tenth and of the last one."""
    tenth = max(1, len(samples) // 10)
    early, late = samples[tenth : 2 * tenth], samples[-tenth:]
    medians = {
        name: [statistics.median(getattr(s, name) for s in part) for part in (early, late)] for name in Sample._fields
    }
    (before, after), faults = medians["rss"], []
    if after - before > max(MEMORY_SHARE * before, LEAST_BYTES):
        faults.append(f"resident memory grew from {before / 1e6:.1f} to {after / 1e6:.1f} MB")
    faults += [f"{name} grew from {a} to {b}" for name in ("handles", "threads") for a, b in [medians[name]] if b > a]
    return {"samples": len(samples), **medians, "faults": faults}


def long_run(folder: Path, steps: int) -> dict[str, Any]:
    """A run on rows of 2 to 60 tokens, evaluated and saved fifty times."""
    cases = Cases(folder)
    cases.prepare_base()
    draw = random.Random(0)
    rows = [
        {"prompt": "w1 ", "completion": " ".join(draw.choices(cases.words, k=draw.randrange(1, 59)))}
        for _ in range(500)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    every = max(1, steps // 50)
    length = ("--max-steps", steps, "--save-steps", every, "--eval-steps", every, "--logging-steps", 1)
    samples, done = [], threading.Event()
    log = cases.output / "metrics.jsonl"

    def watch() -> None:
        while not done.wait(0.25):
            # Not while it loads.
            if log.is_file():
                samples.append(sample())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    try:
        cases.must(cases.train("made/out", *length))
    finally:
        done.set()
        watcher.join()
    found = growth(samples)
    times = [line["train_seconds"] for line in read_metrics(cases.output) if "train_seconds" in line]
    size = len(times) // 10
    early, late = times[2 * size] - times[size], times[-1] - times[-1 - size]
    found |= {"steps": steps, "seconds": round(time.monotonic() - began, 1), "seconds_of_a_tenth": [early, late]}
    found["log_bytes_a_step"] = round(log.stat().st_size / steps, 1)
    found["checkpoints"] = len(list((cases.output / "checkpoints").iterdir()))
    if late > (1 + TIME_SHARE) * early:
        found["faults"].append(f"a tenth of the steps took {early:.1f} s and in the end {late:.1f} s")
    return found


def many_switches(switches: int) -> dict[str, Any]:
    """Adapters of all kinds in one model: the answers stay theirs."""
    model, ids = tiny_llama(), torch.tensor([[1, 5, 9, 14]])
    for number in range(ADAPTERS):
        given = {"r": 1 + number % 4, "use_dora": number % 2 == 1, "init_lora_weights": False}
        rw.add_adapter(model, rw.LoraConfig(**given), name=f"a{number}")
    draw, answers, samples = random.Random(0), {}, []
    for number in range(switches):
        name = f"a{draw.randrange(ADAPTERS)}"
        rw.set_adapter(model, name)
        with torch.no_grad():
            logits = model(input_ids=ids).logits
        assert torch.equal(answers.setdefault(name, logits), logits), (
            f"{name} answers otherwise after {number} switches"
        )
        if number % max(1, switches // SAMPLES) == 0:
            samples.append(sample())
    return {"switches": switches, "adapters": ADAPTERS, **growth(samples)}


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--switches", type=int, default=10_000)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    folder = given.folder.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    faults = []
    for measured in (lambda: many_switches(given.switches), lambda: long_run(folder, given.steps)):
        found = measured()
        faults += found["faults"]
        print(json.dumps(found), flush=True)
    return int(bool(faults))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

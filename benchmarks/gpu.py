"""Training on a CUDA card: every kernel checked, then layers and whole Llama shapes timed against the frozen products.

    python benchmarks/gpu.py [--seconds 560]

From a source tree: it needs torch, transformers and triton, and times PEFT, bitsandbytes and Unsloth where they are
installed. First every kernel is judged against float64, while the kernels of the timings compile beside; then come a
Llama of 8B and of 1B with random weights (bfloat16, r = 16 on all linear layers, no recomputation): a plain loop, our
step as `rankwise train` runs it, padded and packed, and other libraries; then layers of 4096 and 8192, and the 4-bit
kernels by themselves. Times are multiples of all frozen matrix products, timed in the same rounds.

Every job runs in a process of its own under a time limit, so that nothing that fails takes down what follows. Its
result is saved as soon as it is there, in benchmarks/results/gpu.json. After ``--seconds`` no job begins; the same
command goes on where it stopped, with the same card, versions and sources. Each call prints the table of all that is
there and writes benchmarks/results/gpu.md.
Exit code 1 when a check fails, 3 when something is left to do. ``--device cpu --tiny`` tries the script itself, on
shapes without meaning.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from stand_in import SOURCE, source_tree

source_tree()

import gpu_page  # noqa: E402
import results  # noqa: E402
import torch  # noqa: E402
from gpu_jobs import METHODS, Job, Wanted  # noqa: E402
from gpu_models import LLAMA  # noqa: E402

from rankwise.records import write_json  # noqa: E402

SECTIONS = ("checks", "models", "layers", "four-bits")
# Processes that check and compile side by side.
SIDE_BY_SIDE = 8
HERE = Path(__file__).parent


class Results:
    """What is known so far: in the file after every job, whole or not at all."""

    def __init__(self, path: Path, about: dict[str, Any]) -> None:
        self.path = path
        kept = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        is_same = kept.get("about", {}).get("identity") == about["identity"]
        if kept and not is_same:
            say("the results there are of another card, version or source: they are made anew")
        self.content = {"about": about, "jobs": kept.get("jobs", {}) if is_same else {}}

    def keep(self, job: Job, found: dict[str, Any]) -> None:
        self.content["jobs"][job.key] = {"job": dataclasses.asdict(job), "found": found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.path, self.content)

    def has(self, job: Job) -> bool:
        return job.key in self.content["jobs"]


def main(arguments: Sequence[str] | None = None) -> int:
    given = parse(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        say("no CUDA device here: benchmarks/gpu.py needs one (--device cpu --tiny tries the script).")
        return 2
    end = time.monotonic() + given.seconds
    wanted = Wanted(
        tuple(given.sections), tuple(given.shapes), tuple(given.sizes), tuple(given.methods), sides(given.device),
        given.batch, given.length, given.device,
    )  # fmt: skip
    kept = Results(given.output / "gpu.json", about(given))
    left = do_all(wanted.first(), kept, end, side_by_side=1 if given.device == "cpu" else SIDE_BY_SIDE)
    left += do_all(wanted.rows(), kept, end)
    failed = gpu_page.publish(kept.content, given.output)
    if left:
        say(f"{left} jobs are left: run the same command again")
    return 1 if failed else 3 if left else 0


def do_all(jobs: Iterable[Job], kept: Results, end: float, *, side_by_side: int = 1) -> int:
    """Do what is not done yet as long as there is time; how many jobs are left."""
    to_do = [job for job in jobs if not kept.has(job)]
    done = 0
    with ThreadPoolExecutor(side_by_side) as pool:
        for start in range(0, len(to_do), side_by_side):
            together = to_do[start : start + side_by_side]
            seconds = end - time.monotonic()
            if seconds <= 0:
                break
            # A job that the time of this call ends is not kept: it may have needed a moment more.
            for job, found in zip(together, pool.map(lambda job: do(job, end), together)):
                if found is None:
                    continue
                kept.keep(job, found)
                done += 1
                say(gpu_page.said(job, found))
    return len(to_do) - done


def do(job: Job, end: float) -> dict[str, Any] | None:
    """What the job's process found, or the note that says why it found nothing; None where time ran out."""
    with tempfile.TemporaryDirectory() as folder:
        answer, log = Path(folder) / "answer.json", Path(folder) / "log"
        limit = min(job.seconds, end - time.monotonic())
        with log.open("w", encoding="utf-8") as said:
            process = subprocess.Popen(command_of(job, answer), stdout=said, stderr=said)
            try:
                code = process.wait(max(limit, 0))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                return {"note": f"ended after {job.seconds} s"} if limit == job.seconds else None
        if code == 0 and answer.is_file():
            return dict(json.loads(answer.read_text(encoding="utf-8")))
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"note": f"exit code {code}: {lines[-1] if lines else 'it said nothing'}"[:300]}


def command_of(job: Job, answer: Path) -> list[str]:
    script = "gpu_unsloth.py" if job.side == "unsloth" else "gpu_job.py"
    return [sys.executable, str(HERE / script), json.dumps(dataclasses.asdict(job)), "--answer", str(answer)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--shapes", nargs="+", choices=list(LLAMA), default=["8B", "1B"])
    parser.add_argument("--sizes", type=int, nargs="+", default=[4096, 8192], help="square layers")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--batch", type=int, default=4, help="sequences of a micro-batch")
    parser.add_argument("--length", type=int, default=2048, help="tokens of each")
    parser.add_argument("--seconds", type=float, default=560, help="of this call; no job runs longer")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="shapes of a few elements, to try the script")
    parser.add_argument("--output", type=Path, default=results.FOLDER)
    given = parser.parse_args(arguments)
    if given.tiny:
        given.shapes, given.sizes, given.batch, given.length = ["tiny"], [64], 2, 16
    return given


def sides(device: str) -> tuple[str, ...]:
    others = ["peft", *(["unsloth"] if device == "cuda" else [])]
    return ("ours", *(name for name in others if importlib.util.find_spec(name)))


def about(given: argparse.Namespace) -> dict[str, Any]:
    """Everything that a timing depends on; a version is None for what is not installed. ``identity``: what has to be
    the same for results to be shown side by side."""
    card = torch.cuda.get_device_name() if given.device == "cuda" else "no card (a trial of the script)"
    versions = results.versions()
    others = {package: number for package, number in versions.items() if package != "rankwise"}
    sources = [*sorted(SOURCE.rglob("*.py")), *sorted(HERE.glob("gpu*.py"))]
    source = hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()
    return {
        "command": results.command(),
        "card": card,
        "cuda": torch.version.cuda,
        "machine": results.machine(),
        "versions": versions,
        "identity": {"card": card, "versions": others, "source": source},
    }


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())

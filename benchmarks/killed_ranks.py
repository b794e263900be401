"""Kill a random process of a run at a random moment, resume the run, and compare its bits with a run left alone.

    python benchmarks/killed_ranks.py MODEL DATA FOLDER [--times 10] [--processes 2] [--seed 0] [-- OPTIONS of train]

The moments are drawn within the time that the processes of an uninterrupted run lived, which FOLDER keeps for the next
call. Each time the whole run is done anew, until so many were killed before their end. A run that hangs for ten
minutes, a second message or another bit is a failure.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

HANGS_SECONDS = 600


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "rankwise", "train", *map(str, arguments)]


def processes_of(launcher: int) -> list[int]:
    """The ranks that a launcher has started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            is_rank = b"\0RANK=" in (folder / "environ").read_bytes()
        except OSError:
            continue
        if parent == launcher and is_rank:
            found.append(int(folder.name))
    return found


def wait_for_processes(launch: subprocess.Popen[str]) -> None:
    while launch.poll() is None and not processes_of(launch.pid):
        time.sleep(0.05)


def run_alone(base: tuple[object, ...], folder: Path) -> float:
    """Train without interruption, where no earlier call has; the seconds that its processes lived."""
    note = folder / "alone.seconds"
    if not note.exists():
        launch = subprocess.Popen(command(*base, "--output", folder / "alone"), stdout=subprocess.DEVNULL)
        wait_for_processes(launch)
        began = time.monotonic()
        assert launch.wait() == 0
        note.write_text(str(time.monotonic() - began))
    return float(note.read_text())


def kill_one(launch: subprocess.Popen[str], delay: float) -> bool:
    """Wait, then kill a random process; whether one was still there."""
    wait_for_processes(launch)
    time.sleep(delay)
    there = processes_of(launch.pid)
    if there:
        os.kill(random.choice(there), signal.SIGKILL)
    return bool(there)


def same_bits(folder: Path, other: Path) -> bool:
    names = sorted(path.name for path in other.glob("*.safetensors"))
    return bool(names) and all((folder / name).read_bytes() == (other / name).read_bytes() for name in names)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    given, options = parser.parse_args(sys.argv[1:end]), sys.argv[end + 1 :]
    random.seed(given.seed)
    base = ("--model", given.model, "--data", given.data, "--devices", given.processes, *options)
    given.folder.mkdir(exist_ok=True)
    usual, killed, late, failures = run_alone(base, given.folder), 0, 0, 0
    while killed < given.times:
        folder = given.folder / "killed"
        shutil.rmtree(folder, ignore_errors=True)
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        launch = subprocess.Popen(command(*base, "--output", folder), **pipes)  # type: ignore[call-overload]
        delay = random.uniform(0, usual)
        in_time = kill_one(launch, delay)
        killed, late = killed + in_time, late + (not in_time)
        said = launch.communicate(timeout=HANGS_SECONDS)[1]
        saved = len(list(folder.glob("checkpoints/step-*")))
        again = base if not (folder / "run.json").exists() else ("--resume",)
        resumed = subprocess.run(
            command(*again, "--output", folder), capture_output=True, text=True, timeout=HANGS_SECONDS
        )
        messages = said.count("error RW")
        is_right = resumed.returncode == 0 and messages <= 1 and same_bits(folder, given.folder / "alone")
        failures += not is_right
        when = f"killed after {delay:.1f} of {usual:.1f} s" if in_time else "too late"
        what = "same bits" if is_right else "FAILED"
        print(f"{when}, {saved} checkpoints there, {messages} message, {what}", flush=True)
        if not is_right:
            print(said, resumed.stderr, sep="\n")
    print(
        f"{killed} killed before their end and {late} not; {killed + late - failures} ended with the bits of one alone"
    )
    return int(failures > 0)


if __name__ == "__main__":
    sys.exit(main())

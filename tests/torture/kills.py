"""Commands killed with SIGKILL again and again: a run continues to the same bits, other outputs are whole or not there.

    python tests/torture/kills.py FOLDER --seed 1 --train 1000 --saves 100 --loading 50 --ranks 50 \\
        --merge 100 --export 100 --compare 100 --dpo 20 --kto 20 --grpo 20 --auto 20

Every process is forked from this one, which has called each command once and has its libraries. Moments are drawn
evenly over the processor time that the command took undisturbed, so that they fall alike on a busy machine; those of
``--saves`` are calls that change a file, which `failing_disk.c` counts. Prints one JSON line for each kind: how many
were killed, where they fell, and what went wrong.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import os
import random
import resource
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from disk_cases import ADAPTER, Cases, equal

from in_process import steps_in_this_process
from rankwise.cli.main import main
from rankwise.training.checkpoints import list_checkpoints

# After which a process hangs; a machine of the tests may be busy.
LONG_SECONDS = 300
# torchrun sends SIGTERM when a process has died, and SIGKILL after half a minute.
TORCHRUN_SECONDS = 10
LENGTH = ("--max-steps", 6, "--save-steps", 1, "--eval-steps", 2, "--lora-dropout", 0.1)
OTHERS = ("dpo", "kto", "grpo", "auto")
RANKS = ("--max-steps", 4, "--save-steps", 1, "--batch-size", 1)


@dataclasses.dataclass
class Kind:
    """What to kill, and how it is found to be right afterwards."""

    name: str
    words: Sequence[object]
    # After a kill: the command that goes on, by what lies in the output.
    again: Callable[[], Sequence[object]]
    # In the output, and the undisturbed one.
    made: str
    same: Path
    environments: Sequence[Mapping[str, str]] = ({},)


class Killer:
    def __init__(self, folder: Path, seed: int) -> None:
        self.cases, self.seed = Cases(folder), seed
        self.folder, self.output = folder, self.cases.output
        self.log = folder / "said.txt"
        # What the commands import is there in every fork from then on.
        self.is_warm = not (folder / "compared").exists()
        if self.is_warm:
            self.cases.prepare()
        self.seconds: dict[Path, float] = {}

    def fork(self, words: Sequence[object], environment: Mapping[str, str], at_call: int = 0) -> int:
        child = os.fork()
        if child:
            return child
        os.environ.update(environment)
        said = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(said, stream)
        if at_call:
            self.cases.library.disk_fail(f"{self.folder}/made/".encode(), at_call, -signal.SIGKILL, 0)
        os._exit(main([str(word) for word in words]))

    def ended(self, child: int, seconds: float = LONG_SECONDS) -> int | None:
        """The exit code; None where it has not ended after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.002)
        return None

    def stopped(self, child: int) -> int | None:
        """The exit code of a process whose companion has died. One that waits for it is ended as torchrun does."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            code = self.ended(child, TORCHRUN_SECONDS)
            if code is not None:
                return code
            os.kill(child, number)
        return self.ended(child)

    def wait_until_used(self, child: int, seconds: float) -> None:
        """Until the process has used so much processor time, or has ended."""
        end = time.monotonic() + LONG_SECONDS
        while processor_seconds(child) < seconds and time.monotonic() < end:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                return
            time.sleep(0.0005)

    def run(self, kind: Kind, words: Sequence[object], killed_after: float | None = None) -> list[int | None]:
        """The exit codes of its processes, the last of which is killed after so many seconds of processor time."""
        self.log.unlink(missing_ok=True)
        port = {"MASTER_PORT": str(free_port())} if len(kind.environments) > 1 else {}
        children = [self.fork(words, {**environment, **port}) for environment in kind.environments]
        if killed_after is not None:
            self.wait_until_used(children[-1], killed_after)
            os.kill(children[-1], signal.SIGKILL)
            return [*map(self.stopped, children[:-1]), self.ended(children[-1])]
        codes = [self.ended(child) for child in children]
        for child, code in zip(children, codes):
            if code is None:
                os.kill(child, signal.SIGKILL)
                self.ended(child)
        return codes

    def clean(self) -> None:
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.output.parent.mkdir()

    def undisturbed(self, kind: Kind) -> float:
        """The processor time of one of its processes. Keeps what it made where ``kind`` has nothing to compare with."""
        if kind.same in self.seconds:
            return self.seconds[kind.same]
        if not self.is_warm and len(kind.environments) == 1:
            self.clean()
            self.cases.must(kind.words)
        self.clean()
        began = children_seconds()
        codes = self.run(kind, kind.words)
        seconds = (children_seconds() - began) / len(codes)
        assert not any(codes), self.log.read_text()
        if not kind.same.exists():
            shutil.copytree(self.output, kind.same.parent, dirs_exist_ok=True)
        assert equal(self.output / kind.made, kind.same), f"two undisturbed calls of {kind.name} differ"
        return self.seconds.setdefault(kind.same, seconds)

    def try_all(self, kind: Kind, count: int, *, share: float = 1.0, by_calls: bool = False) -> None:
        """Kill it ``count`` times within the first ``share`` of its time, or at its calls that change a file."""
        draw = random.Random(f"{self.seed} {kind.name}")
        seconds = self.undisturbed(kind)
        calls = self.calls_of(kind) if by_calls else 0
        places: collections.Counter[str] = collections.Counter()
        problems: list[str] = []
        for number in range(count):
            self.clean()
            if by_calls:
                self.log.unlink(missing_ok=True)
                codes = [self.ended(self.fork(kind.words, {}, draw.randrange(1, calls + 1)))]
            else:
                codes = self.run(kind, kind.words, draw.random() * seconds * share)
            places[self.place() if codes[-1] == -signal.SIGKILL else "had ended"] += 1
            fault = self.fault(kind, codes)
            if fault is not None:
                problems.append(f"{kind.name} {number}: {fault}")
        print(json.dumps({"kind": kind.name, "kills": count, "places": places, "problems": problems}), flush=True)

    def calls_of(self, kind: Kind) -> int:
        """How many calls change a file."""
        self.clean()
        code, said = self.cases.call(kind.words, 10**6)
        assert code == 0, said
        return self.cases.seen

    def place(self) -> str:
        """Where the kill fell, by what lies there."""
        hidden = [path.name for path in self.output.parent.rglob(".*")]
        if any(".tmp-step-" in name for name in hidden):
            return "inside a checkpoint"
        if any(".partial-" in name for name in hidden):
            return "inside the output"
        if any(not name.endswith(".rankwise-lock") for name in hidden):
            return "inside a file"
        if not (self.output / "run.json").is_file():
            return "before the run" if not self.output.exists() else "with an output"
        if json.loads((self.output / "run.json").read_text())["status"] == "finished":
            return "after the end"
        return "between checkpoints" if list_checkpoints(self.output) else "before the first checkpoint"

    def fault(self, kind: Kind, codes: Sequence[int | None]) -> str | None:
        """What is wrong after a kill."""
        if None in codes:
            return "a process that was left alone hangs"
        # torchrun's signals ended it, or it said that the other is gone.
        if any(code not in (0, 2, 130, -signal.SIGTERM, -signal.SIGKILL) for code in codes[:-1]):
            return f"the other process ended with {codes[:-1]}: {self.log.read_text()[-600:]}"
        whole = self.output / kind.made
        if whole.exists() and kind.name in ("merge", "export") and not equal(whole, kind.same):
            return "what is under the final name is not whole"
        if whole.exists() and kind.name in ("merge", "export"):
            return None
        again = self.run(kind, kind.again())
        if any(again):
            return f"then {again}: {self.log.read_text()[-600:]}"
        if not equal(whole, kind.same):
            return "the result differs"
        strays = [str(path.relative_to(self.output.parent)) for path in self.output.parent.rglob(".*")]
        return f"left {strays}" if strays else None


def processor_seconds(process: int) -> float:
    """Of all its threads, by the clock that clock_getcpuclockid(3) names."""
    return time.clock_gettime((~process << 3) | 2)


def children_seconds() -> float:
    """Of all that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return int(place.getsockname()[1])


def kinds_of(killer: Killer) -> dict[str, Kind]:
    cases, folder = killer.cases, killer.folder

    def resumed(words: Sequence[object]) -> Callable[[], Sequence[object]]:
        return lambda: [*words, *(["--resume"] if cases.has_record() else [])]

    ranks = [
        {"RANK": str(n), "WORLD_SIZE": "2", "LOCAL_RANK": str(n), "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
        for n in range(2)
    ]
    adapter = Path(ADAPTER).name
    train, two = cases.train("made/out", *LENGTH), cases.train("made/out", *RANKS)
    merge = ["merge", "--adapter", folder / "finished", "--output", cases.output]
    export = cases.export("llama.cpp", "made/out")
    compare = cases.compare("made/out")
    others = {name: cases.learn(name, "made/out", *LENGTH) for name in OTHERS}
    return {
        "train": Kind("train", train, resumed(train), adapter, folder / "long" / adapter),
        "ranks": Kind("ranks", two, resumed(two), adapter, folder / "two" / adapter, ranks),
        "merge": Kind("merge", merge, lambda: merge, "model.safetensors", folder / "merged" / "model.safetensors"),
        "export": Kind("export", export, lambda: export, "adapter.gguf", folder / "llama.cpp" / "adapter.gguf"),
        "compare": Kind("compare", compare, lambda: compare, "report.json", folder / "compared/report.json"),
        **{name: Kind(name, words, resumed(words), adapter, folder / name / adapter) for name, words in others.items()},
    }


def main_of(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    for name in ("train", "saves", "loading", "ranks", "merge", "export", "compare", *OTHERS):
        parser.add_argument(f"--{name}", type=int, default=0)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    steps_in_this_process(pytest.MonkeyPatch())
    given.folder.mkdir(parents=True, exist_ok=True)
    killer = Killer(given.folder.resolve(), given.seed)
    kinds = kinds_of(killer)
    for name, kind in kinds.items():
        if getattr(given, name):
            killer.try_all(kind, getattr(given, name))
    if given.saves:
        killer.try_all(dataclasses.replace(kinds["train"], name="saves"), given.saves, by_calls=True)
    if given.loading:
        killer.try_all(dataclasses.replace(kinds["train"], name="loading"), given.loading, share=0.3)


if __name__ == "__main__":
    main_of(sys.argv[1:])

"""What ends several processes, and that all of them end with one message."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from device_runs import Runs, check_failed, check_saved, differing, lines, needs_proc, record

from several import Nursery
from tables import long


@needs_proc
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_killed_process_ends_all_and_the_run_continues_to_the_bit(
    runs: Runs, several: Nursery, given: list[str], strategy: str, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    options = ("--method", "qdora", "--batch-size", 2, "--strategy", strategy, "--output", folder)
    launch = several.start(2, [*given, *options])
    launch.wait_for(folder, "checkpoints/step-2")
    os.kill(launch.pids[1], signal.SIGKILL)
    done = launch.ended()
    check_failed(done, "error RW702: process 0 of 2 has lost the others")
    assert done.codes == [2, -signal.SIGKILL]
    assert record(folder)["status"] == "failed"
    again = several.run(2, ["train", "--resume", "--output", folder])
    assert again.codes == [0, 0], again.stderr
    assert differing(runs.two, folder) == []
    assert lines(folder, "loss") == lines(runs.two, "loss")


@needs_proc
@pytest.mark.long
def test_shards_that_train_continue_to_the_bit(several: Nursery, given: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--method", "full", "--batch-size", 2, "--strategy", "fsdp", "--output")
    done = several.run(2, [*given, *options, whole])
    assert done.codes == [0, 0], done.stderr
    launch = several.start(2, [*given, *options, killed])
    launch.wait_for(killed, "checkpoints/step-2")
    os.kill(launch.pids[0], signal.SIGKILL)
    check_failed(launch.ended(), "error RW702: process 1 of 2 has lost the others")
    again = several.run(2, ["train", "--resume", "--output", killed])
    assert again.codes == [0, 0], again.stderr
    assert differing(whole, killed) == []
    assert lines(killed, "loss") == lines(whole, "loss")


FAULTS = {
    "a loss that is not finite in one process": (
        """
import dataclasses
from rankwise.training.objectives import Demonstrations
prepare, compute = Demonstrations.prepare, Demonstrations.loss
def noted(self, batches, step):
    self.step = step
    return prepare(self, batches, step)
def broken(self, *args):
    found = compute(self, *args)
    return dataclasses.replace(found, sum=found.sum * (float("nan") if rank == 1 and self.step == 2 else 1))
Demonstrations.prepare, Demonstrations.loss = noted, broken
""",
        ("RW530: the loss is nan at step 3",),
    ),
    "a full disk where the writer writes": (
        """
import errno
from rankwise.training import loop
def full(*args, **more):
    raise OSError(errno.ENOSPC, "No space left on device")
loop.save_state = full
""",
        ("RW551", "free space there"),
    ),
    "an error in one process": (
        """
from rankwise.errors import RunError
from rankwise.training.objectives import Demonstrations
prepare = Demonstrations.prepare
def broken(self, batches, step):
    if rank == 1 and step == 2:
        raise RunError("RW530", "broken.")
    return prepare(self, batches, step)
Demonstrations.prepare = broken
""",
        ("RW530: broken",),
    ),
    "a process that cannot write where the others do": (
        """
import os
from rankwise.training import ranks
ranks.FILE_SECONDS = 2
os.chdir(("here", "there")[rank])
""",
        ("RW701: process 1 does not see run",),
    ),
    "other data": (
        """
import os
os.chdir(("here", "there")[rank])
open("train.jsonl", "a").write('{"prompt": "another", "completion": "row"}\\n' * rank)
""",
        ("RW700", "the sha256 of the train data"),
    ),
}


IN_SHORT = ("a full disk where the writer writes", "an error in one process", "other data")


@pytest.mark.parametrize("what", [*IN_SHORT, *long([(what,) for what in FAULTS if what not in IN_SHORT])])
def test_a_fault_in_one_process_ends_all_with_one_message(
    what: str, several: Nursery, given: list[str], rows: Path, tmp_path: Path
) -> None:
    fault, words = FAULTS[what]
    options: list[Any] = [*given, "--method", "lora", "--batch-size", 2, "--output"]
    options.append("run" if "chdir" in fault else tmp_path / "run")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text((rows / "train.jsonl").read_text())
    if what == "other data":
        options[options.index(str(rows / "train.jsonl"))] = "train.jsonl"
    fault = f"import os; os.chdir({str(tmp_path)!r})\n{fault}"
    check_failed(several.run(2, options, fault), *words)


# Process 1 is slow to join.
SLOW = """
import os, time
import torch.distributed as dist
from rankwise.training import ranks
join, check = dist.init_process_group, ranks.check_processes
def slow(*given, **more):
    join(*given, **more)
    time.sleep(rank)
    open(os.path.join(FOLDER, f"joined-{rank}"), "w").close()
def late(*given):
    assert os.path.exists(os.path.join(FOLDER, "joined-1")), "too early"
    check(*given)
dist.init_process_group, ranks.check_processes = slow, late
"""


def test_no_process_goes_on_before_all_have_joined(several: Nursery, given: list[str], tmp_path: Path) -> None:
    options = ("--devices", 4, "--output", tmp_path / "run")
    done = several.run(2, [*given, *options], f"FOLDER = {str(tmp_path)!r}\n{SLOW}")
    check_failed(done, "RW137: --devices is 4, and the launcher has started 2 processes")


@needs_proc
def test_a_process_that_hangs_ends_all(several: Nursery, given: list[str], tmp_path: Path) -> None:
    folder, patience = tmp_path / "hung", 10
    fault = f"from rankwise.training import ranks; ranks.PATIENCE_SECONDS = {patience}"
    options = ("--method", "lora", "--batch-size", 2, "--output", folder)
    launch = several.start(2, [*given, "--max-steps", 2000, *options], fault, grace_seconds=2)
    launch.wait_for(folder, "checkpoints/step-2")
    os.kill(launch.pids[1], signal.SIGSTOP)
    began = time.monotonic()
    done = launch.ended()
    check_failed(done, "error RW702: process 0 of 2 has lost the others")
    assert done.codes == [2, -signal.SIGKILL]
    assert time.monotonic() - began < patience + 60
    assert record(folder)["status"] == "failed"


@needs_proc
def test_a_signal_to_one_process_saves_once_and_ends_all(several: Nursery, given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    launch = several.start(2, [*given, "--max-steps", 2000, "--batch-size", 2, "--output", folder])
    launch.wait_for(folder, "checkpoints/step-2")
    os.kill(launch.pids[1], signal.SIGTERM)
    done = launch.ended()
    assert done.codes == [130, 130]
    check_saved(folder, done.stderr)

"""torch's launcher around several processes: ``--devices N`` and torchrun."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from device_runs import Runs, check_saved, differing, lines, needs_proc, record

from rankwise.cli.train import launch
from rankwise.config import TrainSettings
from several import LAUNCHERS, LONG

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def started(command: list[Any]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *map(str, command)], env=ENVIRONMENT, **pipes)


def children(pid: int) -> list[int]:
    """The processes of a launcher, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == pid:
                environment = folder.joinpath("environ").read_bytes().split(b"\0")
                found |= {int(item[5:]): int(folder.name) for item in environment if item.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@contextlib.contextmanager
def running(command: list[Any], folder: Path, after: str) -> Iterator[subprocess.Popen[str]]:
    """A launched run, once ``after`` (a pattern) exists in its folder."""
    run = started(command)
    try:
        deadline = time.monotonic() + LONG
        while not list(folder.glob(after)) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield run
    finally:
        run.kill()


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and messages; a run that hangs fails the test."""
    stderr = run.communicate(timeout=LONG)[1]
    return run.returncode, stderr


@needs_proc
@pytest.mark.long
def test_a_signal_to_the_command_saves_once_and_ends_all(given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    options = ["--max-steps", 2000, "--batch-size", 2, "--devices", 2, "--output", folder]
    with running(["rankwise", *given, *options], folder, "checkpoints/step-2") as run:
        run.send_signal(signal.SIGTERM)
        code, stderr = ended(run)
    assert code == 130
    check_saved(folder, stderr)


# What runs in the place of Python notes how it was started, and fails.
FAKE = """#!/bin/sh
echo "$RANK of $WORLD_SIZE: $*" >> "$NOTES"
exit 3
"""


def test_devices_start_as_many_processes_and_end_as_they_do(
    rankwise: Any, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr("rankwise.cli.train.sys.executable", str(fake))
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    done = rankwise(*given, "--devices", 2, "--output", tmp_path / "run")
    logging.disable(logging.NOTSET)
    assert (done.code, done.stdout) == (3, "")
    notes = sorted((tmp_path / "notes").read_text().splitlines())
    assert [note.partition(": ")[0] for note in notes] == ["0 of 2", "1 of 2"]
    assert all("-m rankwise train --config" in note for note in notes)


@pytest.mark.parametrize("is_ignored", [False, True])
def test_a_signal_that_nohup_lets_a_command_ignore_ends_no_processes(
    is_ignored: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []

    def starting(config: Any, program: str) -> Any:
        started.append(config)
        return lambda *command: None

    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", starting)
    for name in ("OMP_NUM_THREADS", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        launch(TrainSettings(model="M", data="D", output=tmp_path, devices=2), as_json=False)
    finally:
        signal.signal(signal.SIGHUP, before)
        logging.disable(logging.NOTSET)
    heeded = started[0].signals_to_handle.split(",")
    assert {"SIGTERM", "SIGINT"} <= {*heeded}
    assert ("SIGHUP" in heeded) is not is_ignored


@needs_proc
@pytest.mark.long
def test_torchrun_starts_a_run_again_that_lost_a_process(runs: Runs, given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "restarted"
    # Without -- torchrun would take --r for one of its own options.
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "-m", "--"]
    options = ["--method", "qdora", "--batch-size", 2, "--output", folder]
    with running([*launcher, "rankwise", *given, *options], folder, "checkpoints/step-2") as run:
        os.kill(children(run.pid)[1], signal.SIGKILL)
        code, stderr = ended(run)
    assert code == 0, stderr
    assert record(folder)["status"] == "finished"
    assert differing(runs.two, folder) == []
    assert lines(folder, "loss") == lines(runs.two, "loss")

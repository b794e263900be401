"""The environment, the exit codes and the restarts of processes that a launcher starts. No process is launched."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rankwise.cli.train import LAUNCHER, _failure, continued, end_with_launcher
from rankwise.config import TrainSettings
from rankwise.errors import RunError
from rankwise.records import RunRecord
from rankwise.training.ranks import terminable
from several import LAUNCHERS


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("train", {"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ("evaluate", {"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
    ],
)
def test_a_broken_environment_is_one_clear_error(
    command: str, changes: dict[str, str], words: str, rankwise: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in zip(LAUNCHERS, ("1", "2", "1", "2", "localhost", "29500")):
        monkeypatch.setenv(name, changes.get(name, value))
    given = ("--model", "demo", "--data", "stdlib", "--output", tmp_path / "run")
    done = rankwise(command, *given, *(("--task", "perplexity") if command == "evaluate" else ()))
    assert done.code == 2
    assert "RW136" in done.stderr
    assert words in done.stderr


def test_the_exit_code_is_that_of_the_process_that_failed() -> None:
    assert _failure({0: 130, 1: 2}).exit_code == 2  # type: ignore[attr-defined]
    assert _failure({0: 130, 1: 130}).exit_code == 130  # type: ignore[attr-defined]
    assert _failure({0: -15, 1: 1}).exit_code == 1  # type: ignore[attr-defined]
    assert _failure({0: -15, 1: 130}).exit_code == 130  # type: ignore[attr-defined]
    lost = _failure({0: 130, 1: -9})
    assert isinstance(lost, RunError)
    assert "the processes were killed (process 1 by SIGKILL)" in lost.message
    killed = _failure({0: -9, 1: -15})
    assert isinstance(killed, RunError)
    assert "process 0 by SIGKILL, process 1 by SIGTERM" in killed.message


def test_a_restarted_process_resumes_what_the_last_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = TrainSettings(model="demo", data="stdlib", output=tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not continued(given).resume
    run = RunRecord(method="lora", seed=0, settings={}, status="failed")
    run.save(tmp_path)
    assert continued(given).resume
    again = continued(given.model_copy(update={"overwrite": True}))
    assert (again.resume, again.overwrite) == (True, False)


OF_TWO = """
import os, time
from rankwise.cli.train import LAUNCHER, end_with_launcher
os.environ[LAUNCHER] = str(os.getpid())
if not os.fork():
    end_with_launcher()
    print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's death")
def test_a_process_ends_with_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    environment, began = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, time.monotonic()
    with subprocess.Popen([sys.executable, "-c", OF_TWO], stdout=subprocess.PIPE, env=environment) as launcher:
        assert launcher.stdout is not None
        assert launcher.stdout.readline() == b"ready\n"
        launcher.kill()
        # The end of the file comes when the launched process, too, is gone.
        assert launcher.stdout.read() == b""
    assert time.monotonic() - began < 50
    # That of a process which was launched before.
    monkeypatch.setenv(LAUNCHER, "0")
    monkeypatch.setattr("rankwise.cli.train.end_with_parent", lambda: None)
    with pytest.raises(KeyboardInterrupt), terminable():
        end_with_launcher()

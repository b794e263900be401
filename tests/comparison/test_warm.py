"""Steps that are forked off a process with the libraries loaded: the same files, ends and locks as a new process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rankwise.comparison import processes, stages, warm

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="steps are forked on Linux alone")
REAL = warm.PRELOADED
STEP = """
import os, signal, sys, time

def main(arguments):
    what = arguments[0]
    try:
        print("to the log", file=sys.stderr, flush=True)
        print(what, os.environ.get("STEP_SAYS"), os.getcwd(), flush=True)
        if what == "fail":
            return 3
        if what == "raise":
            raise ValueError("a fault")
        if what in ("wait", "careless"):
            time.sleep(60)
    except KeyboardInterrupt:
        if what == "careless":
            raise
        return 130
    return 0
"""


@pytest.fixture(autouse=True)
def _light_step(tmp_path, monkeypatch):
    """A step that imports nothing; the server loads no more for it than what starts it."""
    (tmp_path / "light_step.py").write_text(STEP)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(warm, "PRELOADED", ("light_step", warm.__name__))
    monkeypatch.chdir(tmp_path)


def start(what: str, name: Path, **environment: str) -> processes.Worker:
    worker = processes.start("light_step", [what], name, environment)
    assert isinstance(worker.process, warm.Forked)
    return worker


def ended(worker: processes.Worker) -> int:
    deadline = time.monotonic() + 60
    while (code := worker.poll()) is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert code is not None, "still running"
    return code


def text(name: Path, ending: str) -> str:
    return stages.beside(name, ending).read_text()


@pytest.mark.parametrize(("what", "code"), [("end", 0), ("fail", 3), ("raise", 1)])
def test_it_leaves_what_a_process_leaves(what, code, tmp_path):
    name = tmp_path / "cells" / "lora.train"
    for _ in range(2):
        assert ended(start(what, name, STEP_SAYS="hello")) == code
    # stdout is of the last one, the log of all.
    assert text(name, ".out") == f"{what} hello {tmp_path}\n"
    assert text(name, ".log").count("to the log") == 2
    assert ("ValueError: a fault" in text(name, ".log")) == (what == "raise")


def test_it_holds_its_lock_and_can_be_asked_to_stop(tmp_path):
    name = tmp_path / "cells" / "lora.train"
    worker = start("wait", name)
    assert processes.is_locked(name)
    until(lambda: text(name, ".out") != "")
    with pytest.raises(subprocess.TimeoutExpired):
        worker.process.wait(0.01)
    worker.stop()
    assert worker.process.wait(60) == 130
    assert not processes.is_locked(name)
    # A second time there is nobody to ask.
    worker.stop()


def test_a_step_that_does_not_catch_ctrl_c_has_the_signal_as_its_code(tmp_path):
    """Measuring and preparing do not: with code 1 a comparison would hold them for failed."""
    name = tmp_path / "cells" / "lora.measure"
    worker = start("careless", name)
    until(lambda: text(name, ".out") != "")
    worker.stop()
    assert ended(worker) == -signal.SIGINT


def test_a_step_can_be_stopped_from_its_first_moment(tmp_path):
    """It has no handler of Ctrl-C yet, or the handler meets code that catches nothing."""
    for number in range(10):
        worker = start("wait", tmp_path / "cells" / f"lora.{number}")
        time.sleep(0.0005 * number)
        worker.stop()
        assert ended(worker) in (-signal.SIGINT, 130)


def test_a_file_that_cannot_be_opened_is_an_error_of_the_disk_and_no_failed_step(tmp_path):
    name = tmp_path / "cells" / "lora.train"
    stages.beside(name, ".out").mkdir(parents=True)
    with pytest.raises(IsADirectoryError, match=r"lora\.train\.out"):
        start("end", name)


def test_a_killed_step_has_the_signal_as_its_code(tmp_path):
    worker = start("wait", tmp_path / "cells" / "lora.train")
    worker.process.send_signal(signal.SIGKILL)
    assert ended(worker) == -signal.SIGKILL


def test_it_ends_with_the_process_that_asked_for_it(tmp_path):
    """Also where that is killed, and can tell nobody."""
    name = tmp_path / "cells" / "lora.train"
    code = (
        "import sys, time; from pathlib import Path; from rankwise.comparison import processes, warm\n"
        "warm.PRELOADED = ('light_step',)\n"
        f"processes.start('light_step', ['wait'], Path({str(name)!r}), {{}}); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    asking = subprocess.Popen([sys.executable, "-c", code], env=environment)
    try:
        until(lambda: stages.beside(name, ".out").is_file() and text(name, ".out") != "")
        assert processes.is_locked(name)
    finally:
        asking.kill()
        asking.wait()
    until(lambda: not processes.is_locked(name))


def until(is_so) -> None:
    deadline = time.monotonic() + 60
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_environment_is_that_of_now(tmp_path, monkeypatch):
    assert ended(start("end", tmp_path / "first")) == 0
    monkeypatch.setenv("STEP_SAYS", "later")
    assert ended(start("end", tmp_path / "second")) == 0
    assert text(tmp_path / "first", ".out").split()[1] == "None"
    assert text(tmp_path / "second", ".out").split()[1] == "later"


def test_with_a_card_steps_are_new_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(warm, "this_machine", lambda: type("Card", (), {"device_type": "cuda"})())
    assert not warm.takes("light_step")
    assert not warm.takes("no_such_module")


def test_what_is_loaded_beforehand_is_what_the_steps_are():
    assert {stages.CLI, stages.MEASURE, stages.PREPARE} <= set(REAL)

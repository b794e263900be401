"""Several processes of ``rankwise``, forked from one that has loaded torch: a launch takes no seconds for imports.

Run as a program it is that process. A line of its input asks for a launch, and it answers with the processes' numbers,
then with their exit codes. Like torch's launcher it holds the store that outlives them, sends SIGTERM to the rest once
one has failed, and kills what is still there ``GRACE_SECONDS`` later.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

# Seconds after which a launch hangs, on a machine that has other work too.
LONG = 500
# What a launcher sets for each process.
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
GRACE_SECONDS = 30


class Ended(NamedTuple):
    """What a launch left: exit codes by rank, below zero those of killed processes."""

    codes: list[int]
    stdout: str
    stderr: str
    seconds: float


class Launch:
    """A launch in progress."""

    def __init__(self, nursery: Nursery, pids: list[int], files: tuple[Path, Path]) -> None:
        self.nursery, self.pids, self.files = nursery, pids, files
        self.began = time.monotonic()

    def wait_for(self, folder: Path, pattern: str) -> None:
        """Until a file of this pattern exists; fails where the processes end before."""
        while not list(folder.glob(pattern)):
            # The file may have come since, and the processes be at their end.
            assert any(map(_lives, self.pids)) or list(folder.glob(pattern)), self.files[1].read_text()
            assert time.monotonic() < self.began + LONG
            time.sleep(0.01)

    def ended(self) -> Ended:
        codes = self.nursery.answer()
        stdout, stderr = (file.read_text() for file in self.files)
        return Ended(codes, stdout, stderr, time.monotonic() - self.began)


class Nursery:
    """The process that others are forked from."""

    def __init__(self, folder: Path, warming_up: list[Any]) -> None:
        """``warming_up``: a command that it carries out first, so that no process loads what that needs."""
        self.folder, self.count = folder, 0
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen([sys.executable, __file__, *map(str, warming_up)], env=environment, **pipes)

    def start(
        self, processes: int, arguments: list[Any], fault: str = "", grace_seconds: float = GRACE_SECONDS
    ) -> Launch:
        """``fault``: Python that each process runs before its command; it finds its ``rank``."""
        self.count += 1
        files = self.folder / f"{self.count}.out", self.folder / f"{self.count}.err"
        request = {
            "processes": processes,
            "arguments": list(map(str, arguments)),
            "fault": fault,
            "grace_seconds": grace_seconds,
            "files": list(map(str, files)),
        }
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return Launch(self, self.answer(), files)

    def run(self, processes: int, arguments: list[Any], fault: str = "") -> Ended:
        return self.start(processes, arguments, fault).ended()

    def answer(self) -> list[int]:
        assert self.process.stdout is not None
        alarm = threading.Timer(LONG, self.process.kill)
        alarm.start()
        line = self.process.stdout.readline()
        alarm.cancel()
        assert line, "the processes hang"
        return json.loads(line)


@contextmanager
def nursery(folder: Path, warming_up: list[Any]) -> Iterator[Nursery]:
    made = Nursery(folder, warming_up)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()


def _serve() -> None:
    """Answer requests until there are no more."""
    import torch.distributed as dist
    import torch.distributed.fsdp  # noqa: F401
    import torch.distributed.tensor  # noqa: F401

    from rankwise.cli.main import main

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    assert main(sys.argv[1:]) == 0
    gc.freeze()
    for line in sys.stdin:
        request = json.loads(line)
        listener = socket.create_server(("localhost", 0))
        port = listener.getsockname()[1]
        pids = [_fork(rank, port, request, main) for rank in range(request["processes"])]
        # Afterwards, so that no thread of the store's is there to be forked.
        store = dist.TCPStore(
            "localhost", port, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=LONG),
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(_wait(pids, request["grace_seconds"])), file=answers, flush=True)
        del store


def _fork(rank: int, port: int, request: dict[str, Any], main: Any) -> int:
    if (pid := os.fork()) > 0:
        return pid
    count = str(request["processes"])
    os.environ.update(
        RANK=str(rank), WORLD_SIZE=count, LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=count, MASTER_ADDR="localhost",
        MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True",
    )  # fmt: skip
    for number, file in enumerate(request["files"], start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    code = 1
    try:
        exec(request["fault"], {"rank": rank})
        code = main(request["arguments"])
    except BaseException:  # noqa: BLE001  the process ends here
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(pids: list[int], grace_seconds: float) -> list[int]:
    """The exit codes, by rank."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid > 0:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid] != 0 and deadline is None:
                deadline = time.monotonic() + grace_seconds
                _signal(set(pids) - set(codes), signal.SIGTERM)
        elif deadline is not None and time.monotonic() > deadline:
            _signal(set(pids) - set(codes), signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _signal(pids: set[int], number: int) -> None:
    for pid in pids:
        os.kill(pid, number)


if __name__ == "__main__":
    _serve()

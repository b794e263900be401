"""What Windows does differently, by the functions that Windows would call, where Python has them here."""

from __future__ import annotations

import ast
import errno
import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rankwise.comparison.pool import connect
from rankwise.compat import system
from rankwise.disk import hold, whole_file, whole_folder
from rankwise.errors import ConfigError, RunError
from rankwise.training.ranks import check_cards

Patch = pytest.MonkeyPatch
on_posix = pytest.mark.skipif(os.name == "nt", reason="stands in for Windows")


class FilesOfWindows:
    """An operating system on which no open file is renamed onto or removed, no folder is opened, and no file that was
    opened for reading is flushed. ``busy``: attempts for which a virus scanner has a file open."""

    def __init__(self, patch: Patch) -> None:
        self.busy, self.locked, self.paused = 0, set[int](), list[float]()
        self.real = {name: getattr(os, name) for name in ("open", "replace", "unlink", "close", "fsync")}
        for name in self.real:
            patch.setattr(os, name, getattr(self, name))
        patch.setattr(system, "WINDOWS", True)
        patch.setattr(system.time, "sleep", self.paused.append)
        patch.setitem(sys.modules, "msvcrt", SimpleNamespace(LK_NBLCK=2, locking=self.locking))
        # pathlib and safetensors call these by other ways.
        patch.setattr(Path, "unlink", lambda path, missing_ok=False: self.unlink(path))
        self.opened: dict[int, tuple[Path, int]] = {}

    def open(self, path: Any, flags: int, *rest: Any, **more: Any) -> int:
        # shutil.rmtree opens folders where it can (dir_fd), as it cannot on Windows.
        if "dir_fd" not in more and Path(path).is_dir():
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        handle = self.real["open"](path, flags, *rest, **more)
        self.opened[handle] = Path(path), flags
        return handle

    def close(self, handle: int) -> None:
        self.opened.pop(handle, None)
        self.locked.discard(handle)
        self.real["close"](handle)

    def unlink(self, path: Any) -> None:
        if Path(path) in [opened for opened, _ in self.opened.values()]:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        self.real["unlink"](path)

    def replace(self, source: Any, target: Any) -> None:
        if Path(target).is_dir() or self.busy > 0:
            self.busy -= 1
            raise PermissionError(errno.EACCES, "Access is denied", str(source), None, str(target))
        self.real["replace"](source, target)

    def fsync(self, handle: int) -> None:
        if handle in self.opened and not self.opened[handle][1] & os.O_RDWR:
            raise OSError(errno.EBADF, "Bad file descriptor")

    def locking(self, handle: int, how: int, count: int) -> None:
        assert (how, count) == (2, 1)
        file = os.fstat(handle)
        if any(os.path.samestat(file, os.fstat(other)) for other in self.locked):
            raise PermissionError(errno.EACCES, "Permission denied")
        self.locked.add(handle)


@pytest.fixture
def windows(monkeypatch: Patch) -> FilesOfWindows:
    return FilesOfWindows(monkeypatch)


@on_posix
def test_a_folder_is_held_once_and_its_lock_goes(windows: FilesOfWindows, tmp_path: Path) -> None:
    with hold(tmp_path / "out"), pytest.raises(RunError, match="RW582"), hold(tmp_path / "out"):
        pass
    assert not list(tmp_path.iterdir())
    with hold(tmp_path / "out"):
        pass


@on_posix
def test_files_and_folders_appear_whole(windows: FilesOfWindows, tmp_path: Path) -> None:
    for content in (b"one", b"two"):
        windows.busy = 2
        with whole_file(tmp_path / "file") as file:
            file.write(content)
        assert (tmp_path / "file").read_bytes() == content
    (tmp_path / "folder").mkdir()
    with whole_folder(tmp_path / "folder") as made:
        (made / "in it").write_text("x", encoding="utf-8")
    assert (tmp_path / "folder" / "in it").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]
    assert windows.paused == 2 * list(system.PAUSES[:2])


@on_posix
def test_what_stays_open_is_said(windows: FilesOfWindows, tmp_path: Path) -> None:
    windows.busy = 1000
    denied = pytest.raises(RunError, match=r"RW551.*folder: access is denied; make it writable")
    with denied, whole_folder(tmp_path / "folder"):
        pass
    assert windows.paused == list(system.PAUSES)
    assert not list(tmp_path.iterdir())


RESERVED = {
    "runs/aux": "aux",
    "CON.txt/first": "CON.txt",
    "runs/a:b": "a:b",
    "lpt1": "lpt1",
    "runs/end.": "end.",
    "what?": "what?",
    "runs/console": None,
    "../com10/first": None,
    "runs/lora-r16 (2)": None,
}


@pytest.mark.parametrize(("path", "part"), RESERVED.items())
def test_names_that_windows_keeps_to_itself(path: str, part: str | None, monkeypatch: Patch, tmp_path: Path) -> None:
    monkeypatch.setattr(system, "WINDOWS", False)
    assert system.reserved_name(Path(path)) is None
    monkeypatch.setattr(system, "WINDOWS", True)
    assert system.reserved_name(Path(path)) == part
    if part is not None:
        with pytest.raises(RunError, match="RW551: .*Windows has no files or folders named"), hold(Path(path)):
            pass


def test_a_drive_is_no_reserved_name(monkeypatch: Patch) -> None:
    from pathlib import PureWindowsPath

    monkeypatch.setattr(system, "WINDOWS", True)
    there: Any = PureWindowsPath(r"C:\Users\me\runs\first")
    assert system.reserved_name(there) is None
    assert system.reserved_name(there / "nul") == "nul"


def test_several_processes_and_ray_are_refused_in_a_sentence(monkeypatch: Patch) -> None:
    monkeypatch.setattr(system, "WINDOWS", True)
    check_cards("cpu", 1)
    with pytest.raises(ConfigError, match=r"RW139.*Windows; start one"):
        check_cards("cpu", 2)
    with pytest.raises(RunError, match=r"RW555.*Windows; leave it out"):
        connect(None, "cpu")


def test_a_child_stops_when_it_is_asked(monkeypatch: Patch) -> None:
    """Here by the signal of this system; on Windows by Ctrl-Break, which needs a process group."""
    asked = "import sys, time; print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", asked], stdout=subprocess.PIPE, **system.child_options())
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(system.ASK_TO_STOP)
    assert child.wait(30) != 0
    monkeypatch.setattr(system, "WINDOWS", True)
    # CREATE_NEW_PROCESS_GROUP, by Windows' documentation.
    assert system.child_options() == {"creationflags": 0x200}


@pytest.mark.parametrize("on_windows", [False, True])
def test_no_character_stops_a_message(on_windows: bool, monkeypatch: Patch) -> None:
    monkeypatch.setattr(system, "WINDOWS", on_windows)
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1252"))
    system.speak_utf8()
    print("loss 3 → 2 \udcff", flush=True)
    sys.stdout.detach()
    assert (
        written.getvalue()
        == ("loss 3 → 2 ".encode() if on_windows else rb"loss 3 \u2192 2 ") + rb"\udcff" + os.linesep.encode()
    )


def test_where_caches_lie(monkeypatch: Patch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("LOCALAPPDATA", "local")
    monkeypatch.setattr(system, "WINDOWS", True)
    assert system.cache_folder() == Path("local", "rankwise")
    monkeypatch.setattr(system.platform, "system", lambda: "Darwin")
    assert system.cache_folder() == Path.home() / "Library" / "Caches" / "rankwise"


def test_a_large_block_counts_as_memory_of_the_process() -> None:
    # In a process of its own: in this one, a run of another test may have left as much in the heap.
    code = (
        "from rankwise.compat.system import anonymous_memory_bytes as now\n"
        "before = now(); block = b'x' * 50_000_000; print(now() - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert int(found) == pytest.approx(50_000_000, rel=0.2)


def test_without_glibc_none_of_its_functions_is_called(monkeypatch: Patch) -> None:
    from rankwise.acceleration import memory

    monkeypatch.setattr(system.sys, "platform", "darwin")
    assert system.glibc() is None
    assert memory.keep_freed_memory.__wrapped__() is False
    memory.give_back_freed_memory()
    memory.share_one_heap()


def test_text_is_read_and_written_as_utf8() -> None:
    """ruff's PLW1514 sees only paths that are made in the same line."""
    root = Path(__file__).parents[2]
    calls = [
        (file, node)
        for folder in ("src", "article/src", "dev", "docs/_ext")
        for file in (root / folder).rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
    ]
    assert len(calls) > 1000
    assert [f"{file.name}:{call.lineno}" for file, call in calls if _opens_text(call)] == []


def _opens_text(call: ast.Call) -> bool:
    """Whether a call opens a text without an encoding, by its name and its arguments."""
    given = {word.arg for word in call.keywords}
    name = getattr(call.func, "attr", getattr(call.func, "id", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    # click's formatter writes help, not a file.
    if "encoding" in given or None in given or owner == "formatter":
        return False
    if name in ("read_text", "write_text"):
        return len(call.args) < (1 if name == "read_text" else 2)
    modes = [one.value for one in call.args if isinstance(one, ast.Constant) and isinstance(one.value, str)]
    if name in ("open", "fdopen") and owner != "os":
        return not any("b" in mode for mode in modes)
    return bool(given & {"text", "universal_newlines"}) and name in ("run", "Popen", "check_output")


WATCH = """
import ctypes, os, time, torch
from pathlib import Path
from rankwise.compat import system

openmp = ctypes.CDLL(str(next((Path(torch.__file__).parent / "lib").glob("libgomp*"))))
torch.ones(1 << 20).sum()
system.WATCH_SECONDS, system._seconds_of_others = 0.02, lambda cores: RATE * time.monotonic()
RATE, cores = 0.0, len(os.sched_getaffinity(0))
system.CPU_LIMIT = Path(LIMIT)

def threads(after):
    ended = time.monotonic() + 10
    while (now := len(os.listdir("/proc/self/task"))) != after and time.monotonic() < ended:
        time.sleep(0.01)
    return now

began = len(os.listdir("/proc/self/task"))
system.share_cores(openmp, lambda: cores)
for RATE, granted in ((0.0, "max"), (0.5, "max"), (0.0, "max"), (0.0, str(cores * 50_000))):
    system.CPU_LIMIT.write_text(f"{granted} 100000")
    # The watch, and beside others or with half of the time a thread with its team.
    print(threads(began + 1 + cores * (RATE > 0 or granted != "max")) - began)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux is watched")
@pytest.mark.parametrize(("environment", "beside"), [({}, True), ({"OMP_WAIT_POLICY": "active"}, False)])
def test_waiting_threads_sleep_beside_others_unless_the_user_says(
    environment: dict[str, str], *, beside: bool, monkeypatch: Patch, tmp_path: Path
) -> None:
    for name in system.WAIT_POLICIES:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    code = WATCH.replace("LIMIT)", f"{str(tmp_path / 'cpu.max')!r})").replace("+ 10", "+ 10" if beside else "+ 0.2")
    cores = len(os.sched_getaffinity(0))
    expected = [1, 1 + cores, 1, 1 + cores] if beside else [0, 0, 0, 0]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert [int(line) for line in done.stdout.split()] == expected

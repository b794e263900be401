"""One process at a time writes to a folder; files and folders appear whole; errors of the system have a code."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rankwise.disk import appending, coded_error, hold, read_speed, whole_file, whole_folder
from rankwise.errors import ConfigError, RankwiseWarning, RunError

HOLDER = """
import sys, time
from pathlib import Path
from rankwise.disk import hold
with hold(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@contextmanager
def held_elsewhere(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """By another process, until the end or until it is killed."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
        process.kill()


def test_a_folder_is_held_by_one_process_and_free_after_its_death(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there" / "yet"
    (tmp_path / "alias").symlink_to(tmp_path / "not", target_is_directory=True)
    with held_elsewhere(folder) as process:
        for name in (
            folder,
            tmp_path / "alias" / "there" / "yet",
            tmp_path / "not" / "." / "there" / ".." / "there" / "yet",
        ):
            with pytest.raises(RunError, match="RW582"), hold(name):
                pass
        with hold(folder.parent / "another"):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        with hold(folder):
            assert not folder.exists()
    assert list(folder.parent.iterdir()) == []


def test_nothing_is_left_where_nothing_was_made(tmp_path: Path) -> None:
    with hold(tmp_path / "a" / "b" / "out"):
        pass
    with hold(tmp_path / "kept" / "out"):
        (tmp_path / "kept" / "out").mkdir()
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["kept", "kept/out"]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    (tmp_path / ".other.rankwise-lock").symlink_to(tmp_path / "precious")
    with pytest.raises(RunError, match="RW551"), hold(tmp_path / "other"):
        pass
    assert (tmp_path / "precious").exists()


def test_without_a_writable_parent_the_folder_itself_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out").mkdir()
    real = os.open

    def refusing(path: Any, flags: int, *rest: Any) -> int:
        if flags & os.O_CREAT:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return real(path, flags, *rest)

    monkeypatch.setattr(os, "open", refusing)
    with hold(tmp_path / "out"), pytest.raises(RunError, match="RW582"), hold(tmp_path / "out"):
        pass
    with pytest.raises(RunError, match=r"RW551.*make it writable"), hold(tmp_path / "new"):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def none(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", none)
    with pytest.warns(RankwiseWarning, match="RW552"), hold(tmp_path / "out"):
        pass


ERRORS: dict[str, tuple[Exception, str]] = {
    "python": (OSError(errno.ENOSPC, "No space left on device", "/x/file"), "/x/file: no space left on device; free"),
    "ulimit": (OSError(errno.EFBIG, "File too large", "/x/file"), "/x/file: file too large; raise the limit"),
    "a copy": (OSError(errno.ENOSPC, "No space left", "/source", None, "/target"), "/target: no space left"),
    "tokenizers": (Exception("No space left on device (os error 28)"), "out: no space left on device; free space"),
    "safetensors": (RuntimeError("Error: I/O error: Input/output error (os error 5)"), "out: input/output error"),
    "copytree": (shutil.Error([("a", "b", "[Errno 122] Disk quota exceeded: 'b'")]), "out: disk quota exceeded"),
    "bytes": (OSError(errno.EROFS, "Read-only file system", b"/x"), "/x: read-only file system; make it writable"),
}


@pytest.mark.parametrize("kind", ERRORS)
def test_an_error_of_the_system_has_a_code_and_a_remedy(kind: str) -> None:
    error, start = ERRORS[kind]
    coded = coded_error(error, Path("out"), "and then this")
    assert coded is not None
    assert coded.code == "RW551"
    assert coded.message.startswith(start)
    assert coded.message.endswith("and then this.")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no number"),
        FileNotFoundError("Cannot find the requested files in the local cache"),
        OSError("a library's own"),
        BrokenPipeError(errno.EPIPE, "Broken pipe"),
        ConfigError("RW101", "(os error 28)"),
        RuntimeError("[Errno 111] Connection refused"),
        OSError("Connection refused (os error 111)"),
    ],
)
def test_other_errors_are_no_errors_of_the_system(error: Exception) -> None:
    assert coded_error(error, Path("out")) is None


def write_half(context: Any, error: OSError) -> None:
    with context as file:
        file.write(b"half")
        file.flush()
        raise error


@pytest.mark.parametrize("end", ["", "/weights"])
def test_an_error_in_a_temporary_folder_names_the_final_one(end: str, tmp_path: Path) -> None:
    def written() -> None:
        with whole_folder(tmp_path / "out") as folder:
            raise OSError(errno.ENOSPC, "No space left on device", f"{folder}{end}")

    with pytest.raises(RunError) as caught:
        written()
    assert caught.value.message.startswith(f"{tmp_path / 'out'}{end}: no space left on device;")


def test_a_file_is_whole_and_its_error_names_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")
    with pytest.raises(OSError, match="No space") as caught:
        write_half(whole_file(tmp_path / "file"), OSError(errno.ENOSPC, "No space left on device"))
    assert caught.value.filename == str(tmp_path / "file")
    with pytest.raises(OSError, match="cannot read") as caught:
        write_half(whole_file(tmp_path / "file"), OSError(errno.EIO, "cannot read", "/the/source"))
    assert caught.value.filename == "/the/source"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"file": "old"}


def test_what_could_not_be_appended_whole_goes_again(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("first\n")
    with pytest.raises(OSError, match="No space"):
        write_half(appending(tmp_path / "lines"), OSError(errno.ENOSPC, "No space left on device"))
    assert (tmp_path / "lines").read_text() == "first\n"


@pytest.mark.parametrize("replace", [False, True])
def test_a_folder_that_fails_leaves_what_was_there(
    replace: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RunError, match=r"out/new: no space"), whole_folder(tmp_path / "out", replace=replace) as folder:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "new"))
    monkeypatch.setattr(Path, "mkdir", lambda *_, **__: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space")))
    with pytest.raises(RunError, match="RW551"), whole_folder(tmp_path / "out", replace=replace):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]


def test_a_folder_replaces_another_only_when_asked(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    with pytest.raises(RunError, match=r"RW551.*not empty"), whole_folder(tmp_path / "out") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "old"]
    with whole_folder(tmp_path / "out", replace=True) as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_nothing_is_appended_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RunError, match="RW554"), appending(tmp_path / "metrics.jsonl"):
        pass
    assert not (tmp_path / "elsewhere").exists()


def test_what_a_killed_process_left_of_a_file_goes_with_the_next_writing(tmp_path: Path) -> None:
    """Not that of a file that nobody holds, whose other writer may be alive."""
    run = tmp_path / "run"
    run.mkdir()
    left = {run / ".file.0123abcd", run / ".other.0123abcd"}
    for path in left:
        path.touch()

    def names_after_writing() -> set[str]:
        with whole_file(run / "file") as file:
            file.write(b"new")
        return {path.name for path in run.iterdir()}

    assert names_after_writing() == {"file", ".file.0123abcd", ".other.0123abcd"}
    with hold(run):
        assert names_after_writing() == {"file", ".other.0123abcd"}


def test_a_disk_is_timed_past_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "small").write_bytes(b"0")
    large = tmp_path / "large"
    large.write_bytes(bytes(1 << 16))
    own, opened = os.open, []

    def refuse(*given: Any) -> int:
        opened.append(given)
        raise OSError(errno.EINVAL, "no O_DIRECT here")

    assert read_speed([]) is None
    assert (read_speed([tmp_path / "small", large]) or 1) > 0
    monkeypatch.setattr(os, "open", refuse)
    assert read_speed([tmp_path / "small", large]) is None
    monkeypatch.setattr(os, "open", own)
    assert opened == [(large, os.O_RDONLY | os.O_DIRECT)]

"""Write files and folders so that a kill, a full disk or a second process leaves nothing half-written.

Files and folders appear whole or not at all. One process at a time writes to a folder. Symbolic links are never
followed. An error of the operating system names the file and what to do. Imports no torch.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from rankwise.compat import system
from rankwise.compat.system import flush
from rankwise.errors import RankwiseError, RunError, warn

# The suffix of unfinished files and folders, made by secrets.token_hex(4), as a regular expression.
TOKEN = "[0-9a-f]{8}"
REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free space there"),
    errno.EFBIG: "raise the limit of a file's size (ulimit -f)",
    **dict.fromkeys((errno.EMFILE, errno.ENFILE), "raise the limit of open files (ulimit -n)"),
    **dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "make it writable"),
    errno.ENOTEMPTY: "move its contents away",
}
# What this process holds.
_held: set[Path] = set()
CANNOT_LOCK = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}


class InUse(RunError):
    """Another process writes to the folder (RW582)."""


def read_speed(files: Iterable[Path]) -> float | None:
    """Bytes a second at which the disk reads the largest of ``files``, past the system's cache, for a quarter of a
    second; None if there is no file or the system cannot read so (O_DIRECT)."""
    try:
        largest = max(files, key=lambda file: file.stat().st_size)
        handle = os.open(largest, os.O_RDONLY | os.O_DIRECT)
    except (AttributeError, OSError, ValueError):
        return None
    # O_DIRECT needs whole pages.
    page, read, start = mmap.mmap(-1, 1 << 23), 0, time.monotonic()
    with open(handle, "rb", buffering=0) as file:
        while (seconds := time.monotonic() - start) < 0.25:
            read += file.readinto(page) or file.seek(0)
    return read / seconds


def system_error(error: BaseException) -> OSError | None:
    """The OSError behind ``error``, or None.

    Libraries written in Rust (tokenizers, safetensors) and ``shutil.copytree`` raise exceptions of their own, which
    hold the operating system's error as text only. Of these, errors of a disk and of handles count, not of networks.
    """
    if isinstance(error, RankwiseError | ConnectionError):
        return None
    if isinstance(error, OSError) and error.errno is not None:
        return error if error.errno > 0 else None
    found = re.search(r"(?:\(os error |\[Errno )(\d+)", str(error))
    number = int(found[1]) if found else 0
    return OSError(number, os.strerror(number)) if number in (*REMEDIES, errno.EIO) else None


def coded_error(
    error: BaseException, place: Path | None = None, then: str = "or use another folder"
) -> RunError | None:
    """RW551 for an error of the operating system, None for any other.

    ``place`` is named where the error names no file; ``then`` ends the sentence with how to continue.
    """
    found = system_error(error)
    if found is None:
        return None
    # In an error of a copy, the first file name is the source and the second the target.
    named = found.filename2 or found.filename or place or "a file or the standard output"
    remedy = REMEDIES.get(found.errno or 0, "check the disk and the path")
    final = _text(named)
    # A temporary folder, of which an export has one in another, is gone by now.
    for _ in range(2):
        final = re.sub(rf"/\.([^/]+)\.partial-{TOKEN}(?=/|$)", r"/\1", final)
    return RunError("RW551", f"{final}: {(found.strerror or 'it cannot be used').lower()}; {remedy}, {then}.")


def _text(name: object) -> str:
    return os.fsdecode(name) if isinstance(name, bytes) else str(name)


@contextlib.contextmanager
def coded_errors(place: Path, then: str) -> Iterator[None]:
    """Raise errors of the operating system as RunError (RW551); arguments as in ``coded_error``."""
    try:
        yield
    except Exception as error:
        coded = coded_error(error, place, then)
        if coded is None:
            raise
        raise coded from error


@contextlib.contextmanager
def hold(folder: Path) -> Iterator[None]:
    """Let no other process write to ``folder``, which need not exist. Raises InUse (RW582) if one does.

    The lock is an empty file beside the folder, so that the folder holds only results; where the parent cannot be
    written, as above a mounted folder, it is the folder itself. The operating system releases the lock when the process
    dies. Warns RW552 where the file system has no locks.
    """
    if part := system.reserved_name(folder):
        raise RunError("RW551", f"{folder}: Windows has no files or folders named {part!r}; give a different name.")
    place = Path(os.path.realpath(folder))
    file = place.with_name(f".{place.name}.rankwise-lock")
    made = [parent for parent in place.parents if not parent.exists()]
    try:
        with coded_errors(place, "or use another folder"):
            place.parent.mkdir(parents=True, exist_ok=True)
            handle = _locked(file, place)
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)
            system.unlock(handle, file)
    finally:
        for parent in made:
            # A folder that has content by now stays.
            with contextlib.suppress(OSError):
                parent.rmdir()


def _locked(file: Path, place: Path) -> int:
    """A descriptor that holds the lock ``file``, or ``place`` itself."""
    try:
        handle = os.open(file, os.O_RDWR | os.O_CREAT | system.NO_FOLLOW, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not place.is_dir():
            raise
        handle, file = os.open(place, os.O_RDONLY), place
    try:
        system.lock(handle)
        # The process that held the lock may have removed its file meanwhile.
        if os.path.samestat(os.fstat(handle), file.stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError as error:
        if error.errno not in CANNOT_LOCK:
            raise
        why = f"{place} cannot be locked ({(error.strerror or 'no reason given').lower()})"
        warn("RW552", f"{why}; start no second rankwise process on this folder until this one ends.")
        return handle
    os.close(handle)
    raise InUse("RW582", f"another rankwise process is writing to {place}; wait until it ends, or give another folder.")


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file beside ``path`` that is flushed to disk and renamed to ``path`` at the end.

    Readers see the old or the new content. After an error the temporary file is removed. If this process holds
    ``path`` or a folder around it, what killed processes left of the same file is removed, too.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        with naming(path):
            if _is_held(path):
                remove_strays(path.parent, [path.name])
            with temporary.open("xb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            system.rename(temporary, path)
            flush(path.parent)
    except BaseException:
        # Already renamed where a signal came right after; the first error is the one to raise.
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def _is_held(path: Path) -> bool:
    place = Path(os.path.realpath(path))
    return not _held.isdisjoint((place, *place.parents))


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make OSErrors name ``path`` where they name no file (as those of a write) or its temporary file."""
    try:
        yield
    except OSError as error:
        # An OSError without errno holds its reason in its text, which a file name would hide.
        if error.errno is not None and (error.filename is None or path.name in os.path.basename(_text(error.filename))):
            error.filename, error.filename2 = str(path), None
        raise


@contextlib.contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """``path``, open for appending. If a write fails, the file is cut to its earlier length.

    Raises RunError (RW554) for a link.
    """
    refuse_links(path.parent, [path.name])
    with naming(path), path.open("ab") as file:
        size = file.tell()
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                os.truncate(path, size)
            raise


def remove_strays(folder: Path, names: Iterable[str]) -> None:
    """Remove the temporary files that killed processes left for ``names`` in ``folder``, which the caller holds."""
    for path in strays(folder, names):
        path.unlink(missing_ok=True)


def strays(folder: Path, names: Iterable[str]) -> list[Path]:
    """The temporary files of ``whole_file`` for ``names``, recognised by their full names."""
    known = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.{TOKEN}")
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if known.fullmatch(path.name) and path.is_file() and not path.is_symlink()]


@contextlib.contextmanager
def whole_folder(output: Path, *, replace: bool = False) -> Iterator[Path]:
    """A temporary folder that is flushed to disk and renamed to ``output`` at the end. ``output`` is locked meanwhile.

    After an error the temporary folder is removed. ``output`` may be an empty folder, or any folder with ``replace``.
    Raises RunError (RW551) if it cannot be written, and what ``hold`` raises.
    """
    output = Path(os.path.realpath(output))
    partial, is_in_place = _partial(output), False
    with coded_errors(output, "or use another folder; nothing was left there"):
        _remove_partials(output)
        try:
            partial.mkdir()
            yield partial
            follow_umask(partial)
            flush_tree(partial)
            if replace:
                discard_folder(output)
            system.rename(partial, output)
            is_in_place = True
            flush(output.parent)
        except BaseException:
            if is_in_place:
                discard_folder(output)
            remove_tree(partial)
            raise


def remove_tree(folder: Path) -> None:
    """Remove a temporary folder as far as the disk permits. What failed once is tried again."""
    for _ in range(2):
        shutil.rmtree(folder, ignore_errors=True)


def discard_folder(folder: Path) -> None:
    """Remove a folder so that a kill in between leaves no half of it under its name. A link is not a folder."""
    if not folder.is_dir() or folder.is_symlink():
        return
    doomed = _partial(folder)
    system.rename(folder, doomed)
    remove_tree(doomed)


def _partial(output: Path) -> Path:
    return output.with_name(f".{output.name}.partial-{secrets.token_hex(4)}")


def _remove_partials(output: Path) -> None:
    """Remove the temporary folders that killed processes left beside ``output``, recognised by their full names."""
    # An export whose proof comes before its name has a folder within one.
    known = re.compile(rf"\.+{re.escape(output.name)}(\.partial-{TOKEN})+")
    for path in list(output.parent.iterdir()):
        if known.fullmatch(path.name) and not path.is_symlink():
            remove_tree(path)


def refuse_links(folder: Path, names: Iterable[str]) -> None:
    """Raise RunError (RW554) if one of ``names`` in ``folder`` is a link: its content would lie elsewhere."""
    links = [name for name in names if (folder / name).is_symlink()]
    if links:
        raise RunError(
            "RW554",
            f"{folder} holds links in the place of its own folders or files ({', '.join(links)}), and rankwise follows "
            "no links; replace each by what it points to, or give a different --output.",
        )


def follow_umask(path: Path) -> None:
    """Give a file, or a folder and its contents, the modes that ``open`` and ``mkdir`` would give.

    mkdtemp and safetensors give access only to the owner, and another user often serves the model.
    """
    # The mask can only be read by setting it. Files that other threads create meanwhile are private, never open.
    mask = os.umask(0o077)
    os.umask(mask)
    for item in (path, *(path.rglob("*") if path.is_dir() else ())):
        os.chmod(item, (0o777 if item.is_dir() else 0o666) & ~mask)


def flush_tree(folder: Path) -> None:
    """Flush every file and folder in ``folder``, and ``folder`` itself, to disk."""
    for path in sorted(folder.rglob("*"), reverse=True):
        flush(path)
    flush(folder)

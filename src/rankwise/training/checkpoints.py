"""Checkpoints that exist whole or not at all.

A checkpoint is written to ``checkpoints/.tmp-step-N-*``; every file and the folder are flushed to disk; the folder is
renamed to ``checkpoints/step-N``; its parent is flushed; then older checkpoints are removed. Whenever the process
stops, the newest ``step-N`` is complete. ``manifest.json`` lists each file with its size and sha256, so that later
damage is found and named. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import errno
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from rankwise.disk import flush, flush_tree, follow_umask, remove_tree, system_error
from rankwise.errors import RunError
from rankwise.foreign import read_json
from rankwise.records import write_json
from rankwise.reports.numbers import byte_size
from rankwise.weights_file import pickles_in, sha256_of

FOLDER = "checkpoints"
MANIFEST = "manifest.json"
TEMPORARY = ".tmp-"
# Extra space for JSON files, logs and the file system's metadata.
SPARE_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True, order=True)
class Checkpoint:
    """A finished checkpoint: its optimizer step and its folder."""

    step: int
    path: Path


def save_checkpoint(run_folder: Path, step: int, write: Callable[[Path], None], size_bytes: int = 0) -> Checkpoint:
    """Let ``write(folder)`` fill a temporary folder, and rename it to ``checkpoints/step-N`` once all of it is on disk.

    ``size_bytes``: the expected size, for which the free space is checked first. A failed attempt leaves nothing.
    Raises RunError: RW513 where the disk is full, RW514 where the folder cannot be written.
    """
    with temporary_folder(run_folder, f"step-{step}", size_bytes) as temporary:
        write(temporary)
        _write_manifest(temporary, step)
        follow_umask(temporary)
        flush_tree(temporary)
        return _put_in_place(temporary, run_folder / FOLDER / f"step-{step}", step)


@contextmanager
def temporary_folder(run_folder: Path, name: str, size_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside the checkpoints, whose files the caller moves to their places once all are complete.

    Files left in the folder are removed at the end. Raises RunError: RW513 where the disk is full, RW514 where the
    folder cannot be written.
    """
    parent = run_folder / FOLDER
    with _named_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        check_space(parent, size_bytes)
        temporary = Path(tempfile.mkdtemp(dir=parent, prefix=f"{TEMPORARY}{name}-"))
        try:
            yield temporary
        finally:
            remove_tree(temporary)


def list_checkpoints(run_folder: Path) -> list[Checkpoint]:
    """The finished checkpoints, oldest first. Their content is not read."""
    found = []
    for path in (run_folder / FOLDER).glob("step-*"):
        match = re.fullmatch(r"step-(\d+)", path.name)
        if match and path.is_dir() and not path.is_symlink():
            found.append(Checkpoint(int(match[1]), path))
    return sorted(found)


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Compare every file with the manifest.

    Raises RunError: RW512 for pickles, RW515 with every file that is missing, has a different size or has changed.
    """
    check_no_pickles(checkpoint.path)
    problems = list(_damage(checkpoint))
    if problems:
        raise RunError("RW515", f"the checkpoint {checkpoint.path} is damaged: {'; '.join(problems)}.")


def check_no_pickles(folder: Path) -> None:
    """Raise RunError (RW512) where a checkpoint folder holds pickles, as transformers' Trainer writes them."""
    found = [path.name for path in pickles_in(folder)] if folder.is_dir() else []
    if found:
        raise RunError(
            "RW512",
            f"{folder} holds pickles ({', '.join(found)}), which can run code when opened and are never loaded; "
            "resume from a checkpoint that rankwise wrote, or start anew in another folder.",
        )


def newest_valid(run_folder: Path, on_damage: Callable[[RunError], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint; None where there is no checkpoint.

    ``on_damage`` is called with the error of each newer, damaged one. Raises RunError: RW516 where every checkpoint is
    damaged, RW512 for a checkpoint with pickles.
    """
    checkpoints = list_checkpoints(run_folder)
    for checkpoint in reversed(checkpoints):
        try:
            check_checkpoint(checkpoint)
            return checkpoint
        except RunError as error:
            if error.code != "RW515":
                raise
            on_damage(error)
    if checkpoints:
        raise RunError(
            "RW516",
            f"every checkpoint in {run_folder / FOLDER} is damaged; start anew with --overwrite, or in another folder.",
        )
    return None


def remove_old(run_folder: Path, keep: int, step: int, best_step: int | None = None) -> list[int]:
    """Remove all checkpoints except the newest ``keep`` up to ``step`` and the best one. Returns the removed steps.

    Later checkpoints than that of ``step``, just written, were damaged when the run was resumed from an earlier one.
    """
    checkpoints = list_checkpoints(run_folder)
    there = [item for item in checkpoints if item.step <= step]
    kept = {best_step, *(item.step for item in there[-keep:])}
    removed = [item for item in checkpoints if item.step not in kept]
    for checkpoint in removed:
        _discard(checkpoint.path)
    return [checkpoint.step for checkpoint in removed]


def remove_unfinished(run_folder: Path) -> None:
    """Remove files that killed processes left in the checkpoint folder."""
    for path in (run_folder / FOLDER).glob(f"{TEMPORARY}*"):
        if _is_temporary(path):
            remove_tree(path)


def foreign_items(run_folder: Path) -> list[str]:
    """The names in the checkpoint folder that no run wrote: all except unfinished checkpoints and ``step-N`` folders
    whose manifest names each of their files.
    """
    folder = run_folder / FOLDER
    if not folder.is_dir():
        return [""] if folder.exists() else []
    return [path.name for path in sorted(folder.iterdir()) if not (_is_temporary(path) or _is_own(path))]


def remove_checkpoints(run_folder: Path) -> None:
    """Remove every checkpoint, finished or not. Other files stay, and so does the folder."""
    remove_unfinished(run_folder)
    for checkpoint in list_checkpoints(run_folder):
        if _is_own(checkpoint.path):
            _discard(checkpoint.path)


def check_space(folder: Path, size_bytes: int) -> None:
    """Raise RunError (RW513) where the disk of ``folder``, which need not exist, lacks ``size_bytes`` of free space."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size_bytes + SPARE_BYTES:
        raise RunError(
            "RW513",
            f"{folder} has {byte_size(free)} free and {byte_size(size_bytes + SPARE_BYTES)} are needed for "
            "checkpoints; free some space, lower --save-total-limit, or give an --output on another disk.",
        )


@contextmanager
def _named_errors(folder: Path) -> Iterator[None]:
    """Raise errors of the operating system as RunError: RW513 for a full disk, RW514 for others."""
    try:
        yield
    except Exception as error:
        # tokenizers and safetensors report a full disk with exceptions of their own.
        found = system_error(error)
        if found is None and not isinstance(error, OSError | SafetensorError):
            raise
        full = found is not None and found.errno in (errno.ENOSPC, errno.EDQUOT)
        code, advice = ("RW513", "free some space") if full else ("RW514", "check the disk and its permissions")
        raise RunError(
            code,
            f"cannot write the weights in {folder}: {(found and found.strerror) or error}; {advice}, and continue with "
            "--resume from an earlier checkpoint.",
        ) from error


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"step": step, "files": files})


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """{file: (bytes, sha256)} of the manifest; None where it is missing or invalid."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        # The names come from a file: they must not lead out of the folder, nor hold a NUL, which no path can.
        odd = ("\0" in name or Path(name).is_absolute() or ".." in Path(name).parts for name in files)
        return None if any(odd) else files
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _is_temporary(path: Path) -> bool:
    known = re.fullmatch(rf"{re.escape(TEMPORARY)}((old-)?step-\d+|final)-\w+", path.name)
    return known is not None and path.is_dir() and not path.is_symlink()


def _is_own(path: Path) -> bool:
    if not re.fullmatch(r"step-\d+", path.name) or path.is_symlink() or not path.is_dir():
        return False
    files = _read_manifest(path)
    found = {item.relative_to(path).as_posix() for item in path.rglob("*") if item.is_symlink() or not item.is_dir()}
    return files is not None and found <= {*files, MANIFEST}


def _damage(checkpoint: Checkpoint) -> Iterator[str]:
    files = _read_manifest(checkpoint.path)
    if files is None:
        yield f"its {MANIFEST} is missing or cannot be read"
        return
    for name, (size, digest) in files.items():
        path = checkpoint.path / name
        if not path.is_file():
            yield f"{name} is missing"
        elif path.stat().st_size != size:
            yield f"{name} has {path.stat().st_size} bytes and should have {size}"
        elif sha256_of(path) != digest:
            yield f"{name} has changed since it was written"


def _put_in_place(temporary: Path, target: Path, step: int) -> Checkpoint:
    if os.path.lexists(target):
        # After a resume from an earlier checkpoint, the step is written again and replaces the old one.
        _discard(target)
    os.rename(temporary, target)
    flush(target.parent)
    return Checkpoint(step, target)


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves no partial one under its name; of a link, remove the link only."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.parent / f"{TEMPORARY}old-{path.name}-{os.getpid()}"
    os.rename(path, doomed)
    remove_tree(doomed)

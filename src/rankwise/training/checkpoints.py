"""A run's folder: checkpoints that exist whole or not at all, and checks before a run.

A checkpoint is written to ``checkpoints/.tmp-step-N-*``; every file and the folder are flushed to disk; the folder is
renamed to ``checkpoints/step-N``; its parent is flushed; then older checkpoints are removed. Whenever the process
stops, the newest ``step-N`` is complete. ``manifest.json`` lists each file with its size and sha256, so that later
damage is found and named.

Before a run: whether the folder may be written, whether a resumed run has the same settings, and what ``--overwrite``
removes: the files of the old run, by name, and no others.

Imports no torch, since the command line calls these checks before it loads torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from rankwise.compat.system import flush, rename
from rankwise.disk import flush_tree, follow_umask, refuse_links, remove_tree, strays
from rankwise.errors import ConfigError, RunError, some_of
from rankwise.foreign import Fields, read_json, sha256_of
from rankwise.options import flag
from rankwise.records import METRICS_FILE, RUN_FILE, SKIPPED_FILE, RunRecord, check_writable, load_record, write_json
from rankwise.reports.numbers import byte_size

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

    ``size_bytes``: the expected size, for which free space is needed (RW513). A failed attempt leaves nothing.
    """
    target = run_folder / FOLDER / f"step-{step}"
    with temporary_folder(run_folder, target.name, size_bytes) as temporary:
        write(temporary)
        _write_manifest(temporary, step)
        follow_umask(temporary)
        flush_tree(temporary)
        if os.path.lexists(target):
            # After a resume from an earlier checkpoint, the step is written again and replaces the old one.
            _discard(target)
        rename(temporary, target)
        flush(target.parent)
    return Checkpoint(step, target)


@contextmanager
def temporary_folder(run_folder: Path, name: str, size_bytes: int = 0) -> Iterator[Path]:
    """A temporary folder beside the checkpoints, whose files the caller moves to their places once all are complete.

    Files left in the folder are removed at the end. Raises RunError (RW513) as ``check_space``.
    """
    parent = run_folder / FOLDER
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
    """Compare every file with the manifest. Raises RunError (RW515) with every file that is missing or has changed."""
    problems = list(_damage(checkpoint))
    if problems:
        raise RunError("RW515", f"the checkpoint {checkpoint.path} is damaged: {'; '.join(problems)}.")


def newest_valid(run_folder: Path, on_damage: Callable[[RunError], None]) -> Checkpoint | None:
    """The newest undamaged checkpoint; None if there is no checkpoint.

    ``on_damage`` is called with the error of each newer, damaged one. Raises RunError (RW516) if every checkpoint is
    damaged.
    """
    checkpoints = list_checkpoints(run_folder)
    for checkpoint in reversed(checkpoints):
        try:
            check_checkpoint(checkpoint)
            return checkpoint
        except RunError as error:
            on_damage(error)
    if checkpoints:
        raise RunError(
            "RW516",
            f"every checkpoint in {run_folder / FOLDER} is damaged; start anew with --overwrite.",
        )
    return None


def remove_old(run_folder: Path, keep: int, step: int, best_step: int | None = None) -> None:
    """Remove all checkpoints except the newest ``keep`` up to ``step``, the best one, and those with foreign files.

    Later checkpoints than that of ``step``, just written, were damaged when the run was resumed from an earlier one.
    """
    checkpoints = list_checkpoints(run_folder)
    there = [item.step for item in checkpoints if item.step <= step]
    for checkpoint in checkpoints:
        if checkpoint.step not in (best_step, *there[-keep:]) and not foreign_files(checkpoint.path):
            _discard(checkpoint.path)


def foreign_files(folder: Path) -> list[Path]:
    """The files in a checkpoint's folder that its manifest does not name. A damaged manifest counts as naming all."""
    names = _read_manifest(folder)
    if names is None and (folder / MANIFEST).exists():
        return []
    own = {MANIFEST, *(names or ())}
    files = [path for path in sorted(folder.rglob("*")) if path.is_symlink() or not path.is_dir()]
    return [path for path in files if path.relative_to(folder).as_posix() not in own]


def remove_unfinished(run_folder: Path) -> None:
    """Remove files that killed processes left in the checkpoint folder."""
    for path in (run_folder / FOLDER).glob(f"{TEMPORARY}*"):
        remove_tree(path)


def check_space(folder: Path, size_bytes: int) -> None:
    """Raise RunError (RW513) if the disk of ``folder``, which need not exist, lacks ``size_bytes`` of free space."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < size_bytes + SPARE_BYTES:
        raise RunError(
            "RW513",
            f"{folder} has {byte_size(free)} free and {byte_size(size_bytes + SPARE_BYTES)} are needed for "
            "checkpoints; free some space, lower --save-total-limit, or give an --output on a different disk.",
        )


def _write_manifest(folder: Path, step: int) -> None:
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    write_json(folder / MANIFEST, {"step": step, "files": files})


def _read_manifest(folder: Path) -> dict[str, tuple[int, str]] | None:
    """{file: (bytes, sha256)}; None if the manifest is missing, cannot be read or names a file elsewhere."""
    try:
        manifest = read_json(folder / MANIFEST)
        files = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return None if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files) else files


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


def _discard(path: Path) -> None:
    """Remove a checkpoint so that a kill leaves no partial one under its name; of a link, remove the link only."""
    if path.is_symlink():
        path.unlink()
        return
    doomed = path.parent / f"{TEMPORARY}old-{path.name}-{os.getpid()}"
    rename(path, doomed)
    remove_tree(doomed)


# --- the run's folder ---


Mode = Literal["new", "resume", "overwrite"]

# Settings that do not change what is learned, so that a resumed run may change them.
MAY_CHANGE = {
    "cache",
    "mmap",
    "output",
    "resume",
    "overwrite",
    "device",
    # check_same_processes compares the number of processes, which torchrun may have set.
    "devices",
    "ignore_plan",
    "logging_steps",
    "save_steps",
    "save_total_limit",
    "eval_steps",
    "retain_margin",
    "early_stopping",
    "report_to",
    "trust_remote_code",
}
# Settings whose content is compared by hash once it has been read, since a path can be written in several ways.
COMPARED_BY_CONTENT = {"model", "revision", "data", "eval_data", "retain", "chat_template"}
# Settings that are compared as a number of steps, once the data have been read.
LENGTH = ("max_steps", "epochs")
# Schedules whose learning rate does not depend on the number of steps.
LENGTH_FREE = ("constant", "constant_with_warmup", "inverse_sqrt")
# Files of every run. The record names those that depend on the model and its tokenizer.
OWN_FILES = (
    *(METRICS_FILE, SKIPPED_FILE, "loss.svg", "README.md"),
    *("adapter_config.json", "adapter_model.safetensors", "reference.safetensors"),
)
# The status of a run that --overwrite has begun to remove.
REPLACED = "replaced"
# TensorBoard's files.
EVENTS = "tensorboard/events.out.tfevents.*"


def check_output(output: Path, *, resume: bool, overwrite: bool) -> Mode:
    """Check whether a run may use this folder, and return how. Nothing is written.

    Raises ConfigError RW112 for both options at once; RunError: RW502 for a folder with a run, RW503 for a folder that
    cannot be written, RW504 for other files without a run or among its checkpoints, RW505 for nothing to resume, RW554
    for a link in the place of the checkpoint folder.
    """
    if resume and overwrite:
        raise ConfigError("RW112", "--resume continues the old run and --overwrite replaces it; give one of them.")
    check_writable(output)
    refuse_links(output, [FOLDER])
    there = holds_run(output)
    # The temporary record that a killed process left does not count.
    left = {path.name for path in strays(output, [RUN_FILE])}
    if not there and output.is_dir() and any(path.name not in left for path in output.iterdir()):
        unreadable = f", and its {RUN_FILE} is not a record of one" if (output / RUN_FILE).exists() else ""
        raise RunError(
            "RW504", f"{output} holds files that no rankwise run wrote{unreadable}; give a new or empty --output."
        )
    if resume:
        if not there:
            raise RunError("RW505", f"{output} holds no run to resume; leave --resume out to start one.")
        if load_record(output).status == REPLACED:
            raise RunError("RW505", f"the run in {output} was being replaced; start again with --overwrite.")
        _refuse_foreign_files(output)
        return "resume"
    if there and not overwrite:
        raise RunError(
            "RW502",
            f"{output} already holds a run; continue it with --resume, replace it with --overwrite, or give "
            "a different --output.",
        )
    _refuse_foreign_files(output)
    return "overwrite" if there else "new"


def _refuse_foreign_files(output: Path) -> None:
    found = [path for checkpoint in list_checkpoints(output) for path in foreign_files(checkpoint.path)]
    if found:
        names = some_of([path.relative_to(output).as_posix() for path in found])
        raise RunError(
            "RW504",
            f"{output} holds files that no rankwise run wrote among its checkpoints, which a run removes: {names}; "
            "move them away, or give a different --output.",
        )


def holds_run(output: Path) -> bool:
    """Whether the folder has the record of a run. A ``checkpoints`` folder may belong to a different program."""
    return read_old_run(output) is not None


def check_same_run(output: Path, settings: Fields) -> None:
    """Raise RunError (RW507) with every setting, but the length, in which a resumed run differs from the run in
    ``output``."""
    before = load_record(output).settings
    changed = []
    for name, value in settings.items():
        was, differs = before.get(name), before.get(name) != value
        if name in COMPARED_BY_CONTENT:
            # By content later; here, only whether a file is given.
            differs = name != "revision" and (was is None) != (value is None)
        if differs and name not in MAY_CHANGE and name not in LENGTH:
            changed.append(f"{flag(name)} was {_given(was)} and is {_given(value)}")
    if changed:
        raise RunError(
            "RW507",
            f"the run in {output} was started with other settings: {'; '.join(changed)}; resume with the same "
            "settings, or start a new run in a different folder.",
        )


def check_same_processes(output: Path, processes: int) -> None:
    """Raise RunError (RW703) if the number of processes differs from that of the run in ``output``."""
    before = load_record(output).devices
    if before != processes:
        raise RunError(
            "RW703",
            f"the run in {output} was trained in {before} process{'' if before == 1 else 'es'} and {processes} would "
            "continue it; each process has its own random states and its part of each batch, so start the same number, "
            "with --devices or torchrun.",
        )


def _given(value: object) -> str:
    return "not given" if value is None else repr(value)


def check_same_inputs(output: Path, data: Mapping[str, Fields], base_model: Fields) -> None:
    """Raise RunError (RW508) with every input whose content differs from that of the run in ``output``.

    ``data`` and ``base_model`` are as in the record, and are compared by their sha256.
    """
    before = load_record(output)
    pairs = {
        "--data": (before.data.get("train", {}), data["train"], "sha256"),
        "--chat-template": (before.data.get("train", {}), data["train"], "chat_template_sha256"),
        "--reward": (before.data.get("train", {}), data["train"], "rewards_sha256"),
        "--adapter": (before.data.get("train", {}), data["train"], "adapter_sha256"),
        "--new-tokens": (before.data.get("train", {}), data["train"], "new_tokens_sha256"),
        "--eval-data": (before.data.get("eval", {}), data.get("eval", {}), "sha256"),
        "--model": (before.base_model, base_model, "sha256"),
    }
    changed = [name for name, (old, new, key) in pairs.items() if old.get(key) not in (None, new.get(key))]
    if changed:
        raise RunError(
            "RW508",
            f"the run in {output} was started with other content of {', '.join(changed)}; resume with the same "
            "files, or start a new run in a different folder.",
        )


def read_old_run(output: Path) -> RunRecord | None:
    """The record of the run in ``output``; None if there is no valid record."""
    try:
        return load_record(output)
    except RunError:
        return None


def clear_run(output: Path) -> None:
    """Remove the files of the old run except its record, which the new run replaces, and keep all other files.

    The record is marked as ``replaced`` first, so that after a kill no run in the folder looks finished. Raises
    RunError, before anything is removed: RW554 for a link in the place of the checkpoint folder, RW504 for other files
    among the checkpoints.
    """
    refuse_links(output, [FOLDER])
    _refuse_foreign_files(output)
    files = _named_files(output)
    if (record := read_old_run(output)) is not None:
        record.status = REPLACED
        record.save(output)
    remove_unfinished(output)
    for checkpoint in list_checkpoints(output):
        _discard(checkpoint.path)
    for path in files:
        path.unlink(missing_ok=True)
    folders = {output / parent for path in files for parent in path.relative_to(output).parents[:-1]}
    for folder in sorted(folders, reverse=True):
        # A folder with other files stays.
        with contextlib.suppress(OSError):
            folder.rmdir()


def _named_files(output: Path) -> list[Path]:
    """The existing files that the run wrote outside ``checkpoints``. A record's names cannot lead out of the folder."""
    record = read_old_run(output)
    found = [output / name for name in sorted({*OWN_FILES, *map(str, record.files if record else ())})]
    if record and "tensorboard" in str(record.settings.get("report_to")):
        found += sorted(output.glob(EVENTS))
    # The files of a folder that is a link lie elsewhere.
    parents = {path: path.parent.resolve() for path in found if os.path.lexists(path) and not path.is_dir()}
    root = output.resolve()
    inside = [path for path, at in parents.items() if at.is_relative_to(root) and not at.is_relative_to(root / FOLDER)]
    return [path for path in inside if path.name != RUN_FILE]

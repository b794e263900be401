"""``--overwrite``: remove the files that the old run wrote, by name, and no others in its folder."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from rankwise.disk import refuse_links
from rankwise.errors import RunError
from rankwise.records import METRICS_FILE, RUN_FILE, SKIPPED_FILE, RunRecord, load_record
from rankwise.training.checkpoints import FOLDER, foreign_items, remove_checkpoints

# Files of every run. The record names those that depend on the model and its tokenizer.
OWN_FILES = (
    *(METRICS_FILE, SKIPPED_FILE, "loss.svg", "rates.svg", "README.md"),
    *("adapter_config.json", "adapter_model.safetensors"),
)
NOT_NAMED = (FOLDER, RUN_FILE)
# The status of a run that --overwrite has begun to remove.
REPLACED = "replaced"
# TensorBoard's files.
EVENTS = "tensorboard/events.out.tfevents.*"


def read_old_run(output: Path) -> RunRecord | None:
    """The record of the run in ``output``; None where there is no valid record."""
    try:
        record = load_record(output)
    except RunError:
        return None
    return record if isinstance(record.settings, dict) and isinstance(record.files, list) else None


def check_replaceable(output: Path) -> None:
    """Raise RunError for files under the names of a run's files that the old run did not write.

    RW504 names such files; RW554 is raised for a link in the place of the checkpoint folder.
    """
    refuse_links(output, [FOLDER])
    foreign = [f"{FOLDER}/{name}" for name in foreign_items(output)]
    foreign += [path.name for path in _named_files(output) if path.is_dir()]
    if foreign:
        raise RunError(
            "RW504",
            f"{output} holds files that no rankwise run wrote ({', '.join(foreign[:5])}), and --overwrite removes only "
            "files of a run; move them away, or give a different --output.",
        )


def clear_run(output: Path) -> None:
    """Remove the files of the old run except its record, which the new run replaces, and keep all other files.

    The record is marked as ``replaced`` first, so that after a kill no run in the folder looks finished. Raises
    RunError (RW504, RW554) before anything is removed, as ``check_replaceable`` does.
    """
    check_replaceable(output)
    files = _named_files(output)
    if (record := read_old_run(output)) is not None:
        record.status = REPLACED
        record.save(output)
    remove_checkpoints(output)
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
    names = {*OWN_FILES, *filter(_is_inside, record.files if record else ())}
    found = [output / name for name in sorted(names)]
    if record and "tensorboard" in str(record.settings.get("report_to")):
        found += sorted(output.glob(EVENTS))
    return [path for path in found if os.path.lexists(path) and not _is_behind_link(output, path)]


def _is_inside(name: object) -> bool:
    if not isinstance(name, str):
        return False
    path = Path(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and path.parts[0] not in NOT_NAMED


def _is_behind_link(output: Path, path: Path) -> bool:
    """Whether a folder between ``output`` and ``path`` is a link, so that the file lies elsewhere."""
    return any((output / parent).is_symlink() for parent in path.relative_to(output).parents[:-1])

"""Check the run folder before a run: whether it may be written, whether a resumed run has the same settings, and what
``--overwrite`` removes: the files of the old run, by name, and no others.

Imports no torch, since the command line calls these checks before it loads torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rankwise.disk import refuse_links, strays
from rankwise.errors import ConfigError, RunError
from rankwise.foreign import Fields
from rankwise.options import flag
from rankwise.records import METRICS_FILE, RUN_FILE, SKIPPED_FILE, RunRecord, check_writable, load_record
from rankwise.training.checkpoints import FOLDER, foreign_items, remove_checkpoints

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
    "sample_prompt",
    "report_to",
    "dry_run",
    "trust_remote_code",
}
# Settings whose content is compared by hash once it has been read, since a path can be written in several ways.
COMPARED_BY_CONTENT = {"model", "revision", "data", "eval_data", "retain", "chat_template"}
# Settings that are compared as a number of steps, once the data have been read.
LENGTH = ("max_steps", "epochs")
CONSTANT = ("constant", "constant_with_warmup")
# Schedules whose learning rate does not depend on the number of steps.
LENGTH_FREE = (*CONSTANT, "inverse_sqrt", "reduce_lr_on_plateau", "greedy")
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


def check_output(output: Path, *, resume: bool, overwrite: bool) -> Mode:
    """Check whether a run may use this folder, and return how. Nothing is written.

    Raises ConfigError RW112 for both options at once; RunError: RW502 for a folder with a run, RW503 for a folder that
    cannot be written, RW504 for a folder with other files and no run, or with other files under the names of the run to
    overwrite, RW505 for nothing to resume, RW554 for a link in the place of the checkpoint folder.
    """
    if resume and overwrite:
        raise ConfigError("RW112", "--resume continues the old run and --overwrite replaces it; give one of them.")
    check_writable(output)
    refuse_links(output, [FOLDER])
    there = holds_run(output)
    if not there and _foreign_names(output):
        unreadable = f", and its {RUN_FILE} is not a record of one" if (output / RUN_FILE).exists() else ""
        raise RunError(
            "RW504", f"{output} holds files that no rankwise run wrote{unreadable}; give a new or empty --output."
        )
    if resume:
        if not there:
            raise RunError("RW505", f"{output} holds no run to resume; leave --resume out to start one.")
        if load_record(output).status == REPLACED:
            raise RunError("RW505", f"the run in {output} was being replaced; start again with --overwrite.")
        return "resume"
    if there and not overwrite:
        raise RunError(
            "RW502",
            f"{output} already holds a run; continue it with --resume, replace it with --overwrite, or give "
            "a different --output.",
        )
    if not there:
        return "new"
    check_replaceable(output)
    return "overwrite"


def _foreign_names(output: Path) -> list[str]:
    """The names in the folder, except the temporary record that a killed process left."""
    found = {path.name for path in output.iterdir()} if output.is_dir() else set()
    return sorted(found - {path.name for path in strays(output, [RUN_FILE])})


def holds_run(output: Path) -> bool:
    """Whether the folder has the record of a run. A ``checkpoints`` folder alone may belong to another program."""
    return read_old_run(output) is not None


def check_same_run(output: Path, settings: Fields) -> None:
    """Raise RunError (RW507) with every setting, but the length, in which a resumed run differs from the run in
    ``output``."""
    before = load_record(output).settings
    free = MAY_CHANGE | COMPARED_BY_CONTENT | {*LENGTH}
    changed = [
        f"{flag(name)} was {_given(before.get(name))} and is {_given(value)}"
        for name, value in settings.items()
        if _differs(name, before.get(name), value, free)
    ]
    if changed:
        raise RunError(
            "RW507",
            f"the run in {output} was started with other settings: {'; '.join(changed)}; resume with the same "
            "settings, or start a new run in another folder.",
        )


def check_same_processes(output: Path, processes: int) -> None:
    """Raise RunError (RW703) where the number of processes differs from that of the run in ``output``."""
    before = load_record(output).devices
    if before != processes:
        raise RunError(
            "RW703",
            f"the run in {output} was trained in {before} process{'' if before == 1 else 'es'} and {processes} would "
            "continue it; each process has its own random states and its part of each batch, so start the same number, "
            "with --devices or torchrun.",
        )


def _differs(name: str, before: object, now: object, free: set[str]) -> bool:
    """Whether a setting differs. Files are compared by content later; here, only whether a file is given."""
    if name in COMPARED_BY_CONTENT - {"revision"}:
        return (before is None) != (now is None)
    return name not in free and before != now


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
            "files, or start a new run in another folder.",
        )


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

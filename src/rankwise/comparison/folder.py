"""The folder of a comparison: whether it may be used, and the settings with which it was started."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from rankwise.comparison.settings import SAME_RUNS, SHARED, CompareSettings
from rankwise.data import read_template
from rankwise.disk import refuse_links
from rankwise.errors import RunError
from rankwise.foreign import Fields, JsonObject, checked, read_json, reason_of
from rankwise.options import flag
from rankwise.records import write_json
from rankwise.reports.schema import BEST_FOLDER, MERGED_FOLDER

SETTINGS_FILE = "settings.json"
# Settings that do not change what is learned, as in a resumed run.
NEUTRAL = {"device", "ignore_plan", "logging_steps", "save_steps", "save_total_limit", "trust_remote_code"}
# The files in a folder before the first run. Hidden files are locks, or left by a killed write.
OURS = {SETTINGS_FILE, "data"}
# The folders of a comparison, without the cache, whose content is never removed.
FOLDERS = ("base", BEST_FOLDER, "cells", "data", MERGED_FOLDER, "probes", "runs")


def check_folder(output: Path) -> None:
    """Raise RunError: RW581 for a folder with files not of a comparison, RW554 for links in the place of folders."""
    if output.exists() and not output.is_dir():
        raise RunError("RW581", f"--output {output} is a file; give a folder.")
    refuse_links(output, FOLDERS)
    if (output / SETTINGS_FILE).is_file() or not output.is_dir():
        return
    foreign = sorted(path.name for path in output.iterdir() if path.name not in OURS and path.name[0] != ".")
    if foreign:
        raise RunError(
            "RW581",
            f"{output} holds files that are not of a comparison ({', '.join(foreign[:5])}); give a new or empty "
            "--output.",
        )


@dataclasses.dataclass
class _Identity:
    """The recorded settings on which the runs of a folder depend."""

    options: JsonObject
    data: dict[str, str]


def check_same(output: Path, given: CompareSettings, data: Fields) -> None:
    """Record the settings on which the runs of this folder depend, or compare them with the recorded ones.

    Methods, seeds, learning rates and tasks may be added, since finished runs stay valid. Raises RunError: RW580 with
    every other setting that differs, RW581 where the record cannot be read.
    """
    now = json.loads(json.dumps(_identity(given, data)))
    path = output / SETTINGS_FILE
    if not path.is_file():
        write_json(path, now)
        return
    try:
        before = checked(_Identity, read_json(path))
    except (OSError, ValueError) as error:
        raise RunError("RW581", f"cannot read {path}: {reason_of(error)}; give another --output.") from None
    changed = [
        f"{flag(name)} was {before.options.get(name)!r} and is {value!r}"
        for name, value in now["options"].items()
        if name not in NEUTRAL and before.options.get(name, value) != value
    ]
    changed += [
        f"the content of {label} is another"
        for label, digest in now["data"].items()
        if before.data.get(label, digest) != digest
    ]
    if changed:
        raise RunError(
            "RW580",
            f"the comparison in {output} was started with other settings: {'; '.join(changed)}; give the same ones, "
            "or another --output.",
        )


def _identity(given: CompareSettings, data: Fields) -> JsonObject:
    options = given.model_dump(mode="json")
    # With --budget, the rates are part of one run, which other rates would change.
    names = ("model", *SAME_RUNS, *SHARED, *(("learning_rates",) if given.budget else ()))
    content = {"--data": data["train"]["sha256"], "--eval-data": data["eval"]["sha256"]}
    if given.chat_template is not None:
        content["--chat-template"] = hashlib.sha256(read_template(given.chat_template).encode()).hexdigest()
    return {"options": {name: options[name] for name in names}, "data": content}

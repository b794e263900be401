"""``rankwise merge``: fold an adapter into its base model and write an ordinary model folder."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.settings import MergeSettings
from rankwise.cli.words import byte_size
from rankwise.errors import RunError


def run(settings: MergeSettings, output: Output) -> Mapping[str, Any]:
    from rankwise.export.merged import merge_to_folder

    refuse_to_overwrite(settings.output)
    waiting = output.console.status("merging") if output.is_terminal else contextlib.nullcontext()
    with waiting:
        merge_to_folder(settings.adapter, settings.output, model=settings.model, onto="original")
    files = sorted(path for path in settings.output.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    output.line(f"merged {settings.adapter} into {settings.output}: {len(files)} files, {byte_size(size)}")
    output.line("an ordinary transformers model: no adapter, no extra cost at inference")
    output.line(f'try: rankwise generate --model {settings.output} --prompt "Hello"', style="dim")
    return {"adapter": str(settings.adapter), "output": str(settings.output), "files": len(files), "bytes": size}


def refuse_to_overwrite(folder: Path) -> None:
    """Raises RunError (RW530) unless ``folder`` is missing or an empty folder."""
    if folder.exists() and not folder.is_dir():
        raise RunError("RW530", f"--output {folder} is a file; give a folder that does not exist yet.")
    if folder.is_dir() and any(folder.iterdir()):
        raise RunError("RW530", f"--output {folder} is not empty; give a new folder, nothing is overwritten.")


VERB = Verb(
    name="merge",
    settings=MergeSettings,
    run=run,
    summary="Fold an adapter into its base model: an ordinary model folder, no cost at inference.",
    examples=("rankwise merge --adapter runs/first --output merged",),
    metavars={"adapter": "A", "output": "DIR", "model": "M"},
)

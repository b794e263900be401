"""``rankwise merge``: fold an adapter into its base model and write an ordinary model folder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.settings import MergeSettings
from rankwise.cli.words import byte_size, plural


def run(settings: MergeSettings, output: Output) -> Mapping[str, Any]:
    from rankwise.export.merged import merge_to_folder

    with output.waiting("merging"):
        report = merge_to_folder(
            settings.adapter,
            settings.output,
            model=settings.model,
            onto="original",
            trust_remote_code=settings.trust_remote_code,
        )
    size = sum(path.stat().st_size for path in settings.output.rglob("*") if path.is_file())
    modules = plural(report.merged_modules, "module")
    output.line(f"{'merged':<12}{settings.adapter} into {report.base_model}: {modules}")
    output.line(f"{'written':<12}{settings.output}  ({byte_size(size)}, an ordinary transformers model)")
    output.line(f'{"try":<12}rankwise generate --model {settings.output} --prompt "..."')
    return {
        "adapter": str(settings.adapter),
        "base_model": report.base_model,
        "output": str(settings.output),
        "merged_modules": report.merged_modules,
        "size_bytes": size,
    }


VERB = Verb(
    name="merge",
    settings=MergeSettings,
    run=run,
    summary="Fold an adapter into its base: an ordinary model folder, no extra cost at inference.",
    examples=("rankwise merge --adapter runs/first --output merged",),
    metavars={"adapter": "A", "output": "DIR", "model": "M"},
)

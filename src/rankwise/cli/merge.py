"""``rankwise merge``: fold an adapter into its base model and write an ordinary model folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rankwise.cli.folders import refuse_comparisons
from rankwise.cli.glance import check_paths
from rankwise.cli.options import Verb
from rankwise.cli.output import Output
from rankwise.cli.settings import MergeSettings
from rankwise.cli.tables import light_table, titled
from rankwise.reports.numbers import byte_size, plural

if TYPE_CHECKING:
    from rankwise.export.verify import Verification
    from rankwise.quantization.config import FourBitConfig


def run(settings: MergeSettings, output: Output) -> Mapping[str, Any]:
    refuse_comparisons([settings.adapter])
    check_paths(model=settings.model, output=settings.output)
    from rankwise.export.merged import format_of, merge_to_folder, refuse_to_overwrite

    refuse_to_overwrite(settings.output)
    trained_on = format_of(settings.quantization, double_quant=settings.double_quant)
    verification = _verify(settings, trained_on, output) if settings.verify else None
    onto = settings.onto or (verification.closest if verification else "original")
    with output.waiting("merging"):
        report = merge_to_folder(
            settings.adapter,
            settings.output,
            model=settings.model,
            onto=onto,
            trained_on=trained_on,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
            verification=dataclasses.asdict(verification) if verification else None,
        )
    size = sum(path.stat().st_size for path in settings.output.rglob("*") if path.is_file())
    modules = plural(report.merged_modules, "module")
    output.line(f"{'merged':<12}{settings.adapter} into {report.base_model}, {report.onto} weights: {modules}")
    output.line(f"{'written':<12}{settings.output}  ({byte_size(size)}, an ordinary transformers model)")
    output.line(f'{"try":<12}rankwise generate --model {settings.output} --prompt "..."')
    return {**dataclasses.asdict(report), "output": str(settings.output), "size_bytes": size}


def _verify(settings: MergeSettings, trained_on: FourBitConfig | None, output: Output) -> Verification:
    from rankwise.export.rounding import is_more_than_rounding
    from rankwise.export.verify import read_text, verify_merge

    text = None if settings.text is None else read_text(settings.text)
    with output.waiting("measuring each way of merging"):
        verification = verify_merge(
            settings.adapter,
            settings.model,
            text=text,
            trained_on=trained_on,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
    table = light_table()
    table.add_column("way")
    table.add_column("perplexity", justify="right")
    table.add_column("largest logit difference", justify="right")
    table.add_column("explained by")
    for variant in verification.variants:
        difference, rounding = variant.largest_logit_difference, verification.rounding
        cause = "more than rounding" if is_more_than_rounding(difference, rounding) else "rounding"
        table.add_row(
            variant.name, f"{variant.perplexity:.3f}", f"{difference:.3g}", cause if difference else "the reference"
        )
    output.console.print(titled(f"on {verification.tokens:,} tokens", table))
    output.line(f"Rounding to the model's dtype alone moves a logit by up to {verification.rounding:.3g}.")
    return verification


VERB = Verb(
    name="merge",
    settings=MergeSettings,
    run=run,
    summary="Fold an adapter into its base: an ordinary model folder, no extra cost at inference.",
    examples=(
        "rankwise merge --adapter runs/first --output merged",
        "rankwise merge --adapter runs/qlora --output merged --verify",
    ),
    metavars={"adapter": "A", "output": "DIR", "model": "M", "text": "FILE"},
)

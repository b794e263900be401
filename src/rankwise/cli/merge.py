"""``rankwise merge``: merge an adapter into its base model and write an ordinary model folder."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from rankwise.cli.options import Command
from rankwise.constants import TEMPLATE_FILE
from rankwise.errors import ConfigError, warn
from rankwise.foreign import JsonObject
from rankwise.records import record_of, write_json, write_text
from rankwise.reports.numbers import byte_size, plural
from rankwise.verbs.output import Document, Output, light_table, titled
from rankwise.verbs.settings import MergeSettings, check_paths, refuse_comparisons

COMBINED_FILE = "combined.json"

if TYPE_CHECKING:
    from pathlib import Path

    from rankwise.export.verify import Verification


def run(settings: MergeSettings, output: Output) -> Document:
    refuse_comparisons(settings.adapter)
    check_paths(model=settings.model, output=settings.output)
    _check_options(settings)
    from rankwise.adapters.folder import labels_of, read_folder
    from rankwise.export.merged import merge_to_folder, refuse_to_overwrite

    refuse_to_overwrite(settings.output)
    if (settings.verify or settings.combine) and any(labels_of(one) for one in settings.adapter):
        raise ConfigError(
            "RW112",
            "--verify and --combine measure and add adapters that write text, and this one answers with labels.",
        )
    if settings.combine is not None:
        return _combine(settings, output)
    (adapter,) = settings.adapter
    verification = _verify(settings, output) if settings.verify else None
    for_merge = read_folder(adapter)[0].for_merge
    if settings.onto is not None and for_merge is not None:
        raise ConfigError(
            "RW112", f"--onto has no effect: {adapter} was trained for a file in {for_merge}; leave it out."
        )
    onto = settings.onto or (verification.closest if verification else "original")
    with output.waiting("merging"):
        report = merge_to_folder(
            adapter,
            settings.output,
            model=settings.model,
            onto=onto,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
            verification=dataclasses.asdict(verification) if verification else None,
        )
    size = sum(path.stat().st_size for path in settings.output.rglob("*") if path.is_file())
    modules = plural(report.merged_modules, "module")
    how = f"as trained, for {for_merge}" if for_merge else f"{report.onto} weights"
    output.line(f"{'merged':<12}{adapter} into {report.base_model}, {how}: {modules}")
    output.line(f"{'written':<12}{settings.output}  ({byte_size(size)}, an ordinary transformers model)")
    if for_merge == "q4_0":
        output.line(f"{'then':<12}python llama.cpp/convert_hf_to_gguf.py {settings.output} --outfile MODEL.gguf")
        output.line(f"{'':<12}llama-quantize MODEL.gguf MODEL-Q4_0.gguf Q4_0")
    command = f'generate --model {settings.output} --prompt "..."'
    if labels_of(adapter) is not None:
        command = f"predict --model {settings.output} --data D"
    output.line(f"{'try':<12}rankwise {command}")
    return {**dataclasses.asdict(report), "output": str(settings.output), "size_bytes": size}


def _check_options(settings: MergeSettings) -> None:
    """Raise ConfigError (RW112) for several adapters without --combine, and for options without effect."""
    names = ("weights", "rank") if settings.combine is None else ("onto", "data")
    idle = [name for name in names if getattr(settings, name) is not None]
    if settings.combine is None:
        idle += ["adapter"] if len(settings.adapter) > 1 else []
        why = "goes with --combine, which makes one adapter of several"
    else:
        idle += ["verify"] if settings.verify else []
        why = "is of a merged model, and --combine writes an adapter; merge that afterwards"
    if settings.data is not None and not settings.verify and not idle:
        idle, why = ["data"], "gives the rows for --verify; give --verify too"
    if idle:
        raise ConfigError("RW112", f"{', '.join(f'--{name}' for name in idle)} {why}.")


def _combine(settings: MergeSettings, output: Output) -> Document:
    from rankwise.adapters.checkpoint import read_adapter
    from rankwise.disk import hold, whole_folder
    from rankwise.evaluation.engine import base_of
    from rankwise.export.pairs import Combination, combined, write_portable
    from rankwise.models import fetch_model, load_skeleton

    assert settings.combine is not None, "asked for"
    count = len(settings.adapter)
    weights = settings.weights or (1 / count,) * count
    wanted = Combination(weights, settings.combine, settings.rank)
    base = settings.model or base_of(settings.adapter)
    remote: JsonObject = {"revision": settings.revision, "trust_remote_code": settings.trust_remote_code}
    source = fetch_model(base, **remote, weights=False)
    skeleton = load_skeleton(source, trust_remote_code=settings.trust_remote_code)
    files = [read_adapter(skeleton, adapter) for adapter in settings.adapter]
    with hold(settings.output), whole_folder(settings.output) as folder:
        pairs, combination = combined(skeleton, files, wanted)
        write_portable(folder, skeleton, combination, pairs, source.base_model)
        r = combination.config.r
        write_json(
            folder / COMBINED_FILE,
            {"adapters": [str(adapter) for adapter in settings.adapter], **dataclasses.asdict(wanted), "r": r},
        )
        _keep_what_loading_needs(settings, folder)
    parts = ", ".join(f"{weight:g} x {adapter}" for weight, adapter in zip(weights, settings.adapter))
    output.line(f"{'combined':<12}{parts} by {settings.combine}: an adapter of rank {r}")
    output.line(f"{'written':<12}{settings.output}")
    output.line(f'{"try":<12}rankwise generate --adapter {settings.output} --prompt "..."')
    return {**dataclasses.asdict(wanted), "r": r, "base_model": source.base_model, "output": str(settings.output)}


def _keep_what_loading_needs(settings: MergeSettings, folder: Path) -> None:
    """Write the chat template that all runs were given into ``folder``. Warns (RW755) of what no file there says."""
    from rankwise.adapters.folder import four_bits_of
    from rankwise.evaluation.engine import template_of

    formats = {one: config.quant_type for one in settings.adapter if (config := four_bits_of(one)) is not None}
    templates, needed = {template_of([one]) for one in settings.adapter}, []
    if formats:
        each = ", ".join(f"{one} over {kind}" for one, kind in formats.items())
        needed.append(f"over a base in 4 bits ({each}; give --quantization)")
    if len(templates) > 1:
        needed.append("with different chat templates (give --chat-template)")
    elif (template := templates.pop()) is not None:
        write_text(folder / TEMPLATE_FILE, template)
    if needed:
        told = f"the adapters were trained {' and '.join(needed)}"
        warn("RW755", f"{told}: generate and evaluate cannot know it, since the combination has no run record.")


def _verify(settings: MergeSettings, output: Output) -> Verification:
    from rankwise.cli.export_proof import rows_of
    from rankwise.export.verify import verify_merge

    (adapter,) = settings.adapter
    record = record_of(adapter)
    data = settings.data or (None if record is None else record.settings.get("eval_data"))
    with output.waiting("measuring each way of merging"):
        verification = verify_merge(
            adapter,
            settings.model,
            rows=lambda tokenizer: rows_of(adapter, data, tokenizer).held_out,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
    table = light_table()
    table.add_column("way")
    table.add_column("perplexity", justify="right")
    table.add_column("gain left", justify="right")
    table.add_column("largest logit difference", justify="right")
    for variant in verification.variants:
        table.add_row(
            variant.name,
            f"{variant.perplexity:.3f}",
            "" if variant.gain_left is None else f"{variant.gain_left:.0%}",
            f"{variant.largest_logit_difference:.3g}",
        )
    output.console.print(titled(f"on {verification.tokens:,} trained tokens", table))
    output.line(f"The base alone has a perplexity of {verification.base_perplexity:.3f}.")
    return verification


COMMAND = Command(
    name="merge",
    settings=MergeSettings,
    run=run,
    summary="Merge an adapter into its base, and write an ordinary model folder, which costs no more to run.",
    examples=(
        "rankwise merge --adapter runs/first --output merged",
        "rankwise merge --adapter runs/qlora --output merged --verify",
        "rankwise merge --adapter runs/a --adapter runs/b --combine linear \\",
        "    --weights 0.7,0.3 --output both",
    ),
)

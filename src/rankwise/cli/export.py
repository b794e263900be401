"""``rankwise export``: write an adapter in a server's format, and report the error."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

from rankwise.cli.options import Command
from rankwise.constants import FILE_BITS, TEMPLATE_FILE
from rankwise.errors import ConfigError, ModelError, warn
from rankwise.reports.numbers import plural
from rankwise.serving import SERVERS
from rankwise.verbs.output import Document, Output, light_table, titled
from rankwise.verbs.settings import ExportSettings, check_paths, refuse_comparisons

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rankwise.export.adapter import ConversionRows, ExportReport, Prove
    from rankwise.models import ModelSource

SHOWN_LAYERS = 8


def run(settings: ExportSettings, output: Output) -> Document:
    refuse_comparisons([settings.adapter])
    check_paths(model=settings.model, data=[settings.data], output=settings.output)
    _check_options(settings)
    from rankwise.adapters.folder import labels_of
    from rankwise.export.merged import refuse_to_overwrite
    from rankwise.export.proof import server_python

    if labels_of(settings.adapter) is not None and settings.target not in ("peft", "vllm"):
        raise ConfigError(
            "RW112",
            f"--for {settings.target} is for text, and this adapter answers with labels; give --for vllm or peft.",
        )
    refuse_to_overwrite(settings.output)
    if settings.verify:
        server_python(settings.target, settings.server_python)
    report = _export_merged(settings, output) if settings.merged else _export_adapter(settings, output)
    _print(output, settings, report)
    return {**dataclasses.asdict(report), "output": str(settings.output)}


def _check_options(settings: ExportSettings) -> None:
    """Raise ConfigError (RW112) for options without effect."""
    is_gguf, why, idle = SERVERS[settings.target].form == "gguf", "", []
    if settings.merged:
        why = "a merged model is written whole, from its original weights"
        names = ("rank", "max_error", "base_gguf") if settings.verify else ("rank", "max_error", "base_gguf", "data")
        idle = [name for name in names if getattr(settings, name) is not None]
        if is_gguf and settings.verify:
            why, idle = "the GGUF of a merged model is made afterwards, by llama.cpp's converter", ["verify"]
    elif not is_gguf and settings.base_gguf is not None:
        why, idle = f"{SERVERS[settings.target].name} reads no GGUF", ["base_gguf"]
    if settings.server_python is not None and not settings.verify and not idle:
        why, idle = "no server is started without --verify", ["server_python"]
    if idle:
        named = " and ".join(f"--{name.replace('_', '-')}" for name in idle)
        raise ConfigError("RW112", f"{named} would have no effect: {why}; leave it out.")


def _export_merged(settings: ExportSettings, output: Output) -> ExportReport:
    from rankwise.export.adapter import export_merged

    names = ("model", "revision", "trust_remote_code")
    loading = {name: getattr(settings, name) for name in names}
    prove = _prover(settings, output, _source(settings)) if settings.verify else None
    with output.waiting("merging"):
        return export_merged(settings.adapter, settings.output, settings.target, prove, **loading)


def _export_adapter(settings: ExportSettings, output: Output) -> ExportReport:
    """Export the adapter: with a model without weights where the update is written unchanged, else with the trained
    model.
    """
    from rankwise.adapters.checkpoint import read_adapter
    from rankwise.export.adapter import Wanted, export_file, export_live
    from rankwise.models import load_skeleton

    source = _source(settings)
    template = settings.adapter / TEMPLATE_FILE
    is_gguf = SERVERS[settings.target].form == "gguf"
    wanted = Wanted(
        settings.target,
        settings.rank,
        settings.max_error,
        settings.base_gguf or (source.path if is_gguf and source.is_gguf else None),
        template if template.is_file() else None,
    )
    warn_of_other_weights(source, settings.target)
    skeleton = load_skeleton(source, trust_remote_code=settings.trust_remote_code)
    file = read_adapter(skeleton, settings.adapter)
    wanted.check(skeleton, file)
    _check_same_file(settings)
    converts = wanted.converts(file)
    if settings.data is not None and not converts and not settings.verify:
        raise ConfigError(
            "RW112",
            "--data weighs the error of a conversion and gives --verify its prompts, and this adapter is written "
            "exactly; leave it out, or ask for a conversion with --max-error or a lower --rank.",
        )
    if not converts:
        skeleton.name_or_path = source.base_model
        prove = _prover(settings, output, source) if settings.verify else None
        return export_file(skeleton, file, settings.output, wanted, prove)
    rows = _rows(settings, source)
    if not rows.inputs:
        warn(
            "RW736",
            f"{settings.adapter} leads to no rows (they are not recorded, or not here any more), so the error of the "
            "conversion is in Frobenius norm, which takes far higher ranks than real inputs do; give --data.",
        )
    model = _load(settings, source, output)
    prove = _prover(settings, output, source, rows, model) if settings.verify else None
    with output.waiting("converting, and comparing with the adapter as trained"):
        return export_live(model, settings.output, wanted, rows, prove)


def _check_same_file(settings: ExportSettings) -> None:
    """Raise ModelError (RW743) for another --base-gguf than the file in whose own bits the adapter was trained."""
    from rankwise.adapters.folder import quantization_of, sha256_of_base
    from rankwise.foreign import sha256_of

    base, trained = settings.base_gguf, quantization_of(settings.adapter)
    if base is None or trained is None or trained.quant_type != FILE_BITS:
        return
    if (found := sha256_of(base)) != (own := sha256_of_base(settings.adapter)):
        raise ModelError(
            "RW743",
            f"{settings.adapter} was trained over the file with SHA-256 {own}, and that of {base} is {found}; leave "
            "--base-gguf out, or give that file.",
        )


def warn_of_other_weights(source: ModelSource, target: str) -> None:
    """Warn (RW628) if training used a GGUF and the server loads the hub's original weights."""
    if source.kind == "demo" and SERVERS[target].form == "peft":
        warn(
            "RW628",
            f"the adapter was trained over the 4-bit weights of the demo's GGUF, and {SERVERS[target].name} loads "
            f"{source.base_model} with its weights before that rounding, so it answers a little differently; --merged "
            "writes the weights that were trained.",
        )


def _source(settings: ExportSettings) -> ModelSource:
    from rankwise.export.merged import base_source, check_trained_base

    source = base_source(
        settings.adapter, settings.model, revision=settings.revision, trust_remote_code=settings.trust_remote_code
    )
    if settings.verify:
        check_trained_base(settings.adapter, source)
    return source


def _prover(
    settings: ExportSettings,
    output: Output,
    source: ModelSource,
    rows: ConversionRows | None = None,
    model: PreTrainedModel | None = None,
) -> Prove:
    """What --verify does before the export gets its name; ``rows`` and ``model``: those of training, if loaded."""
    from rankwise.cli.export_proof import proven
    from rankwise.export.proof import gguf_under

    if SERVERS[settings.target].form == "gguf":
        gguf_under(settings.base_gguf, source)
    asked = rows or _rows(settings, source)

    def prove(folder: Path, report: ExportReport) -> ExportReport:
        trained = model or _load(settings, source, output)
        with output.waiting(f"asking {SERVERS[settings.target].name}"):
            return proven(settings, folder, trained, source, report, asked)

    return prove


def _rows(settings: ExportSettings, source: ModelSource) -> ConversionRows:
    from rankwise.adapters.folder import tokenizer_with_rows
    from rankwise.cli.export_proof import rows_of
    from rankwise.evaluation.engine import needed_tokenizer
    from rankwise.models.load import load_tokenizer

    found = load_tokenizer(source, trust_remote_code=settings.trust_remote_code)
    tokenizer = needed_tokenizer(found, source.name)
    return rows_of(settings.adapter, settings.data, tokenizer_with_rows(settings.adapter, tokenizer))


def _load(settings: ExportSettings, source: ModelSource, output: Output) -> PreTrainedModel:
    from rankwise.evaluation.engine import LoadOptions, load_as_trained

    with output.waiting("loading the model as it was trained"):
        options = LoadOptions(
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
            labels=source.labels is not None,
        )
        loaded = load_as_trained(source.name, (settings.adapter,), options, named=settings.model is not None)
    found: PreTrainedModel = loaded.model
    return found


def _print(output: Output, settings: ExportSettings, report: ExportReport) -> None:
    if report.conversion is not None:
        _print_conversion(output, report)
    name = SERVERS[settings.target].name
    exact = "" if report.conversion else ", exactly"
    how = "merged into the base" if settings.merged else f"of rank {report.r}{exact}"
    output.line(f"{'exported':<12}{settings.adapter} for {name}: {plural(report.modules, 'module')} {how}")
    output.line(f"{'written':<12}{settings.output}")
    if report.base_gguf_sha256 is not None:
        output.line(f"{'for':<12}the GGUF with SHA-256 {report.base_gguf_sha256}")
    if report.proof is not None:
        output.line(f"{'proven':<12}{report.proof}")
    for index, command in enumerate(report.commands):
        output.line(f"{'serve' if not index else '':<12}{command}")


def _print_conversion(output: Output, report: ExportReport) -> None:
    from rankwise.export.adapter import RECORD_FILE

    conversion, likeness = report.conversion, report.likeness
    assert conversion is not None, "something was converted"
    table = light_table()
    table.add_column("layer")
    table.add_column("relative error", justify="right")
    worst = sorted(conversion.by_layer.items(), key=lambda item: -item[1])
    for name, error in worst[:SHOWN_LAYERS]:
        table.add_row(name, f"{error:.4f}")
    if len(worst) > SHOWN_LAYERS:
        table.add_row(
            f"... {len(worst) - SHOWN_LAYERS} more, which {RECORD_FILE} lists", f"<= {worst[SHOWN_LAYERS][1]:.4f}"
        )
    table.add_row("median layer", f"{median(conversion.by_layer.values()):.4f}")
    table.add_row("all layers", f"{conversion.error:.4f}")
    where = f"on {conversion.tokens:,} tokens" + (" of rows that were set aside" if likeness is not None else "")
    norm = where if conversion.tokens else "in Frobenius norm"
    output.console.print(titled(f"the update as LoRA of rank {conversion.r}: its error {norm}", table))
    if likeness is None:
        return
    if conversion.r > conversion.least_r:
        output.line(
            f"Rank {conversion.least_r} would keep the error of the update; rank {conversion.r} is the first tried "
            "that also keeps the perplexity of the rows that were set aside."
        )
    output.line(
        f"Perplexity: base {likeness.perplexity_base:.4g}, adapter as trained {likeness.perplexity_adapter:.4g}, "
        f"exported {likeness.perplexity_exported:.4g} ({likeness.tokens:,} tokens of rows that were set aside)."
    )


COMMAND = Command(
    name="export",
    settings=ExportSettings,
    run=run,
    summary="Write an adapter for vLLM, SGLang, llama.cpp, Ollama or PEFT; DoRA as LoRA, with its error.",
    examples=(
        "rankwise export --adapter runs/first --for vllm --output served",
        "rankwise export --adapter runs/dora --for llama.cpp --max-error 0.05 \\",
        "    --output served",
    ),
)

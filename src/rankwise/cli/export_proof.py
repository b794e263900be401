"""``rankwise export --verify``: serve the export and the base with the real server, and record the comparison."""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankwise.adapters import load_adapter
from rankwise.cli.export_rows import prompts_of
from rankwise.cli.settings import ExportSettings
from rankwise.export.adapter import ExportReport, Rows
from rankwise.export.gguf_adapter import ADAPTER_FILE
from rankwise.export.gguf_model import MODEL_FILE, requantize, write_folder_gguf
from rankwise.export.proof import PROMPTS, Served, prove, server_python
from rankwise.export.rounding import AsServed, round_as_served
from rankwise.models import ModelSource, load_model
from rankwise.serving import SERVERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def proven(
    settings: ExportSettings,
    folder: Path,
    model: PreTrainedModel,
    source: ModelSource,
    report: ExportReport,
    rows: Rows,
) -> ExportReport:
    """``report`` on the export in ``folder`` with its proof. Raises RunError (RW738) where there is none."""
    python = server_python(settings.target, settings.server_python)
    lost = 0.0 if report.likeness is None else report.likeness.difference
    with tempfile.TemporaryDirectory(prefix="rankwise-verify-") as scratch:
        served = _served(settings, folder, source, report.r, Path(scratch))
        as_served = partial(_rounded, settings, source, served)
        proof = prove(settings.target, python, model, served, prompts_of(rows, PROMPTS), as_served, lost)
    return dataclasses.replace(report, proof=proof)


def _rounded(settings: ExportSettings, source: ModelSource, served: Served) -> AsServed:
    """The trained model over its original weights in float32, rounded as the server's files are."""
    model, _ = load_model(source, dtype=torch.float32, trust_remote_code=settings.trust_remote_code)
    load_adapter(model, settings.adapter, trainable=False)
    trained_on = source.path if source.is_gguf else None
    files, is_merged = served.merged or served.model, served.merged is not None
    return round_as_served(model.eval(), files, trained_on=trained_on, is_merged=is_merged)


def _served(settings: ExportSettings, folder: Path, source: ModelSource, r: int, scratch: Path) -> Served:
    is_gguf = SERVERS[settings.target].form == "gguf"
    base = _gguf_base(settings, source, scratch) if is_gguf else _folder_base(source, scratch)
    if settings.merged:
        return Served(base, merged=folder / MODEL_FILE if is_gguf else folder)
    return Served(base, folder / ADAPTER_FILE if is_gguf else folder, r)


def _gguf_base(settings: ExportSettings, source: ModelSource, scratch: Path) -> Path:
    """The base as a GGUF, quantized as the merged model is."""
    given = settings.base_gguf or (source.path if source.is_gguf else None)
    if given is not None and settings.quantize is None:
        return given
    made = scratch / "base.gguf"
    if given is not None:
        requantize(made, given, settings.quantize)
    else:
        assert source.path is not None, "a fetched model lies on this machine"
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(source.path, trust_remote_code=settings.trust_remote_code)
        write_folder_gguf(made, source.path, config, settings.quantize)
    return made


def _folder_base(source: ModelSource, scratch: Path) -> Path:
    """The base as a transformers folder."""
    if not source.is_gguf and source.path is not None:
        return source.path
    model, tokenizer = load_model(source)
    model.save_pretrained(scratch / "base")
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch / "base")
    return scratch / "base"

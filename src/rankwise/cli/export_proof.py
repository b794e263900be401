"""``rankwise export --verify``: serve the export and the base with the real server, and record the comparison.

Rows weight errors, compare models, and ask a server.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rankwise.adapters import load_adapter
from rankwise.adapters.folder import labels_of
from rankwise.constants import IGNORED
from rankwise.data import check_there, encode_rows, read_rows
from rankwise.data.objectives import UNANSWERED, formats_of
from rankwise.errors import DataError
from rankwise.evaluation.engine import max_length_of, template_of
from rankwise.export.adapter import ConversionRows, ExportReport
from rankwise.export.converted import HeldOutRow
from rankwise.export.gguf import ADAPTER_FILE
from rankwise.export.proof import PROMPTS, Served, gguf_under, prove, server_python
from rankwise.export.verify import AsServed, default_text, round_as_served, text_chunks
from rankwise.foreign import Fields
from rankwise.models import ModelSource, load_model
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.records import record_of
from rankwise.serving import SERVERS
from rankwise.verbs.settings import ExportSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def proven(
    settings: ExportSettings,
    folder: Path,
    model: PreTrainedModel,
    source: ModelSource,
    report: ExportReport,
    rows: ConversionRows,
) -> ExportReport:
    """``report`` on the export in ``folder`` with its proof. Raises RunError (RW738) if there is none."""
    python = server_python(settings.target, settings.server_python)
    lost = 0.0 if report.likeness is None else report.likeness.difference
    with tempfile.TemporaryDirectory(prefix="rankwise-verify-") as scratch:
        if SERVERS[settings.target].form == "gguf":
            served = Served(gguf_under(settings.base_gguf, source), folder / ADAPTER_FILE, report.r)
        else:
            base = _folder_base(source, Path(scratch))
            served = Served(base, merged=folder) if settings.merged else Served(base, folder, report.r)
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


def _folder_base(source: ModelSource, scratch: Path) -> Path:
    """The base as a transformers folder, without a head of labels."""
    if not source.is_gguf and source.path is not None:
        return source.path
    model, tokenizer = load_model(dataclasses.replace(source, labels=None))
    model.save_pretrained(scratch / "base")
    if tokenizer is not None:
        tokenizer.save_pretrained(scratch / "base")
    return scratch / "base"


SAMPLED_ROWS = 400
HELD_OUT_ROWS = 40
SHORTEST_PROMPT, LONGEST_PROMPT = 8, 256


def rows_of(adapter: Path, data: str | None, tokenizer: PreTrainedTokenizerBase) -> ConversionRows:
    """The rows of `--data`, else those of the run, else the built-in text; some of them held out for the comparison.

    Of a run on preferences, these are the good answers. Raises DataError (RW207) for a run on rewards, which has none.
    """
    record = record_of(adapter)
    options = {} if record is None else record.settings
    source = data or options.get("data")
    if source is None or (data is None and not _is_there(str(source))):
        return ConversionRows((), [HeldOutRow(chunk[0], chunk[0]) for chunk in text_chunks(tokenizer, default_text())])
    objective: ObjectiveName = "sft" if record is None or data is not None else record.objective
    if OBJECTIVES[objective].of_rewards:
        raise DataError(
            "RW207", f"the run in {adapter} learned from rewards, and its rows hold no answers; give some with --data."
        )
    if labels_of(adapter) is not None:
        rows = read_rows(str(source), split="train", skip_bad_rows=None, formats=UNANSWERED)
        texts = [row.text for row in rows[:: max(1, len(rows) // PROMPTS)]]
        found = map(torch.tensor, tokenizer(texts, truncation=True, max_length=LONGEST_PROMPT)["input_ids"])
        return ConversionRows((), [HeldOutRow(ids, torch.full_like(ids, IGNORED)) for ids in found])
    given = ("prompt_column", "completion_column") if data is None else ()
    columns = {name: options.get(name) for name in given}
    return _encoded(adapter, str(source), {**columns, "formats": formats_of(objective)}, tokenizer)


def _is_there(source: str) -> bool:
    try:
        check_there(source)
    except DataError:
        return False
    return True


def _encoded(adapter: Path, source: str, options: Fields, tokenizer: PreTrainedTokenizerBase) -> ConversionRows:
    rows = read_rows(source, split="train", skip_bad_rows=None, **options)
    rows = dataclasses.replace(rows, items=[row for row in rows if row.label is not False])
    encoded = encode_rows(
        rows[:: max(1, len(rows) // SAMPLED_ROWS)],
        tokenizer,
        max_length=max_length_of([adapter]),
        chat_template=template_of([adapter]),
        skip_bad_rows=None,
    )
    found = [HeldOutRow(torch.tensor(item["input_ids"]), torch.tensor(item["labels"])) for item in encoded.dataset]
    step = max(2, len(found) // HELD_OUT_ROWS)
    held_out = found[::step] if len(found) > 1 else found
    inputs = [row.ids for index, row in enumerate(found) if index % step or len(found) == 1]
    return ConversionRows(inputs, held_out)


def prompts_of(rows: ConversionRows, count: int) -> list[list[int]]:
    """The tokens before the first label of ``count`` held-out rows; for rows without a prompt, their first tokens."""
    found = []
    for row in [*rows.held_out][:count]:
        labels = row.labels.tolist()
        start = next((index for index, label in enumerate(labels) if label != IGNORED), len(labels))
        found.append(row.ids.tolist()[: start if start >= SHORTEST_PROMPT else SHORTEST_PROMPT][-LONGEST_PROMPT:])
    return found

"""A cache on disk for encoded rows. The key is a hash of everything that the encoding depends on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.data.bad_rows import NEVER
from rankwise.data.encoding import Encoded, EncodingReport, _Table, complain, encode_rows
from rankwise.data.rows import Rows
from rankwise.disk import hold
from rankwise.errors import RunError
from rankwise.records import write_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Version of the encoding, raised whenever the same rows give other ids or labels.
VERSION = 4
COLUMNS = ("ids", "labels", "ends")


def encode_rows_once(
    rows: Rows,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    chat_template: str | None,
    name: str,
    skip_bad_rows: int | None = NEVER,
    cache: Path,
) -> Encoded:
    """Encode the rows, or read what an earlier call on the same rows left in ``cache``.

    Warnings and errors are those of ``encode_rows``.
    """
    key = _key(rows, tokenizer, max_length, chat_template)
    path = None if key is None else cache / f"rows-{key[:32]}.safetensors"
    known = None if path is None else _read(path, rows, max_length, name)
    if known is not None:
        complain(known.report, rows, max_length)
        return known
    encoded = encode_rows(
        rows,
        tokenizer,
        max_length=max_length,
        chat_template=chat_template,
        name=name,
        skip_bad_rows=skip_bad_rows,
    )
    # Rows that the encoder left out need its warnings again, so they are encoded again.
    if path is not None and encoded.report.skipped_rows == len(rows.problems):
        try:
            with hold(path):
                write_bytes(path, _stored(encoded))
        except RunError as error:
            # Another process writes the same rows.
            if error.code != "RW582":
                raise
    return encoded


def _key(rows: Rows, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: str | None) -> str | None:
    """The cache key; None for a tokenizer whose content cannot be hashed."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    special = (tokenizer.special_tokens_map, tokenizer.chat_template, type(tokenizer).__name__)
    parts = (VERSION, max_length, chat_template, rows.kind, rows.uses_template, rows.separator, special)
    digest = hashlib.sha256(repr(parts).encode())
    digest.update(backend.to_str().encode())
    for row in rows:
        fields = (row.messages, row.prompt, row.completion, row.text, row.tools, row.first_trained)
        digest.update(repr(fields).encode("utf-8", errors="backslashreplace"))
    return digest.hexdigest()


def _stored(encoded: Encoded) -> bytes:
    import numpy as np
    import safetensors.numpy

    table = encoded.dataset.data.table.combine_chunks()
    ids, labels = (table.column(name).chunk(0) for name in ("input_ids", "labels"))
    columns = {"ids": ids.values, "labels": labels.values, "ends": ids.offsets}
    arrays = {name: np.asarray(values, dtype=np.int32) for name, values in columns.items()}
    report = json.dumps(dataclasses.asdict(encoded.report))
    digest = _digest(report, *(arrays[name].tobytes() for name in COLUMNS))
    return safetensors.numpy.save(arrays, metadata={"report": report, "sha256": digest})


def _digest(report: str, *columns: bytes) -> str:
    return hashlib.sha256(b"".join([report.encode(), *columns])).hexdigest()


def _read(path: Path, rows: Rows, max_length: int, name: str) -> Encoded | None:
    """The cached rows; None where there is no such file, or where its content does not match its hash."""
    import safetensors

    if not path.is_file():
        return None
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            columns = {column: file.get_tensor(column).tobytes() for column in COLUMNS}
    except (OSError, safetensors.SafetensorError, TypeError, UnicodeDecodeError):
        return None
    # Wrong ids would train another model, and wrong ends read outside the arrays.
    if metadata.get("sha256") != _digest(metadata.get("report", ""), *columns.values()):
        return None
    table = _Table(max_length)
    for column, content in columns.items():
        setattr(table, column, array("i", content))
    skipped = [problem.to_json() for problem in rows.problems]
    own = {"name": name, "skipped": skipped, "skipped_rows": len(skipped)}
    return Encoded(table.dataset(), EncodingReport(**{**json.loads(metadata["report"]), **own}))

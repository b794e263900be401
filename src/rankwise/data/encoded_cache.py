"""Encoded rows kept on disk between runs, by the hash of everything that they depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from array import array
from pathlib import Path
from typing import Any

from rankwise.data.encoding import Encoded, EncodingReport, _complain, _Table, encode_rows
from rankwise.data.rows import Rows
from rankwise.records import write_bytes

VERSION = 1
# Of the encoding: to be raised whenever the same rows give other ids or labels.
COLUMNS = ("ids", "labels", "ends")


def encode_rows_once(
    rows: Rows, tokenizer: Any, *, max_length: int, chat_template: str | None, name: str, cache: Path
) -> Encoded:
    """``encode_rows``, or what an earlier call on the same rows left in ``cache``. Warns and raises as that does."""
    key = _key(rows, tokenizer, max_length, chat_template)
    if key is None:
        return encode_rows(rows, tokenizer, max_length=max_length, chat_template=chat_template, name=name)
    path = cache / f"rows-{key[:32]}.safetensors"
    if not path.is_file():
        encoded = encode_rows(rows, tokenizer, max_length=max_length, chat_template=chat_template, name=name)
        cache.mkdir(parents=True, exist_ok=True)
        write_bytes(path, _stored(encoded))
        return encoded
    encoded = _read(path, max_length, name)
    _complain(encoded.report, rows, max_length)
    return encoded


def _key(rows: Rows, tokenizer: Any, max_length: int, chat_template: str | None) -> str | None:
    """None for a tokenizer that cannot be told by its content."""
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
    lists = {"ids": table.column("input_ids"), "labels": table.column("labels")}
    joined = {name: column.combine_chunks() for name, column in lists.items()}
    first = joined["ids"].chunk(0) if hasattr(joined["ids"], "chunk") else joined["ids"]
    arrays = {name: np.asarray(_values(column), dtype=np.int32) for name, column in joined.items()}
    arrays["ends"] = np.asarray(first.offsets, dtype=np.int32)
    report = json.dumps(dataclasses.asdict(encoded.report))
    return safetensors.numpy.save(arrays, metadata={"report": report})


def _values(column: Any) -> Any:
    part = column.chunk(0) if hasattr(column, "chunk") else column
    return part.values


def _read(path: Path, max_length: int, name: str) -> Encoded:
    import safetensors

    table = _Table(max_length)
    with safetensors.safe_open(path, framework="numpy") as file:
        report = EncodingReport(**{**json.loads(file.metadata()["report"]), "name": name})
        for column in COLUMNS:
            setattr(table, column, array("i", file.get_tensor(column).tobytes()))
    return Encoded(table.dataset(), report)

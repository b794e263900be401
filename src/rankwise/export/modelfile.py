"""``Modelfile``: what Ollama creates a model from. The chat template stays in the GGUF."""

from __future__ import annotations

from pathlib import Path

from rankwise.models.gguf_file import read_gguf_header

MODELFILE = "Modelfile"


def modelfile(model: Path, *, named: str, adapter: str | None = None) -> str:
    """For the GGUF ``model``, called ``named`` in it, and an adapter's file. Raises ModelError (RW310)."""
    import gguf

    header = read_gguf_header(model).metadata
    lines = [f"FROM {named}"] + ([] if adapter is None else [f"ADAPTER {adapter}"])
    reader = gguf.GGUFReader(model)
    tokens = reader.fields.get("tokenizer.ggml.tokens")
    ids = [header.get(f"tokenizer.ggml.{kind}_token_id") for kind in ("eos", "eot")]
    stops = [] if tokens is None else [tokens.contents(index) for index in ids if isinstance(index, int)]
    lines += [f'PARAMETER stop "{stop}"' for stop in dict.fromkeys(stops)]
    length = header.get(f"{header['general.architecture']}.context_length")
    lines += [f"PARAMETER num_ctx {length}"] if length else []
    return "\n".join(lines) + "\n"

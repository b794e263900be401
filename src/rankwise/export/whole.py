"""``rankwise export --merged``: write the base with the adapter merged, in the format of a server."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from rankwise.adapters.checkpoint import read_adapter
from rankwise.constants import TEMPLATE_FILE
from rankwise.data.files import read_text
from rankwise.disk import hold, whole_folder
from rankwise.errors import ConfigError
from rankwise.export.adapter import RECORD_FILE, ExportReport, Prove
from rankwise.export.gguf_model import MODEL_FILE, write_folder_gguf, write_merged_gguf
from rankwise.export.merged import base_source, merge_to_folder, refuse_to_overwrite
from rankwise.export.modelfile import MODELFILE, modelfile
from rankwise.export.portable import refuse_loftq
from rankwise.foreign import JsonObject
from rankwise.models import ModelSource, load_skeleton
from rankwise.records import write_json, write_text
from rankwise.serving import SERVERS, served_whole


@dataclasses.dataclass(frozen=True)
class WholeModel:
    """The options: the server, the base, and the GGUF type."""

    target: str
    model: str | None = None
    base_gguf: Path | None = None
    kind: str | None = None
    revision: str | None = None
    trust_remote_code: bool = False


def export_merged(adapter: Path, output: Path, wanted: WholeModel, prove: Prove | None = None) -> ExportReport:
    """Write the merged model to ``output``, which appears whole or not at all: ``model.gguf`` for llama.cpp and Ollama,
    else an ordinary folder.

    Raises what ``merge_to_folder`` raises; ModelError: RW740, RW741, RW743 to RW746.
    """
    with hold(output):
        refuse_to_overwrite(output)
        with whole_folder(output) as folder:
            result = _written(adapter, folder, wanted, served_whole(wanted.target, str(output)))
            if prove is not None:
                result = prove(folder, result)
            write_json(folder / RECORD_FILE, dataclasses.asdict(result))
    return result


def _written(adapter: Path, folder: Path, wanted: WholeModel, commands: tuple[str, ...]) -> ExportReport:
    loading: JsonObject = {"revision": wanted.revision, "trust_remote_code": wanted.trust_remote_code}
    if SERVERS[wanted.target].form == "peft":
        merged = merge_to_folder(adapter, folder, model=wanted.model, **loading)
        return ExportReport(wanted.target, merged.base_model, 0, merged.merged_modules, None, None, commands)
    source = base_source(adapter, wanted.model, **loading)
    modules = _write_gguf(adapter, folder, source, wanted)
    if wanted.target == "ollama":
        write_text(folder / MODELFILE, modelfile(folder / MODEL_FILE, named=f"./{MODEL_FILE}"))
    return ExportReport(wanted.target, source.base_model, 0, modules, None, None, commands)


def _write_gguf(adapter: Path, folder: Path, source: ModelSource, wanted: WholeModel) -> int:
    base = wanted.base_gguf or (source.path if source.is_gguf else None)
    skeleton = load_skeleton(source, trust_remote_code=wanted.trust_remote_code)
    file = read_adapter(skeleton, adapter)
    refuse_loftq(file)
    # New tokens need a tokenizer that holds them, and that of a GGUF is copied.
    if file.has_new_tokens and wanted.base_gguf is not None:
        raise ConfigError(
            "RW735",
            f"--base-gguf {base} has no place for the adapter's new tokens; leave it out, and the model is written "
            "from the adapter's own base.",
        )
    if base is not None and not file.has_new_tokens:
        given = adapter / TEMPLATE_FILE
        template = read_text(given) if given.is_file() else None
        write_merged_gguf(folder / MODEL_FILE, base, skeleton, file, wanted.kind, template)
        return len(file.planned)
    merged = folder / "merged"
    merge_to_folder(
        adapter, merged, model=source.name, revision=source.revision, trust_remote_code=wanted.trust_remote_code
    )
    write_folder_gguf(folder / MODEL_FILE, merged, skeleton.config, wanted.kind)
    shutil.rmtree(merged)
    return len(file.planned)

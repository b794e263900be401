"""``rankwise export``: write an adapter for a server, or merged, into a folder that appears whole or not at all."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from rankwise.adapters.checkpoint import AdapterFile
from rankwise.adapters.folder import labels_of as labels_of_adapter
from rankwise.adapters.saving import labels_of
from rankwise.adapters.state import state_and_name
from rankwise.compat.transformers import heads_of_labels
from rankwise.disk import hold, whole_folder
from rankwise.errors import AdapterError, ConfigError
from rankwise.export.converted import (
    Conversion,
    HeldOutRow,
    Likeness,
    allowed_change,
    convert,
    keeps_perplexity,
    likeness,
)
from rankwise.export.gguf import ADAPTER_FILE, MODELFILE, check_base, gguf_pairs, modelfile, write_adapter
from rankwise.export.merged import merge_to_folder, refuse_to_overwrite
from rankwise.export.pairs import (
    Pair,
    check_rank,
    folded_pairs,
    live_adapter,
    refuse_unserved,
    to_one_rank,
    write_portable,
)
from rankwise.export.proof import Proof
from rankwise.foreign import sha256_of
from rankwise.models.gguf_file import GgufNames
from rankwise.records import write_json, write_text
from rankwise.serving import MODEL_FILE, SERVERS, served_by, served_whole

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RECORD_FILE = "export.json"


@dataclasses.dataclass(frozen=True)
class Wanted:
    """The export's options: the server, and the rank, or the error within which the least rank is taken."""

    target: str
    r: int | None = None
    max_error: float | None = None
    # The GGUF of the base under a GGUF adapter, which Ollama's Modelfile names.
    base_gguf: Path | None = None
    # A chat template file to copy into the folder.
    template: Path | None = None

    def __post_init__(self) -> None:
        if self.target not in SERVERS:
            raise ConfigError("RW103", f"there is no export for {self.target!r}; give one of {', '.join(SERVERS)}.")
        if (self.r is not None and self.r < 1) or (self.max_error is not None and not 0 < self.max_error < 1):
            raise ConfigError(
                "RW103",
                f"rank={self.r}, max_error={self.max_error}: a rank starts at 1, and a relative error lies between 0 "
                "and 1.",
            )
        if self.target == "ollama" and self.base_gguf is None:
            raise ConfigError(
                "RW737", "Ollama applies an adapter to a GGUF; give the base's with --base-gguf, or write --merged."
            )

    def check(self, model: PreTrainedModel, file: AdapterFile) -> None:
        """Raise what export raises for an adapter that the server or --base-gguf does not take, before anything is
        converted. ``model`` may be on the meta device."""
        refuse_unserved(model, file, self.target)
        if self.converts(file) and heads_of_labels(model):
            raise AdapterError(
                "RW730",
                "the adapter answers with labels, and only plain LoRA at its own rank is written with a head, since a "
                "conversion is judged by the texts that a model writes; write a merged model with --merged.",
            )
        pairs = folded_pairs(model, file)
        # The rank of a conversion is not known yet.
        largest = max((pair.r for pair in pairs.values()), default=0)
        check_rank(self.r or (0 if self.converts(file) else largest), self.target)
        if SERVERS[self.target].form == "gguf":
            names = GgufNames(model.config)
            renamed = gguf_pairs(model, names, pairs)
            if self.base_gguf is not None:
                check_base(self.base_gguf, names, renamed)

    def converts(self, file: AdapterFile) -> bool:
        """Whether the update must be approximated: DoRA's has full rank, or a lower rank was requested."""
        largest = max((item.r * sum(item.parts or (1,)) for item in file.planned), default=0)
        lower = self.r is not None and self.r < largest
        return file.config.kind != "lora" or self.max_error is not None or lower


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The content of ``export.json``. ``conversion`` and ``likeness`` are None if the export is exact."""

    target: str
    base_model: str | None
    r: int
    modules: int
    conversion: Conversion | None
    likeness: Likeness | None
    commands: tuple[str, ...]
    # With --verify.
    proof: Proof | None = None
    # Of the GGUF for which the adapter was written.
    base_gguf_sha256: str | None = None


# What --verify does with the folder before it gets its name: it returns the report with the proof, or raises.
Prove = Callable[[Path, ExportReport], ExportReport]


@dataclasses.dataclass(frozen=True)
class ConversionRows:
    """Token ids (T,) that weigh the error of a conversion, and rows on which the result is compared."""

    inputs: Sequence[Tensor] = ()
    held_out: Sequence[HeldOutRow] = ()


def export_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    target: str,
    rank: int | None = None,
    max_error: float | None = None,
    rows: Sequence[Tensor] = (),
    held_out: Sequence[Tensor] = (),
    base_gguf: str | Path | None = None,
) -> ExportReport:
    """Write the model's active adapter in the format of a server.

    LoRA is written exactly, with every scale folded into B. DoRA becomes the LoRA adapter with the least error.

    Args:
        model: A model with an active adapter.
        folder: The output folder.
        target: ``vllm``, ``sglang``, ``llama.cpp``, ``ollama`` or ``peft``.
        rank: The rank to write; a lower rank than the adapter's compresses it.
        max_error: The largest relative error; the least rank within it is taken (default 0.05 for DoRA).
        rows: Token ids, each (T,), whose inputs to the layers define the error. Without rows, the error is in
            Frobenius norm, which needs far higher ranks.
        held_out: Token ids, each (T,), on which the error is measured; ``rows``, which choose the directions, give too
            small a one. Without ``rank`` the rank grows until their perplexity changes by at most 1 %.
        base_gguf: The GGUF model that a GGUF adapter is for; names and shapes are checked against it.

    Raises:
        AdapterError: RW407 no adapter, RW730 trained weights outside of low-rank pairs, RW731 a rank that the server
            or the adapter's experts do not support, RW732 an error that no rank reaches, RW742 a tied embedding.
        ConfigError: RW103, RW737, options that do not belong together.
        ModelError: RW740, RW743, a base that cannot be written as GGUF.
        RunError: RW532, RW551, RW582, an output folder that cannot be written.
    """
    wanted = Wanted(target, rank, max_error, None if base_gguf is None else Path(base_gguf))
    file = live_adapter(model, None)
    wanted.check(model, file)
    if file.config.init.kind == "pissa" and held_out:
        raise AdapterError("RW433", "the base lacks what pissa took of it; save the adapter, and export that one.")
    return export_live(model, Path(folder), wanted, ConversionRows(rows, [HeldOutRow(ids, ids) for ids in held_out]))


def export_live(
    model: PreTrainedModel, folder: Path, wanted: Wanted, rows: ConversionRows, prove: Prove | None = None
) -> ExportReport:
    """As ``export_adapter``, with a comparison on held-out rows where something is converted."""
    _, name = state_and_name(model, None)
    file = live_adapter(model, name)
    with hold(folder):
        refuse_to_overwrite(folder)
        pairs, conversion = _low_rank(model, name, file, wanted, rows)
        compared = likeness(model, file, name, pairs, rows.held_out) if conversion and rows.held_out else None
        return _write(folder, model, file, wanted, pairs, prove, conversion, compared)


def export_file(
    skeleton: PreTrainedModel, file: AdapterFile, folder: Path, wanted: Wanted, prove: Prove | None = None
) -> ExportReport:
    """Export an adapter's tensors from its file, with a model without weights. Nothing is converted."""
    with hold(folder):
        refuse_to_overwrite(folder)
        return _write(folder, skeleton, file, wanted, to_one_rank(folded_pairs(skeleton, file), wanted.r), prove)


def export_merged(adapter: Path, output: Path, target: str, prove: Prove | None = None, **loading: Any) -> ExportReport:
    """Write the merged model as an ordinary folder, with the commands that make of it what the server reads.

    ``loading``: model, revision and trust_remote_code, as for ``merge_to_folder``, whose errors are raised.
    """
    with hold(output):
        refuse_to_overwrite(output)
        with whole_folder(output) as folder:
            merged = merge_to_folder(adapter, folder, **loading)
            if target == "ollama":
                write_text(folder / MODELFILE, f"FROM ./{MODEL_FILE}\n")
            commands = served_whole(target, str(output), has_labels=labels_of_adapter(adapter) is not None)
            result = ExportReport(
                target=target,
                base_model=merged.base_model,
                r=0,
                modules=merged.merged_modules,
                conversion=None,
                likeness=None,
                commands=commands,
            )
            if prove is not None:
                result = prove(folder, result)
            write_json(folder / RECORD_FILE, dataclasses.asdict(result))
    return result


def _low_rank(
    model: PreTrainedModel, name: str, file: AdapterFile, wanted: Wanted, rows: ConversionRows
) -> tuple[dict[str, Pair], Conversion | None]:
    folded = folded_pairs(model, file)
    if not wanted.converts(file):
        return to_one_rank(folded, wanted.r), None
    stacks = {item.name: folded[item.name] for item in file.planned if item.experts is not None}
    least = max((pair.r for pair in stacks.values()), default=0)
    if wanted.r is not None and least > wanted.r:
        raise AdapterError(
            "RW731",
            f"the adapter's stacked experts keep their rank of {least}, and --rank is {wanted.r}; give one that is not "
            "below theirs.",
        )
    keeps = None
    if wanted.r is None and rows.held_out:
        keeps_these = keeps_perplexity(model, file, name, rows.held_out, allowed_change(wanted.max_error))

        def keeps(pairs: dict[str, Pair]) -> bool:
            return keeps_these(to_one_rank({**stacks, **pairs}))

    held_out = [row.ids for row in rows.held_out]
    pairs, conversion = convert(model, name, rows.inputs, held_out, r=wanted.r, max_error=wanted.max_error, keeps=keeps)
    return to_one_rank({**stacks, **pairs}, max(least, conversion.r)), conversion


def _write(
    folder: Path,
    model: PreTrainedModel,
    file: AdapterFile,
    wanted: Wanted,
    pairs: Mapping[str, Pair],
    prove: Prove | None,
    conversion: Conversion | None = None,
    compared: Likeness | None = None,
) -> ExportReport:
    r = next(iter(pairs.values())).r
    base = getattr(model, "name_or_path", None) or None
    served = wanted.base_gguf or "BASE.gguf" if SERVERS[wanted.target].form == "gguf" else base or "BASE"
    labels = labels_of(model) if heads_of_labels(model) else None
    commands = served_by(wanted.target, str(folder), str(served), r, labels)
    result = ExportReport(
        target=wanted.target,
        base_model=base,
        r=r,
        modules=len(pairs),
        conversion=conversion,
        likeness=compared,
        commands=commands,
    )
    if wanted.base_gguf is not None:
        result = dataclasses.replace(result, base_gguf_sha256=sha256_of(wanted.base_gguf))
    with whole_folder(folder) as partial:
        if SERVERS[wanted.target].form == "gguf":
            names = GgufNames(model.config)
            write_adapter(partial / ADAPTER_FILE, names, gguf_pairs(model, names, pairs), base)
            if wanted.target == "ollama" and wanted.base_gguf is not None:
                under = wanted.base_gguf.resolve()
                write_text(partial / MODELFILE, modelfile(under, named=str(under), adapter=f"./{ADAPTER_FILE}"))
        else:
            write_portable(partial, model, file, pairs, base, wanted.target)
        if wanted.template is not None:
            shutil.copyfile(wanted.template, partial / wanted.template.name)
        if prove is not None:
            result = prove(partial, result)
        write_json(partial / RECORD_FILE, dataclasses.asdict(result))
    return result

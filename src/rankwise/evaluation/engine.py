"""A model with its adapters as they were trained, and its interface to tasks: scoring, answering, encoding, batches.

A base is loaded with the dtype, the revision and the 4-bit format of the training.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from rankwise.acceleration import limit_generated_kernels, optimize_for_training, restore, use_native_products
from rankwise.acceleration.generation import Decoding, Generator, Prompt, batches_that_fit, stop_ids_of
from rankwise.acceleration.scoring import Scorer, loss_scorer
from rankwise.adapters import folder as adapter_folder
from rankwise.adapters import load_adapter
from rankwise.adapters.checkpoint import read_adapter
from rankwise.adapters.folder import (
    base_model_of,
    labels_of,
    quantization_of,
    read_folder,
    revision_of,
    tokenizer_with_rows,
)
from rankwise.config import TrainSettings
from rankwise.constants import TEMPLATE_FILE
from rankwise.data.encoding import RowEncoder
from rankwise.data.rows import Row, Rows
from rankwise.errors import ConfigError, DataError, ModelError, heard
from rankwise.evaluation.record import text_sha256
from rankwise.foreign import JsonObject, read_json
from rankwise.labels import labels_of_head
from rankwise.methods import is_known, method_of, method_type
from rankwise.models import ModelSource, choose_device, fetch_model, load_skeleton, warns_of_other_hub_model
from rankwise.models.folder import answers_labels, read_config
from rankwise.models.load import is_of_file, table_rows
from rankwise.models.prepared import load_prepared, user_cache
from rankwise.quantization.config import CONFIGS, FileConfig, FourBitConfig
from rankwise.records import RunRecord, record_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Number of tokens in a batch that is scored: enough to keep the device busy.
SCORING_TOKENS = {"cpu": 2048, "cuda": 16384, "mps": 4096}


@dataclasses.dataclass(kw_only=True)
class Engine:
    """Model and tokenizer on their device. ``template`` is Jinja text that replaces the tokenizer's."""

    # A PreTrainedModel that generates, for which transformers has no type.
    model: Any
    tokenizer: PreTrainedTokenizerBase
    template: str | None = None
    # Maximum number of sequences in a batch; None: as many as the budget of tokens admits.
    batch_size: int | None = None
    # Whether the training run used rankwise.acceleration, as runs do by default.
    trained_fast: bool = True
    # The autocast dtype of a full fine-tuning, whose weights are float32; None without autocast.
    autocast: torch.dtype | None = None

    @property
    def device_type(self) -> str:
        return str(self.model.device.type)

    @cached_property
    def max_length(self) -> int:
        """The model's context length in tokens: the size of its position table, or the config's value."""
        rows = table_rows(self.model)
        if rows is not None:
            return rows
        config = self.model.config.get_text_config(decoder=True)
        for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length"):
            if isinstance(getattr(config, name, None), int):
                return int(getattr(config, name))
        return 2048

    @property
    def pad(self) -> int:
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id) if self.tokenizer is not None else ()
        return next((token for token in known if token is not None), 0)

    @cached_property
    def scorer(self) -> Scorer:
        budget = SCORING_TOKENS.get(self.device_type, SCORING_TOKENS["cpu"])
        return Scorer(self.model, budget=budget, max_rows=self.batch_size, pad=self.pad)

    @contextlib.contextmanager
    def as_in_training(self) -> Iterator[Scorer]:
        """A scorer that computes losses as the trainer's evaluation did: the same operators and batches."""
        if self.trained_fast:
            optimize_for_training(self.model, keep_memory=False)
        try:
            yield loss_scorer(self.model, max_rows=self.batch_size, autocast=self.autocast)
        finally:
            if self.trained_fast:
                restore(self.model)

    def generator(self, decoding: Decoding) -> Generator:
        return Generator(self.model, decoding, pad=self.pad)

    def batches(self, prompts: Sequence[Prompt], decoding: Decoding) -> list[list[int]]:
        """The indices of the prompts that are answered together."""
        return batches_that_fit(self.model, prompts, decoding, self.batch_size)

    def stop_ids(self, more: Iterable[int | None] = ()) -> frozenset[int]:
        """The tokens that end an answer: the tokenizer's, the model's, and ``more``."""
        return stop_ids_of(self.model, self.tokenizer, more)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def encoder(self, rows: Rows) -> RowEncoder:
        """The encoder that turns rows into token ids as training does."""
        return RowEncoder(rows, self.tokenizer, self.template)

    def prompt_ids(self, encoder: RowEncoder, rows: Sequence[Row]) -> list[tuple[int, ...]]:
        """The ids before the first trained one, for prompt-and-completion rows. A trained model answers these."""
        return [tuple(row.ids[: row.trained.index(True)]) for row in encoder.encode(rows)]

    def text_ids(self, text: str) -> tuple[int, ...]:
        """The ids of a plain text, with the tokenizer's opening token if it has one."""
        return tuple(self.tokenizer(text)["input_ids"])


# --- loading ---


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode. ``adapters`` are the names of its adapters, in order."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    # Without the new tokens of an adapter.
    base_tokenizer: PreTrainedTokenizerBase
    device: str
    adapters: tuple[str, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadOptions:
    """How to load a base. "auto": as its adapters were trained; without a record, the device's dtype and not 4-bit."""

    dtype: str = "auto"
    # auto, none, nf4 or fp4.
    quantization: str = "auto"
    # None: as trained; without adapters "file" for a GGUF on a CPU.
    base_bits: str | None = None
    device: str = "auto"
    trust_remote_code: bool = False
    revision: str | None = None
    # Whether weights on a CPU are mapped from files.
    mmap: bool = True
    # Whether the model answers with labels, or else writes text.
    labels: bool = False
    # Whether a single adapter may be of another distribution's method.
    guest: bool = False


def load_as_trained(name: str, adapters: Sequence[Path], options: LoadOptions, *, named: bool = True) -> Loaded:
    """Load the model ``name`` in the form on which the adapters were trained, and attach the adapters, frozen.

    The last adapter is active. ``named`` says whether the user named the model. If not, ``name`` comes from the
    adapter, and the model is loaded at the revision of the training.

    Raises ConfigError (RW151) if the adapters were trained on different bases, ConfigError (RW115) if there is no
    tokenizer, and what ``load_model`` and ``load_adapter`` raise. Warns (RW417) if an adapter names another hub model.
    """
    limit_generated_kernels()
    revision = check_fit(name, adapters, options, named=named)
    guest, own = _apart(adapters, options)
    source = fetch_model(name, revision=revision, trust_remote_code=options.trust_remote_code)
    source = with_labels(source, adapters) if options.labels else source
    if named:
        for adapter in adapters:
            warns_of_other_hub_model(name, adapter, adapter_folder.read_config(adapter))
    choice = choose_device(options.device)
    model, tokenizer = load_prepared(
        source,
        dtype=_dtype(options.dtype, adapters, choice.dtype),
        device=str(choice.device),
        quantization=_quantization(options, adapters, is_file=source.kind == "gguf"),
        trust_remote_code=options.trust_remote_code,
        cache=user_cache(str(choice.device), mapped=options.mmap),
        mapped=options.mmap,
    )
    if options.quantization == "none" and getattr(model, "hf_quantizer", None) is not None:
        # The files themselves hold 4-bit weights.
        model = model.dequantize()
    tokenizer = needed_tokenizer(tokenizer, name)
    with_rows = tokenizer_with_rows(own[0], tokenizer) if own else tokenizer
    names = adapter_names(len(own))
    for adapter_name, adapter in zip(names, own):
        load_adapter(model, adapter, name=adapter_name, trainable=False)
    if guest is not None:
        method_type(guest).load(model, adapters[0])
    use_native_products(model.requires_grad_(False))
    return Loaded(model.eval(), with_rows, tokenizer, str(choice.device), names)


def check_fit(name: str, adapters: Sequence[Path], options: LoadOptions, *, named: bool) -> str | None:
    """Raise what needs neither weights nor data: a device or model that is not there, adapters that do not fit.

    Returns the revision of the model to load.
    """
    for adapter in (own := _apart(adapters, options)[1]):
        read_folder(adapter)
        if (labels_of(adapter) is not None) != options.labels:
            does = "writes text, and `rankwise generate`" if options.labels else "has labels, and `rankwise predict`"
            raise ConfigError("RW112", f"the adapter in {adapter} {does} answers with it.")
    choose_device(options.device)
    keeps = options.revision is not None or named or not adapters
    revision = options.revision if keeps else revision_of(adapters[0])
    remote = options.trust_remote_code
    source = fetch_model(name, revision=revision, trust_remote_code=remote, weights=False)
    source = with_labels(source, adapters) if options.labels else source
    # Loading gives the warnings again.
    with heard(lambda warning: False):
        for adapter in own:
            read_adapter(load_skeleton(source, trust_remote_code=remote), adapter)
    return revision


def with_labels(source: ModelSource, adapters: Sequence[Path]) -> ModelSource:
    """The source with the labels of the first adapter, or else those of its own head.

    Raises ModelError (RW303) for a model without such a head.
    """
    if adapters:
        return dataclasses.replace(source, labels=labels_of(adapters[0]))
    config = {} if source.is_gguf else read_config(source.place)
    names = config.get("id2label")
    if not answers_labels(config) or not isinstance(names, dict):
        raise ModelError("RW303", f"{source.name} has no head of labels; give an adapter that `train` made, too.")
    return dataclasses.replace(source, labels=labels_of_head(names, config.get("problem_type")))


def needed_tokenizer(tokenizer: PreTrainedTokenizerBase | None, name: str) -> PreTrainedTokenizerBase:
    """The tokenizer. Raises ConfigError (RW115) if the model ``name`` has none."""
    if tokenizer is None:
        raise ConfigError(
            "RW115", f"{name} comes without a tokenizer, so it cannot read a prompt; give one that has it."
        )
    return tokenizer


def guest_of(adapter: Path) -> str | None:
    """The installed method of another distribution by which a run trained; None for LoRA and DoRA."""
    record = record_of(adapter)
    return record.method if record and method_of(record.method).is_guest and is_known(record.method) else None


def _apart(adapters: Sequence[Path], options: LoadOptions) -> tuple[str | None, Sequence[Path]]:
    """(the method of another distribution whose adapter is the only one, the adapters of our own)."""
    guest = guest_of(adapters[0]) if options.guest and adapters else None
    return guest, adapters if guest is None else ()


def check_alone(adapters: Sequence[Path], *, base: bool) -> None:
    """Raise ConfigError (RW151) for an adapter that only answers by itself, beside another model: one with new tokens,
    which the others' tokenizer lacks, or one of another distribution's method, which stays in the base."""
    if len(adapters) + base < 2:
        return
    if guests := [*filter(None, map(guest_of, adapters))]:
        raise ConfigError("RW151", f"an adapter of {guests[0]} answers by itself; give one --adapter, and --no-base.")
    if any(read_folder(adapter)[0].token_rows for adapter in adapters):
        raise ConfigError(
            "RW151", "an adapter with new tokens has a tokenizer of its own; give one --adapter, and --no-base."
        )


def load_settings(adapters: Sequence[Path], options: LoadOptions) -> JsonObject:
    """The dtype and the 4-bit format that "auto" in the options means, in words. Raises as ``load_as_trained``."""
    config = _quantization(options, adapters, is_file=False)
    kind = str(_dtype(options.dtype, adapters, choose_device(options.device).dtype)).removeprefix("torch.")
    return {"dtype": kind, "quantization": None if config is None else str(sorted(config.to_dict().items(), key=str))}


def base_of(adapters: Sequence[Path]) -> str:
    """The base that all ``adapters`` name. Raises ConfigError (RW151) when they name different ones."""
    bases = {str(adapter): base_model_of(adapter) for adapter in adapters}
    _same("base model", bases, "--model")
    return next(iter(bases.values()))


def template_of(adapters: Sequence[Path]) -> str | None:
    """The chat template that the runs in ``adapters`` were given, as Jinja text from their folders; of a folder without
    a record (an export, or PEFT's), the template there.

    None if none was given: then the base's tokenizer has the template. Folders with neither record nor template are
    ignored. Raises ConfigError (RW151) for different templates, DataError (RW211) when one is missing.
    """
    records = _records(adapters)
    stored = {str(adapter): _stored_template(adapter) for adapter in adapters}
    given = [
        name
        for name, text in stored.items()
        if (records[name].settings.get("chat_template") if name in records else text is not None)
    ]
    if not given:
        return None
    lost = next((name for name in given if stored[name] is None), None)
    if lost is not None:
        raise DataError(
            "RW211",
            f"cannot read the chat template that {lost} was trained with: its tokenizer files hold none that is text; "
            "give it with --chat-template FILE.",
        )
    known = {
        name: "none" if text is None else f"one of sha256 {text_sha256(text)}"
        for name, text in stored.items()
        if name in records or text is not None
    }
    _same("chat template", known, "--chat-template")
    return stored[given[0]]


def max_length_of(adapters: Sequence[Path]) -> int:
    """The tokens per row in the runs of ``adapters``; the default of training if none has a record.

    Raises ConfigError (RW151) when they were trained with different ones.
    """
    usual = int(TrainSettings.model_fields["max_length"].default)
    lengths = {name: record.settings.get("max_length", usual) for name, record in _records(adapters).items()}
    _same("length of a row", lengths, "--max-length")
    return next(iter(lengths.values()), usual)


def _records(adapters: Sequence[Path]) -> dict[str, RunRecord]:
    """The records of those adapters that have one, by folder."""
    return {str(adapter): record for adapter in adapters if (record := record_of(adapter)) is not None}


def _stored_template(folder: Path) -> str | None:
    """The template of the tokenizer saved in ``folder``: a file of its own, or a key in older versions."""
    try:
        return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        pass
    except (OSError, ValueError):
        return None
    try:
        found = read_json(folder / "tokenizer_config.json").get("chat_template")
    except (OSError, ValueError, AttributeError):
        return None
    return found if isinstance(found, str) else None


def adapter_names(count: int) -> tuple[str, ...]:
    return ("default",) if count == 1 else tuple(f"adapter_{index}" for index in range(1, count + 1))


def _same(what: str, found: JsonObject, option: str) -> None:
    if len({str(value) for value in found.values()}) > 1:
        each = "; ".join(f"{adapter} has {value}" for adapter, value in found.items())
        raise ConfigError(
            "RW151",
            f"the adapters differ in the {what} they were trained on ({each}); give {option}, or one at a time.",
        )


def _quantization(options: LoadOptions, adapters: Sequence[Path], *, is_file: bool) -> FourBitConfig | None:
    """``is_file``: whether the user named a GGUF file."""
    if options.quantization != "auto" and options.base_bits == "file":
        raise ConfigError("RW112", "--quantization makes 4 bits, and --base-bits file keeps the file's; leave one out.")
    if options.quantization == "none":
        return None
    if options.quantization != "auto":
        return CONFIGS[options.quantization](double_quant=True)
    if options.base_bits is None and not adapters:
        return FileConfig() if is_file and choose_device(options.device).device == "cpu" else None
    found = {str(adapter): quantization_of(adapter) for adapter in adapters}
    described = {name: "16 bits" if config is None else str(config.to_dict()) for name, config in found.items()}
    _same("4-bit format of the base", described, "--quantization")
    config = next(iter(found.values()), None)
    if options.base_bits is None or (config is not None and not is_of_file(config)):
        return config
    return FileConfig() if options.base_bits == "file" else None


def _dtype(asked: str, adapters: Sequence[Path], preferred: torch.dtype) -> torch.dtype:
    if asked != "auto":
        return getattr(torch, asked)
    known = ("bfloat16", "float16", "float32")
    trained = {name: str(record.device.get("dtype")) for name, record in _records(adapters).items()}
    found = {name: dtype for name, dtype in trained.items() if dtype in known}
    _same("dtype", found, "--dtype")
    return getattr(torch, next(iter(found.values()))) if found else preferred

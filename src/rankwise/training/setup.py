"""Load everything that a run needs into memory: rows, model, adapter, new tokens, and check it. Nothing is written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rankwise.acceleration import give_back_freed_memory, restore
from rankwise.adapters import has_adapter, plan_adapter, remove_adapter
from rankwise.adapters.base_layer import dequantizer
from rankwise.adapters.checkpoint import load_adapter, read_adapter
from rankwise.adapters.folder import WEIGHTS_FILE, labels_of, read_folder, tokenizer_with_rows
from rankwise.adapters.select import with_heads
from rankwise.adapters.switch import keep_reference
from rankwise.compat.transformers import before_weights
from rankwise.config import RunOptions, TrainSettings, keeps_file_bits
from rankwise.constants import TEMPLATE_FILE
from rankwise.data import Encoded, Rows, encode_rows, limited, read_rows, read_template, warn_of_overlap
from rankwise.data.objectives import ANSWER_IDS, formats_of, labels_in
from rankwise.data.templates import renderer
from rankwise.errors import AdapterError, ConfigError, DataError, RunError, heard, some_of, warn
from rankwise.foreign import Fields, JsonObject, sha256_of
from rankwise.labels import Labels
from rankwise.lora_config import ADAPTER, LoraConfig
from rankwise.methods import METHODS, either, kinds, method_of, methods_with
from rankwise.models import ModelSource, choose_device, fetch_model, load_skeleton, model_facts
from rankwise.models.device import DeviceChoice
from rankwise.models.load import keeps_mxfp4, load_tokenizer, names_chat_template, table_rows
from rankwise.models.prepared import is_quantized, load_prepared, user_cache
from rankwise.models.source import weights_files
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.options import flag
from rankwise.quantization.config import CONFIGS, FileConfig, FourBitConfig
from rankwise.quantization.linear import Linear4bit
from rankwise.records import record_of
from rankwise.training import ranks, step
from rankwise.training.batches import longest_row
from rankwise.training.parts import Base, Given, Reading
from rankwise.training.states import seed_all
from rankwise.training.weights import shard_before_loading

CALIBRATION_ROWS, CALIBRATION_TOKENS = 8, 256


@dataclasses.dataclass(frozen=True)
class Texts:
    """The rows of a run as they were read."""

    rows: Rows
    eval_rows: Rows | None
    # Jinja source of --chat-template.
    template: str | None
    # Those of the head; None for a language model.
    labels: Labels | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """The encoded rows of a run, and their description for the record."""

    train: Encoded
    evaluation: Encoded | None
    texts: Texts
    # The tokens at which rows were cut.
    max_length: int
    # Further entries of the record about the training data.
    notes: Fields = dataclasses.field(default_factory=dict)

    def describe(self) -> dict[str, JsonObject]:
        """{"train": ..., "eval": ...}: the source of each set, its sha256 and the counts of its rows."""
        described = {"train": {**_described(self.texts.rows, self.train), **self.notes}}
        texts = self.texts
        if texts.template is not None:
            described["train"]["chat_template_sha256"] = hashlib.sha256(texts.template.encode()).hexdigest()
        if self.evaluation is not None and texts.eval_rows is not None:
            described["eval"] = _described(texts.eval_rows, self.evaluation)
        return described


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoadedBase:
    """A model ready to train, and how it was loaded."""

    source: ModelSource
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    # The dtype in which the model computes, and that of mixed precision, if its weights have another one.
    dtype: torch.dtype
    autocast: torch.dtype | None
    device_reason: str
    # For the record; those of the model as it was loaded, before it gets new tokens.
    facts: JsonObject


def read_data(reading: Reading, objective: ObjectiveName, adapter: Path | None) -> Texts:
    """The rows of both sets, the chat template, and labels if these are learned. Raises DataError as the readers do.

    A source with several splits gives ``train`` for training and ``validation`` for evaluation.
    """
    template = None if reading.chat_template is None else read_template(reading.chat_template)
    named = {"prompt_column": reading.prompt_column, "completion_column": reading.completion_column}
    formats = formats_of(objective, **named)
    # The formats of an objective define its columns.
    columns = named if formats is None else {}
    options: JsonObject = {**columns, "skip_bad_rows": reading.skip_bad_rows, "formats": formats}
    rows = read_rows(reading.data, split="train", **options)
    eval_rows = None
    if reading.eval_data is not None:
        eval_rows = limited(read_rows(reading.eval_data, split="validation", **options), reading.eval_limit)
        warn_of_overlap(rows, eval_rows)
    return Texts(rows, eval_rows, template, labels_to_learn(rows, adapter) if OBJECTIVES[objective].of_labels else None)


def labels_to_learn(rows: Rows, adapter: Path | None) -> Labels:
    """The labels of the rows. Raises ConfigError (RW764) if the adapter to continue answers with others."""
    labels = labels_in(rows)
    trained = None if adapter is None else labels_of(adapter)
    if adapter is not None and trained != labels:
        has = "writes text" if trained is None else f"answers with {some_of(trained.names)} ({trained.problem})"
        raise ConfigError(
            "RW764",
            f"--adapter {adapter} {has}, and the labels of {rows.source} are {some_of(labels.names)} "
            f"({labels.problem}); give data with its labels, or leave --adapter out.",
        )
    return labels


def check_template(base: Base, texts: Texts, tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Raise DataError (RW210) for chat rows without a template, before the weights are read. ``tokenizer``: that of a
    model in memory.
    """
    if tokenizer is not None:
        renderer(texts.rows, tokenizer, texts.template)
        return
    remote: JsonObject = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    if texts.rows.kind != "chat" or texts.template or base.adapter or names_chat_template(base.model, **remote):
        return
    if (tokenizer := load_tokenizer(base.model, **remote)) is not None:
        renderer(texts.rows, tokenizer, None)


def encode_data(
    reading: Reading,
    tokenizer: PreTrainedTokenizerBase,
    texts: Texts,
    encode: Callable[..., Encoded] = encode_rows,
) -> Data:
    """Encode both sets to token ids, with ``encode`` or as demonstrations.

    The tokenizer gets the given chat template and is saved with the run, so that other programs format prompts as in
    training.
    """
    if texts.template is not None:
        tokenizer.chat_template = texts.template
    encode = functools.partial(
        encode,
        tokenizer=tokenizer,
        max_length=reading.max_length,
        **({} if texts.template is None else {"chat_template": texts.template}),
        skip_bad_rows=reading.skip_bad_rows,
    )
    train = encode(texts.rows, name="train")
    evaluation = None if texts.eval_rows is None else encode(texts.eval_rows, name="eval")
    return Data(train, evaluation, texts, reading.max_length)


def other_hashes(adapter: Path | None, added: str | None) -> dict[str, str]:
    """The sha256 of the files, other than data and base model, with which a run must be resumed: the
    ``adapter`` that it continues, and the tokens that it ``added``."""
    found = {}
    if adapter is not None:
        found["adapter_sha256"] = sha256_of(adapter / WEIGHTS_FILE)
    if added is not None:
        found["new_tokens_sha256"] = hashlib.sha256("\n".join(new_tokens(added)).encode()).hexdigest()
    return found


def quantization_for(method: str, options: RunOptions, model: str) -> FourBitConfig | None:
    """The config of the method's packed base, None if the base is dense. Defaults: NF4 with double quantization (QLoRA,
    section 3); the file's own bits for a GGUF."""
    if not method_of(method).four_bits:
        on_cpu, is_file = choose_device(options.device).device == "cpu", model.lower().endswith(".gguf")
        return FileConfig() if keeps_file_bits(options.base_bits, method, is_file=is_file, on_cpu=on_cpu) else None
    return CONFIGS[options.quant_type](block_size=options.block_size, double_quant=options.double_quant)


def check_model(
    source: ModelSource, base: Base, config: LoraConfig, model: PreTrainedModel | None = None
) -> PreTrainedConfig:
    """The config of the model, which may be in memory. Raises what it alone decides, before the weights are there: no
    model of a known kind, an adapter that does not fit it."""
    skeleton = load_skeleton(source, trust_remote_code=base.trust_remote_code) if model is None else model
    on = choose_device(base.device).device
    if base.strategy == "fsdp" and keeps_mxfp4(vars(skeleton.config), on):
        raise ConfigError(
            "RW112",
            f"--strategy fsdp parts the base's weights, and the experts of {source.name} stay in their files in MXFP4; "
            "leave it out.",
        )
    if not method_of(base.method).has_adapter:
        return skeleton.config
    # The loaded model gives the warnings again.
    with heard(lambda warning: False):
        if base.adapter is not None:
            read_adapter(skeleton, base.adapter)
        else:
            plan_adapter(skeleton, with_heads(skeleton, config))
    return skeleton.config


def load_for_training(
    base: Base, source: ModelSource, trained_whole: Sequence[str] = (), given: Given | None = None
) -> LoadedBase:
    """The base model on its device in the dtype that the method needs, with a head of its ``source``'s labels: loaded,
    or the one that is ``given``. ``trained_whole``: as of ``_read_weights``."""
    model, tokenizer = (None, None) if given is None else (given.model, given.tokenizer)
    if model is None:
        choice = choose_device(base.device, base.dtype)
    else:
        choice = DeviceChoice(str(model.device), model.dtype, "where the model in memory is")
    where = torch.device(choice.device)
    weights, autocast = step.mixed_precision(base.method, choice.dtype, where.type)
    source = fetch_model(source, trust_remote_code=base.trust_remote_code)
    if model is None:
        model, tokenizer = _read_weights(base, source, where, weights, trained_whole)
        # Preparing a base leaves hundreds of MB in the heap.
        give_back_freed_memory()
    if tokenizer is None:
        raise ConfigError("RW115", f"{base.model} has no tokenizer, which training needs; add its tokenizer files.")
    if base.adapter is not None:
        tokenizer = tokenizer_with_rows(base.adapter, tokenizer)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    facts = model_facts(model, source)
    return LoadedBase(
        source=source,
        model=model,
        tokenizer=tokenizer,
        device=where,
        dtype=choice.dtype,
        autocast=autocast,
        device_reason=choice.reason,
        facts=facts,
    )


def _read_weights(
    base: Base, source: ModelSource, where: torch.device, dtype: torch.dtype, trained_whole: Sequence[str]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | None]:
    """Load the model and its tokenizer. With --strategy fsdp, only this process's rows are read where the file format
    permits it, but of the modules ``trained_whole``."""
    if source.kind == "gguf" and method_of(base.method).four_bits:
        warn(
            "RW179",
            f"{base.model} has bits of its own, which --method {base.method} expands and rounds again: loss is paid "
            "twice, for a base that nobody serves; lora and dora train over the file itself.",
        )
    if source.labels is not None:
        # A new head is random.
        seed_all(base.seed)
    by_rows: AbstractContextManager[None] = nullcontext()
    if base.strategy == "fsdp" and not is_quantized(source) and (base.cache is None or base.quantization is None):
        # The processes read the files together, so they must find the same tensors.
        ranks.check_alike(
            {"the files of the model": {path.name: path.stat().st_size for path in weights_files(source)}}
        )
        shard = functools.partial(shard_before_loading, device_type=where.type, trained_whole=trained_whole)
        by_rows = before_weights(functools.partial(shard, trains_all=method_of(base.method).trains_all))
    reads_rows = not isinstance(by_rows, nullcontext)
    with by_rows:
        return load_prepared(
            source,
            dtype=dtype,
            device=str(where),
            quantization=base.quantization,
            trust_remote_code=base.trust_remote_code,
            # A prepared base holds whole weights.
            cache=base.cache if reads_rows else base.cache or user_cache(str(where), mapped=base.mmap),
            mapped=base.mmap,
        )


# Options of loading, which a model in memory has behind it; and tokens, for which its tables would have to grow.
OF_LOADING = (
    *("revision", "trust_remote_code", "device", "dtype", "quant_type", "block_size", "double_quant", "base_bits"),
    *("cache", "mmap", "strategy", "devices", "new_tokens"),
)


def in_memory(asked: TrainSettings, given: Given) -> ModelSource:
    """The source of a model in memory. Raises ConfigError (RW112, RW115) for one that this run cannot adapt."""
    model = given.model
    assert model is not None
    if given.tokenizer is None:
        raise ConfigError("RW115", "a model in memory comes without its tokenizer; give tokenizer=TOKENIZER too.")
    row, has_four_bits = method_of(asked.method), any(isinstance(part, Linear4bit) for part in model.modules())
    usual = asked.defaults()
    problems = [f"{name} is for a model that is loaded" for name in OF_LOADING if getattr(asked, name) != usual[name]]
    problems += ["it has an adapter, which rw.remove_adapter(model) takes off"] if has_adapter(model) else []
    if row.four_bits != has_four_bits and not (has_four_bits and row.has_adapter):
        problems.append(f"--method {asked.method} does not go with its {'4-bit' if has_four_bits else 'dense'} layers")
    if row.trains_all and model.dtype != torch.float32:
        problems.append(f"--method full trains float32 weights, and its are {model.dtype}")
    if OBJECTIVES[asked.objective].of_labels:
        problems.append("--objective classify makes the head of a model that it loads")
    if problems:
        raise ConfigError(
            "RW112", f"the model in memory cannot train so: {'; '.join(problems)}. Give its name instead."
        )
    return ModelSource(
        kind="memory", name=asked.model, path=None, base_model=str(model.config.name_or_path or asked.model)
    )


@contextlib.contextmanager
def lent(model: PreTrainedModel | None) -> Iterator[None]:
    """A context in which a model in memory trains. After an error it computes as before, without its adapter, so that
    the same call can resume.
    """
    try:
        yield
    except BaseException:
        if model is not None:
            restore(model)
            with contextlib.suppress(AdapterError):
                while has_adapter(model):
                    remove_adapter(model)
        raise


def make_trainable(
    model: PreTrainedModel, base: Base, config: LoraConfig, sha256: str, *, keeps_reference: bool, is_resumed: bool
) -> int:
    """Give the model the method's adapter, new or from ``--adapter``, or for ``full`` unfreeze the model. Returns the
    number of trained parameters.

    ``sha256``: that of the base's weights; ``keeps_reference``: a continued adapter has a frozen copy.
    """
    if base.adapter is not None:
        return _continue_adapter(model, base, base.adapter, sha256, keeps_reference=keeps_reference)
    seed_all(base.seed)
    if base.method not in kinds() and any(dequantizer(module) is not None for module in model.modules()):
        raise ConfigError(
            "RW181",
            f"{base.model} holds weights that another library quantized, which --method {base.method} does not "
            f"support; take {either(kinds())}, or the dense checkpoint.",
        )
    return step.make_trainable(model, base.method, config, is_resumed=is_resumed)


def calibration_ids(dataset: Dataset, max_length: int, model: PreTrainedModel) -> torch.Tensor:
    """The first training rows, end to end: (1, L). Prompts come with their answers."""
    first = dataset[:CALIBRATION_ROWS]
    columns = [first[name] for name in ("input_ids", "prompt_ids", *ANSWER_IDS) if name in first]
    ids = list(itertools.chain.from_iterable(itertools.chain.from_iterable(zip(*columns))))
    most = min(max_length, CALIBRATION_TOKENS, table_rows(model) or CALIBRATION_TOKENS)
    return torch.tensor([ids[:most]], device=model.device)


def _described(rows: Rows, encoded: Encoded) -> JsonObject:
    place = {
        "source": rows.source,
        "format": rows.format,
        "prompt_ending": rows.prompt_ending,
        "sha256": rows.sha256,
    }
    return place | {key: value for key, value in dataclasses.asdict(encoded.report).items() if key != "name"}


def with_adapters_options(given: TrainSettings) -> TrainSettings:
    """The settings with the options of the adapter that ``--adapter`` names, and the chat template of its run where one
    was given; unchanged without ``--adapter``.

    Raises AdapterError (RW409, RW410) for an adapter that cannot be read, ConfigError: RW764 for options that differ
    from the adapter's, or for a method that does not train adapters of its kind, RW112 for new tokens with shards.
    """
    if given.adapter is None:
        return given
    config, _ = read_folder(given.adapter)
    methods = methods_with(kind=config.kind)
    if given.method not in methods:
        raise ConfigError(
            "RW764",
            f"--adapter {given.adapter} is {METHODS[config.kind].words}, which --method {given.method} does "
            f"not train; give {either(methods)}.",
        )
    if given.strategy == "fsdp" and config.token_rows:
        raise ConfigError(
            "RW112",
            f"--adapter {given.adapter} has new tokens, which need whole weights, and --strategy fsdp does not read "
            "these; take ddp.",
        )
    own = {name: getattr(config, name) for name in ADAPTER}
    asked = given.model_fields_set
    odd = [flag(name) for name, value in own.items() if name in asked and _plain(getattr(given, name)) != _plain(value)]
    if odd:
        raise ConfigError(
            "RW764", f"{', '.join(odd)}: --adapter {given.adapter} has its own value; leave the option out."
        )
    record = record_of(given.adapter)
    if given.chat_template is None and record is not None and record.settings.get("chat_template"):
        own["chat_template"] = given.adapter / TEMPLATE_FILE
    return given.model_copy(update=own)


def _continue_adapter(model: nn.Module, base: Base, adapter: Path, base_sha256: str, *, keeps_reference: bool) -> int:
    """Load the adapter to continue, and a frozen copy where the objective needs it as the reference. Returns the number
    of trained parameters.

    Raises ConfigError (RW764) for an adapter trained on a different base, AdapterError for one that does not fit.
    """
    if (record := record_of(adapter)) is not None:
        trained_on = record.base_model.get("sha256")
        if trained_on not in (None, base_sha256):
            raise ConfigError(
                "RW764",
                f"--adapter {adapter} was trained on a different base than --model {base.model} (their sha256 "
                "differ); give the model that its run.json names.",
            )
    report = load_adapter(model, adapter)
    if keeps_reference:
        keep_reference(model)
    return report.trainable_parameters


def _plain(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value


def new_tokens(given: str) -> list[str]:
    """The lines of the file that ``--new-tokens`` names, or its comma-separated parts. Raises ConfigError (RW787)."""
    try:
        lines = Path(given).read_text(encoding="utf-8").splitlines() if Path(given).is_file() else given.split(",")
    except (OSError, ValueError) as error:
        raise ConfigError("RW787", f"--new-tokens {given} cannot be read: {error}.") from None
    tokens = [line.strip() for line in lines if line.strip()]
    if not tokens or len(set(tokens)) < len(tokens):
        count = f"{len(tokens)} tokens, {len(set(tokens))} of them different"
        raise ConfigError("RW787", f"--new-tokens {given} names {count}; name at least one, and each once.")
    return tokens


@torch.no_grad()
def add_new_tokens(model: Any, tokenizer: Any, tokens: list[str], config: LoraConfig) -> LoraConfig:
    """Add ``tokens`` to tokenizer, embedding and head. A new row is the mean of the rows of the tokens into which the
    text was split before; that of a token which the tokenizer has already stays. Returns the configuration with which
    the rows of all of them train.
    """
    vocabulary = tokenizer.get_vocab()
    pieces = [
        [vocabulary[token]] if token in vocabulary else tokenizer(token, add_special_tokens=False)["input_ids"]
        for token in tokens
    ]
    # A word of the vocabulary that was added once more would be split off everywhere.
    tokenizer.add_tokens([token for token in tokens if token not in vocabulary])
    ids = tokenizer.convert_tokens_to_ids(tokens)
    before = len(model.get_input_embeddings().weight)
    if max(ids) >= before:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    ends: dict[int, Any] = {}
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        if end is not None:
            # A tied head shares the embedding's rows.
            ends.setdefault(id(end.weight), end)
    for end in ends.values():
        W = end.weight
        for index, own in zip(ids, pieces):
            W[index] = (W[own] if own else W[:before]).float().mean(dim=0)
    names = {name for name, module in model.named_modules() if any(module is end for end in ends.values())}
    return dataclasses.replace(config, trainable_token_indices=dict.fromkeys(sorted(names), ids))


# Rows of a head are the same if they differ by less than this share of their norm, which 4 bits would leave of them.
SAME_ROWS, ROWS_AT_ONCE = 0.02, 4096


@torch.no_grad()
def warn_of_untrained_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, data: Data, config: LoraConfig) -> None:
    """Warn (RW787) of added tokens in the answers whose rows of the head equal other rows. Logits are h W^T, so tokens
    with the same row have the same logit whatever an adapter below the head makes of h: none is ever the likeliest.
    """
    import pyarrow.compute as pc

    rows, head = data.train.dataset, model.get_output_embeddings()
    if head is None or "labels" not in rows.column_names or any(p.requires_grad for p in head.parameters()):
        return
    labels = {*pc.unique(pc.list_flatten(rows.data.column("labels"))).to_pylist()}
    own = {index for rows in config.token_rows.values() for index in rows}
    ids = sorted(labels & tokenizer.added_tokens_decoder.keys() - own)
    W = head.weight
    if not ids or not W.is_floating_point():
        return
    asked, same = W[ids].float(), torch.zeros(len(ids), device=W.device)
    for part in W.split(ROWS_AT_ONCE):
        same += (torch.cdist(asked, part.float()) <= SAME_ROWS * asked.norm(dim=1, keepdim=True)).sum(dim=1)
    if found := [(tokenizer.convert_ids_to_tokens(index), int(n) - 1) for index, n in zip(ids, same) if n > 1]:
        names = ",".join(str(token) for token, _ in found)
        warn(
            "RW787",
            f"the rows train the model to write {names}, which it was never taught: the head has the same row for "
            f"{found[0][1]:,} other tokens, so an adapter alone cannot make it the likeliest. Give --new-tokens "
            f'"{names}" to train these rows as well, or a --chat-template without them.',
        )


def check_labels(data: Data) -> None:
    """Raise RunError (RW521) if no token is trained, DataError (RW213) if no row trains a stop token. Plain texts
    need none, and get a warning."""
    report, source = data.train.report, data.texts.rows.source
    if not report.trained_tokens:
        raise RunError(
            "RW521",
            f"none of the {report.tokens:,} label tokens in {source} is trained; raise --max-length so that answers "
            "are not cut off, or check with `rankwise preview` which tokens the template marks as the answer.",
        )
    if report.stop_token_rows:
        return
    text = (
        f"no label in {source} is a stop token, so the model would not learn to stop; raise --max-length if rows are "
        "cut, or use a chat template that trains the end of the turn."
    )
    if data.texts.rows.kind != "text":
        raise DataError("RW213", text)
    warn("RW213", text)


def check_positions(model: nn.Module, datasets: Iterable[Dataset], answer: int = 0) -> None:
    """Raise RunError (RW533) if an encoded row, with an answer of so many tokens, has more tokens than the model has
    learned positions."""
    rows = table_rows(model)
    if rows is None:
        return
    longest = max(map(longest_row, datasets)) + answer
    if longest > rows:
        raise RunError(
            "RW533",
            f"the longest row has {longest:,} tokens, and this {type(model).__name__} has learned positions for "
            f"{rows:,}; give --max-length {rows} or less.",
        )

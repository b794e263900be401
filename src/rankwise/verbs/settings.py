"""The settings tables of commands that have none elsewhere, and a first look at the paths that commands are given."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field

from rankwise.config import MODEL, ModelOptions, TextOptions
from rankwise.data.readers import IN_MEMORY
from rankwise.errors import ConfigError, RunError
from rankwise.evaluation.settings import LoadingOptions
from rankwise.foreign import Fields, JsonObject
from rankwise.objectives import ObjectiveName
from rankwise.options import (
    LARGEST_NUMBER,
    Batch,
    Length,
    Panel,
    Rank,
    Seed,
    Settings,
    SettingsT,
    Temperature,
    Tokens,
    Whole,
    comma_list,
    option,
    read_settings,
    text_list,
)
from rankwise.reports.comparison import BEST_FOLDER, REPORT_FILE

F = TypeVar("F", bound=Callable[..., Any])
DATA = "Hub id, folder, or .jsonl/.json/.csv/.tsv/.parquet/.txt file (also .gz)."
_option = functools.partial(option, Panel.OTHER)


class PreviewSettings(ModelOptions, TextOptions):
    """The options of ``rankwise preview``."""

    model: Annotated[str, option(Panel.MODEL, MODEL, metavar="M")]
    data: Annotated[str, option(Panel.MODEL, DATA, metavar="D")]
    objective: Annotated[
        ObjectiveName,
        _option(
            "sft: rows as `train` learns them; dpo, kto: preferences; grpo: prompts that are to be answered; classify: "
            "texts with labels."
        ),
    ] = "sft"
    max_completion_length: Annotated[Tokens, _option("grpo: longest answer, in tokens.")] = 256
    row: Annotated[Whole | None, _option("Row to show, counted from 0; default: the first good one.")] = None
    max_length: Annotated[Length, _option("Tokens per row; longer rows are cut and counted.")] = 1024
    skip_bad_rows: Annotated[
        Whole | None, _option("Stop if a file has more than N bad rows, as `train` would; default: never.")
    ] = None


class GenerateSettings(LoadingOptions):
    """The options of ``rankwise generate``."""

    adapter: Annotated[Path | None, _option("Run folder or PEFT adapter folder.", metavar="A")] = None
    model: Annotated[str | None, _option(f"{MODEL} Default: the base that the adapter names.", metavar="M")] = None
    system: Annotated[
        str | None, Field(min_length=1), _option("System message before each prompt and conversation.")
    ] = None
    temperature: Annotated[Temperature, _option("0: always the likeliest token; above 0: tokens are sampled.")] = 0.0
    top_p: Annotated[
        float, _option("Sample from the likeliest tokens whose probabilities add up to this.", gt=0, le=1)
    ] = 1.0
    seed: Annotated[Seed, _option("Seed of the sampling.")] = 0
    chat_template: Annotated[
        Path | None, _option("Jinja file that overrides the tokenizer's template.", metavar="FILE")
    ] = None

    prompt: Annotated[
        tuple[str, ...],
        BeforeValidator(text_list),
        _option("Text to answer; may be given several times.", repeated=True),
    ] = ()
    messages: Annotated[
        Path | None,
        _option(
            "Conversation to continue: a JSON list of {role, content}, or a chat row as in --data (also with tools), "
            "whose last answer is shown and not read; in a .jsonl file one on each line.",
            metavar="FILE",
        ),
    ] = None
    chat: Annotated[bool, _option("Talk turn by turn: answer each line that you type.")] = False
    compare: Annotated[bool, _option("Show base and tuned model side by side.")] = False
    max_new_tokens: Annotated[Tokens, _option("Longest answer, in tokens.")] = 128


class PredictSettings(LoadingOptions):
    """The options of ``rankwise predict``."""

    data: Annotated[str, _option(f"Rows with a `text`, and perhaps a `label`. {DATA}", metavar="D")]
    adapter: Annotated[Path | None, _option("Run folder or PEFT adapter folder.", metavar="A")] = None
    model: Annotated[
        str | None, _option("A model with a head of labels, or the base of the adapter, by its default.", metavar="M")
    ] = None
    batch_size: Annotated[Batch, _option("Rows answered at once.")] = 16
    max_length: Annotated[Length | None, _option("Tokens per row; default: as in training.")] = None
    skip_bad_rows: Annotated[Whole, _option("Leave out up to N bad rows; with more, stop.")] = 0


class BaseOptions(ModelOptions):
    """How the base of an adapter is loaded."""

    model: Annotated[str | None, _option("Base model; default: the one named by the adapter.", metavar="M")] = None
    revision: Annotated[
        str | None,
        option(Panel.LOADING, "Branch, tag or commit of a hub model. Default: the one trained on."),
    ] = None


class MergeSettings(BaseOptions):
    """The options of ``rankwise merge``."""

    adapter: Annotated[
        tuple[Path, ...],
        BeforeValidator(text_list),
        _option("Run folder or PEFT adapter folder; with --combine several.", metavar="A", repeated=True, min_length=1),
    ]
    output: Annotated[Path, _option("Folder to write the merged model to. It must be new or empty.", metavar="DIR")]
    combine: Annotated[
        Literal["linear", "cat", "svd"] | None,
        _option("Combine several adapters into one adapter, and write that instead of a merged model."),
    ] = None
    weights: Annotated[
        tuple[Annotated[float, Field(le=LARGEST_NUMBER)], ...] | None,
        BeforeValidator(comma_list),
        _option("With --combine, a weight for each adapter: 0.7,0.3. Default: equal ones that sum to 1."),
    ] = None
    rank: Annotated[
        Rank | None, _option("With --combine svd, the rank to write; default: the largest rank of the adapters.")
    ] = None
    onto: Annotated[
        Literal["original", "quantized"] | None,
        _option(
            "Weights to merge into: the original ones, or the dequantized 4-bit weights on which the adapter was "
            "trained. Default: original; with --verify, whichever stays closer to the trained model."
        ),
    ] = None
    verify: Annotated[bool, _option("Measure how far each way of merging moves the model, and record it.")] = False
    data: Annotated[
        str | None,
        _option(f"Rows to measure on with --verify; default: the run's own. {DATA}", metavar="D"),
    ] = None


class ExportSettings(BaseOptions):
    """The options of ``rankwise export``."""

    adapter: Annotated[Path, _option("Run folder or PEFT adapter folder.", metavar="A")]
    target: Annotated[
        Literal["vllm", "sglang", "llama.cpp", "ollama", "peft"],
        _option("Program that will read the export.", alias="for"),
    ]
    output: Annotated[Path, _option("Folder to write to. It must be new or empty.", metavar="DIR")]
    rank: Annotated[Rank | None, _option("Rank to write; default: the adapter's own.")] = None
    max_error: Annotated[
        float | None,
        _option(
            "Largest relative error of the update. The smallest rank is written that has no larger error and that "
            "keeps the perplexity of held-out rows. Default for DoRA, whose update has full rank: 0.05.",
            gt=0,
            lt=1,
        ),
    ] = None
    data: Annotated[
        str | None, _option(f"Rows to measure that error on; default: the run's own. {DATA}", metavar="D")
    ] = None
    merged: Annotated[bool, _option("Write the whole model with the adapter merged in, instead of the adapter.")] = (
        False
    )
    base_gguf: Annotated[Path | None, _option("GGUF of the base, for llama.cpp and Ollama.")] = None
    verify: Annotated[
        bool,
        _option("Start the server on the export and on the base, and compare its answers with the trained model's."),
    ] = False
    server_python: Annotated[Path | None, _option("Python that has xllamacpp or vLLM, for --verify.")] = None


class InspectSettings(Settings):
    """The options of ``rankwise inspect``."""

    folder: Annotated[Path, _option("Adapter, run or model folder.", metavar="FOLDER", argument=True)]
    model: Annotated[str | None, _option("Base model: say whether the adapter fits it.", metavar="M")] = None


# --- options as keywords of Python ---


def takes(kind: type[Settings]) -> Callable[[F], F]:
    """Show the options of ``kind`` in the signature of a function that takes them as keywords."""

    def shown(function: F) -> F:
        signature = inspect.signature(function)
        own = [one for one in signature.parameters.values() if one.kind is not inspect.Parameter.VAR_KEYWORD]
        usual, keyword = kind.defaults(), inspect.Parameter.KEYWORD_ONLY
        options = [
            inspect.Parameter(n, keyword, default=usual.get(n, inspect.Parameter.empty)) for n in kind.model_fields
        ]
        options.sort(key=lambda one: (one.default is not inspect.Parameter.empty, one.name not in ("model", "method")))
        function.__signature__ = signature.replace(parameters=[*options, *own])  # type: ignore[attr-defined]
        return function

    return shown


def settings_of(kind: type[SettingsT], options: Fields, earlier: Callable[[Fields], Fields] | None = None) -> SettingsT:
    """The settings of keywords. Raises ConfigError (RW103) as the command line does."""
    given = {name: os.fspath(value) if isinstance(value, os.PathLike) else value for name, value in options.items()}
    return read_settings(kind, None, given, earlier)


def apart(options: Fields, tokenizer: object) -> tuple[JsonObject, Any, JsonObject]:
    """Keywords with words in place of what is in memory, the model there, and {name: rows} of the data there.

    Raises ConfigError: RW112 for a ``tokenizer`` beside a model that is named, RW103 and RW115 for what is neither.
    """
    names = ("model", "data", "eval_data")
    held = {name: options[name] for name in names if not isinstance(options.get(name), str | os.PathLike | None)}
    model = held.pop("model", None)
    if tokenizer is not None and model is None:
        raise ConfigError("RW112", "tokenizer goes with a model in memory, and a named one has its own; leave it out.")
    if model is not None and not (hasattr(model, "config") and hasattr(model, "modules")):
        kind = type(model).__name__
        raise ConfigError("RW103", f"model is a {kind}; give a name, a folder, a .gguf file or a transformers model.")
    if tokenizer is not None:
        check_tokenizer(tokenizer)
    words = dict.fromkeys(held, IN_MEMORY)
    return {**options, **words, **({} if model is None else {"model": "a model in memory"})}, model, held


def check_tokenizer(tokenizer: object) -> None:
    """Raise ConfigError (RW115) for what is no tokenizer, such as its name."""
    if not hasattr(tokenizer, "chat_template"):
        kind = type(tokenizer).__name__
        raise ConfigError("RW115", f"tokenizer is a {kind}; give the tokenizer that rw.load_model returns.")


# --- checks before a command loads torch and transformers, which takes seconds ---


def check_paths(*, model: str | None, data: Iterable[str | None] = (), output: Path | None = None) -> None:
    """Raise the errors that reading would raise for missing files: DataError (RW201), ModelError (RW301, RW302, RW311).

    Raises RunError (RW503) for an ``output`` that cannot be written.
    """
    from rankwise.data import check_there
    from rankwise.models.folder import read_config
    from rankwise.models.source import resolve_model
    from rankwise.records import check_writable

    if output is not None:
        check_writable(output)
    for source in data:
        if source is not None:
            check_there(source)
    if model is None:
        return
    found = resolve_model(model)
    if found.kind == "folder" and found.path is not None:
        read_config(found.path)


def refuse_comparisons(folders: Iterable[Path]) -> None:
    """Raise RunError (RW560) for the folder of a comparison where a run's is expected."""
    for folder in folders:
        if (folder / REPORT_FILE).is_file() and not (folder / "adapter_config.json").is_file():
            best = folder / BEST_FOLDER
            where = f"give the run that it recommends, {best}" if best.is_dir() else f"give one of {folder / 'runs'}"
            raise RunError("RW560", f"{folder} is the folder of a comparison; {where}.")

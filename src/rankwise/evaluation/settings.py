"""What a user can set for ``rankwise evaluate``."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator

from rankwise.config import BaseBits, Device, Dtype, ModelOptions
from rankwise.errors import ConfigError
from rankwise.options import Batch, Count, Length, Panel, Whole, comma_list, option, text_list


def task_list(value: Any) -> Any:
    """One name, names with commas between them, or a list of such."""
    items = (value,) if isinstance(value, str) else value
    if not isinstance(items, list | tuple):
        return value
    return tuple(name for item in items for name in (comma_list(item) if isinstance(item, str) else (item,)))


_measured = functools.partial(option, Panel.MEASURED)
_prompts = functools.partial(option, Panel.PROMPTS)
_loading = functools.partial(option, Panel.LOADING)


class LoadingOptions(ModelOptions):
    """How a model that was trained is loaded."""

    dtype: Annotated[
        Dtype, _loading("Dtype of the base; auto: as the adapter was trained, else what suits the device.")
    ] = "auto"
    quantization: Annotated[
        Literal["auto", "none", "nf4", "fp4"], _loading("4-bit layers or not; auto: as the adapter was trained.")
    ] = "auto"
    base_bits: Annotated[
        BaseBits,
        _loading(
            "A GGUF base in the file's own bits (file), or expanded (16). Default: as the adapter was trained; without "
            "one, file for a .gguf on a CPU.",
            metavar="file|16",
        ),
    ] = None
    device: Annotated[Device, _loading("Device; auto takes a CUDA GPU, else the CPU.")] = "auto"
    mmap: Annotated[bool, _loading("On a CPU, read weights from mapped files; --no-mmap copies them into memory.")] = (
        True
    )


class EvaluateSettings(LoadingOptions):
    """The options of ``rankwise evaluate``, and the keys of its ``--config`` file."""

    task: Annotated[
        tuple[str, ...],
        BeforeValidator(task_list),
        _measured(
            "perplexity, any task of lm-evaluation-harness, or with `rankwise-article` e2e, gsm8k and vicuna; may be "
            "given several times.",
            metavar="NAME",
            repeated=True,
            min_length=1,
        ),
    ]
    model: Annotated[
        str | None,
        _measured("Hub id, folder, .gguf file, or `demo`. Default: the base that the adapter names.", metavar="M"),
    ] = None
    adapter: Annotated[
        tuple[Path, ...],
        BeforeValidator(text_list),
        _measured(
            "Run folder or PEFT adapter folder; several are evaluated beside their base.", metavar="A", repeated=True
        ),
    ] = ()
    base: Annotated[
        bool | None, _measured("Evaluate the base model, too; default: only if several adapters are given.")
    ] = None
    data: Annotated[
        tuple[str, ...],
        BeforeValidator(text_list),
        _measured(
            "File, folder or hub id with the task's data; TASK=DATA gives one task data of its own.",
            metavar="[TASK=]D",
            repeated=True,
        ),
    ] = ()
    output: Annotated[
        Path | None,
        _measured(
            "Folder for results and predictions; default: one under `evaluations`, named by the settings.",
            metavar="DIR",
        ),
    ] = None
    limit: Annotated[Count | None, _measured("Only the first N questions of each task.")] = None
    overwrite: Annotated[bool, _measured("Replace the results in --output.")] = False
    set: Annotated[
        tuple[str, ...],
        BeforeValidator(text_list),
        _measured(
            "Option of a task that is not lm-evaluation-harness's; may be given several times.",
            metavar="NAME=VALUE",
            repeated=True,
        ),
    ] = ()

    num_fewshot: Annotated[
        Whole | None,
        _prompts("Worked examples in front of each question; default: the task's own number."),
    ] = None
    fewshot_data: Annotated[
        str | None, _prompts("Data that the worked examples are taken from, in the form of --data.", metavar="D")
    ] = None

    chat_template: Annotated[
        Path | None, _prompts("Jinja file that overrides the tokenizer's template.", metavar="FILE")
    ] = None

    max_length: Annotated[
        Length | None,
        option(Panel.PERPLEXITY, "perplexity: tokens per row; default: as the adapters were trained, else 1024."),
    ] = None

    prompt_column: Annotated[str | None, option(Panel.PERPLEXITY, "perplexity: column with the prompt.")] = None
    completion_column: Annotated[str | None, option(Panel.PERPLEXITY, "perplexity: column with the completion.")] = None

    batch_size: Annotated[
        Batch | None, _loading("Largest batch, in sequences; default: as many as a fixed number of tokens holds.")
    ] = None

    def data_of(self, task: str) -> str | None:
        """The data given for one task: ``TASK=DATA`` before data for all. Raises as ``split_data``."""
        named, common = split_data(self.data, self.task)
        return named.get(task, common)


def split_data(data: tuple[str, ...], tasks: tuple[str, ...]) -> tuple[Mapping[str, str], str | None]:
    """``("e2e=a.csv", "b.jsonl")`` -> ({"e2e": "a.csv"}, "b.jsonl"). A path with ``=`` stays one.

    Raises ConfigError (RW112) if two are given for the same tasks, or one for none of them.
    """
    named: dict[str, str] = {}
    common: list[str] = []
    for item in data:
        name, equals, place = item.partition("=")
        if not equals or name not in tasks:
            common.append(item)
        elif name in named:
            raise ConfigError("RW112", f"--data {name}= is given twice, {named[name]} and {place}; give one.")
        else:
            named[name] = place
    if len(common) > 1:
        raise ConfigError(
            "RW112", f"--data is given {len(common)} times for all tasks ({', '.join(common)}); give one, or TASK=DATA."
        )
    if common and set(tasks) <= set(named):
        raise ConfigError("RW112", f"--data {common[0]} is for no task: each has data of its own. Leave it out.")
    return named, next(iter(common), None)

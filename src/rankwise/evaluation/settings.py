"""What a user can set for ``rankwise evaluate``, and the tasks with their data that follow from it.

lm-evaluation-harness and torch are imported only if a task needs them.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator

from rankwise.config import BaseBits, Device, Dtype, ModelOptions
from rankwise.errors import ConfigError
from rankwise.evaluation.tasks.names import check_tasks, given_by_set, own_options, task_type
from rankwise.options import Batch, Count, Length, Panel, Whole, comma_list, flag, option, text_list

if TYPE_CHECKING:
    from rankwise.evaluation.tasks.base import Task

# Options that not every task uses.
BY_PERPLEXITY = ("max_length", "prompt_column", "completion_column", "chat_template")
BY_HARNESS = ("num_fewshot", "fewshot_data")


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


# --- tasks with their data ---


def make_tasks(settings: EvaluateSettings, rows: Any = None) -> list[Task]:
    """The requested tasks with their data; ``rows`` in memory are those of perplexity. Raises as ``make_task``, and
    RW112 for an option that no task uses.
    """
    if rows is not None and settings.task != ("perplexity",):
        raise ConfigError("RW112", "rows in memory are for --task perplexity alone; give other tasks a file.")
    duplicates = sorted({name for name in settings.task if settings.task.count(name) > 1})
    if duplicates:
        raise ConfigError("RW112", f"--task {', '.join(duplicates)} is given twice; once is enough.")
    check_options(settings)
    return [make_task(name, settings) if rows is None else _perplexity(settings, rows) for name in settings.task]


def check_options(settings: EvaluateSettings) -> None:
    """Raise ConfigError (RW112) for options that none of the tasks uses."""
    fields, own = EvaluateSettings.model_fields, given_by_set(settings)
    asked = [name for name in (*BY_PERPLEXITY, *BY_HARNESS) if getattr(settings, name) != fields[name].default]
    if not asked and not own:
        return
    used = {option for name in settings.task for option in _used(name, settings)}
    ignored = [flag(name) for name in asked if name not in used]
    ignored += [f"--set {name}" for name in own if name not in used]
    if ignored:
        known = ", ".join(sorted({*used} - {*BY_PERPLEXITY, *BY_HARNESS})) or "nothing"
        given = f"{' and '.join(ignored)}; leave it out (--set takes {known} here)"
        raise ConfigError("RW112", f"--task {', '.join(settings.task)} would ignore {given}.")


def _used(name: str, settings: EvaluateSettings) -> Collection[str]:
    kind = task_type(name)
    if name == "perplexity" or kind is None:
        return BY_PERPLEXITY if name == "perplexity" else BY_HARNESS
    return kind.uses(name, settings, own_options(kind, settings))


def make_task(name: str, settings: EvaluateSettings) -> Task:
    """The task ``name`` with its data read.

    Raises ConfigError: RW150 data that must be given, RW112 options that do not go together, RW153 a missing package,
    RW154 no such task; DataError (RW251) for data that do not fit.
    """
    data, kind = settings.data_of(name), task_type(name)
    if name == "perplexity":
        if data is None:
            raise ConfigError("RW150", "--task perplexity needs data; give --data F with any file of rows.")
        return _perplexity(settings, data)
    if kind is not None:
        if kind.data is not None and data is None:
            raise ConfigError("RW150", f"--task {name} needs data; give --data F with {kind.data}.")
        return kind.make(name, settings, own_options(kind, settings))
    check_tasks([name])
    return harness_task(name, settings, data)


def _perplexity(settings: EvaluateSettings, data: Any) -> Task:
    from rankwise.data import read_rows
    from rankwise.evaluation.engine import max_length_of
    from rankwise.evaluation.tasks.rows import Perplexity

    columns = (settings.prompt_column, settings.completion_column)
    rows = read_rows(data, split="validation", prompt_column=columns[0], completion_column=columns[1])
    length = max_length_of(settings.adapter) if settings.max_length is None else settings.max_length
    return Perplexity(rows[: settings.limit], max_length=length)


def harness_task(name: str, settings: EvaluateSettings, data: str | None) -> Task:
    """The task ``name`` of lm-evaluation-harness."""
    from rankwise.evaluation.tasks.harness import HarnessTask

    return HarnessTask(
        name,
        data=data,
        fewshot_data=settings.fewshot_data,
        num_fewshot=settings.num_fewshot,
        limit=settings.limit,
    )

"""Options: their declaration in a settings table, and their values from the command line and a YAML file.

A field is ``name: Annotated[TYPE, option(Panel.X, "What it does.")] = DEFAULT``, with its bounds, its heading in
``--help``, and how text becomes its value. Imports no torch.
"""

from __future__ import annotations

import difflib
import enum
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, ValidationInfo
from pydantic_core import ErrorDetails

from rankwise.errors import ConfigError, one_line
from rankwise.foreign import Fields, JsonObject, deepest_faults, fault

ALL_LINEAR = "all-linear"

# Upper bounds, far above any real run, so that values and their products fit into 64 bits.
MANY = 10**9
Count = Annotated[int, Field(ge=1, le=MANY)]
Whole = Annotated[int, Field(ge=0, le=MANY)]
Batch = Annotated[int, Field(ge=1, le=2**16)]
LONGEST_ROW = 2**22
Length = Annotated[int, Field(ge=2, le=LONGEST_ROW)]
Tokens = Annotated[int, Field(ge=1, le=LONGEST_ROW)]
Rank = Annotated[int, Field(ge=1, le=2**16)]
# The seeds that NumPy accepts.
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
# Below the largest float32, 3.4e38.
LARGEST_NUMBER = 1e30
Positive = Annotated[float, Field(gt=0, le=LARGEST_NUMBER)]
NotNegative = Annotated[float, Field(ge=0, le=LARGEST_NUMBER)]
Share = Annotated[float, Field(ge=0, lt=1)]


class Panel(enum.StrEnum):
    """The headings of ``--help``, in display order. Each option belongs to one."""

    MODEL = "Model and data"
    TEXT = "Text of the rows"
    COMPARED = "What is compared"
    MEASURED = "What is measured"
    PROMPTS = "Prompts"
    PERPLEXITY = "Perplexity"
    OTHER = "Options"
    ADAPTER = "Adapter"
    FOUR_BITS = "Four bits (qlora, qdora)"
    TRAINING = "Training"
    OBJECTIVE = "Objective"
    DEVICE = "Device, memory and speed"
    SAVING = "Evaluating, saving, continuing"
    SURE = "How sure"
    FILES = "Files"
    LOADING = "Loading"


def option(
    panel: Panel,
    description: str,
    *,
    metavar: str | None = None,
    argument: bool = False,
    repeated: bool = False,
    **rules: Any,
) -> Any:
    """The pydantic ``Field`` of an option, with its help text. ``rules`` are keyword arguments of ``Field``.

    ``metavar`` stands for the value in the help, if the type is not clear. An ``argument`` is positional; a
    ``repeated`` option may be given several times.
    """
    shown: dict[str, Any] = {"panel": panel, "metavar": metavar, "argument": argument, "repeated": repeated}
    return Field(description=description, json_schema_extra=shown, **rules)


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, and keys may be spelled with hyphens."""

    # Validators are built at first use, since building all of them would slow down every --help. Infinity and NaN are
    # refused: no option means infinity, and NaN fails every comparison.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True, allow_inf_nan=False
    )
    # Options that a settings file may hold for another command, and that count only where they are given by themselves.
    only_given: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def defaults(cls, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """{option: default} of the options that have a default, as ``model_dump(mode="json")`` writes them; where it
        depends on other options, the default beside those of ``given``.
        """
        found = {
            name: field.get_default(call_default_factory=True, validated_data=dict(given or {}))
            for name, field in cls.model_fields.items()
            if not field.is_required()
        }
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def flag(name: str) -> str:
    """The flag of a field: ``--max-steps`` for ``max_steps``."""
    return f"--{name.replace('_', '-')}"


def option_words(name: str, value: object) -> list[str]:
    """The command-line words that set an option: ``["--r", "8"]``, ``["--no-fast"]``."""
    if isinstance(value, bool):
        return [flag(name if value else f"no_{name}")]
    return [flag(name), spelled(value)]


def spelled(value: object) -> str:
    """The text that the command line parses to ``value``: ``q_proj,v_proj``, ``c_attn=1:0:1``, ``0.0002``."""
    if isinstance(value, Mapping):
        return ",".join(f"{key}={_part(item)}" for key, item in value.items())
    return ",".join(map(_part, value)) if isinstance(value, list | tuple) else _part(value)


def _part(value: object) -> str:
    if isinstance(value, list | tuple):
        return ":".join(str(int(item)) for item in value)
    short = f"{value:g}" if isinstance(value, float) else str(value)
    return short if not isinstance(value, float) or float(short) == value else repr(value)


def from_text(parse: Callable[[Any], Any]) -> BeforeValidator:
    """A validator that applies ``parse`` to values of the command line and of YAML.

    Values of a dataclass that inherits the field, which ``foreign.wrong_fields`` checks with a context, are not parsed.
    """

    def read(value: Any, info: ValidationInfo) -> Any:
        return parse(value) if info.context is None else value

    return BeforeValidator(read)


def comma_list(value: Any) -> Any:
    """Split text at commas into a list; return any other value unchanged, for the type check."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    if isinstance(value, list):
        return tuple(value)
    return (value,) if isinstance(value, int | float) else value


def module_list(value: Any) -> Any:
    """Make a list of text with a comma or of a bare module name, which as a full-match regular expression would match
    almost nothing. Empty text gives the empty list.
    """
    is_text = isinstance(value, str) and (value == ALL_LINEAR or not ("," in value or re.fullmatch(r"\w*", value)))
    return value if is_text else comma_list(value)


def text_list(value: Any) -> Any:
    """Make a list of one from a single text or path, which may contain commas."""
    return (value,) if isinstance(value, str | Path) else value


def named_values(value: Any) -> Any:
    """Parse ``q_proj=4,v_proj=8`` into a mapping. A name may contain ``=``; one with a comma needs a YAML mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in comma_list(value)]
    if not all(name.strip() and item.strip() for name, _, item in pairs):
        raise ValueError("write NAME=VALUE, with commas between several")
    return {name.strip(): item.strip() for name, _, item in pairs}


def named_parts(value: Any) -> Any:
    """Parse ``c_attn=1:0:1`` into {name: list of switches}."""
    named = named_values(value)
    if not isinstance(named, Mapping):
        return named
    parts = {name: item.split(":") if isinstance(item, str) else item for name, item in named.items()}
    return {name: tuple(item) if isinstance(item, list) else item for name, item in parts.items()}


Temperature = Annotated[float, Field(ge=0, le=1000)]
# The temperature of sampling whose answers must differ.
WarmTemperature = Annotated[float, Field(gt=0, le=1000)]
Names = Annotated[Sequence[str], from_text(comma_list)]
# A list of names, or a regular expression.
Modules = Annotated[str | Sequence[str], from_text(module_list)]


# Option names of other tools and rankwise's names for them, for advice where an option does not exist.

OPTIONS: dict[str, tuple[str, ...]] = {
    "model": ("model-name-or-path", "model-name", "model-id", "model-path", "base-model", "pretrained-model"),
    "data": ("dataset", "dataset-name", "dataset-path", "data-path", "train-file", "train-data", "training-data"),
    "eval-data": ("eval-dataset", "eval-file", "validation-file", "validation-data", "valid-data", "test-file"),
    "output": ("output-dir", "out", "out-dir", "save-path", "save-dir"),
    "adapter": ("adapter-name-or-path", "adapter-path", "lora-path", "lora-weights", "peft-model"),
    "r": ("rank", "lora-r", "lora-rank"),
    "lora-alpha": ("alpha",),
    "lora-dropout": ("dropout",),
    "target-modules": ("targets", "lora-target", "lora-target-modules"),
    "learning-rate": ("lr",),
    "learning-rates": ("lr", "learning-rate"),
    "lr-scheduler-type": ("scheduler", "lr-scheduler", "schedule"),
    "batch-size": ("per-device-train-batch-size", "train-batch-size", "micro-batch-size", "per-device-batch-size"),
    "gradient-accumulation": ("gradient-accumulation-steps", "grad-accum", "accumulation-steps"),
    "epochs": ("num-train-epochs", "num-epochs"),
    "max-steps": ("steps", "num-steps", "iters"),
    "max-length": ("max-seq-length", "max-seq-len", "cutoff-len", "seq-len", "block-size"),
    "optimizer": ("optim",),
    "warmup-steps": ("warmup", "num-warmup-steps"),
    "devices": ("nproc-per-node", "num-processes", "num-gpus", "gpus", "world-size"),
    "dtype": ("torch-dtype", "precision", "bf16", "fp16"),
    "max-new-tokens": ("max-tokens",),
    "resume": ("resume-from-checkpoint",),
    "overwrite": ("overwrite-output-dir", "force"),
    "method": ("use-dora", "finetuning-type", "peft-type", "load-in-4bit"),
    "methods": ("method",),
    "task": ("tasks", "benchmark"),
    "objective": ("training-type", "stage", "rlhf-type"),
    "reward": ("reward-funcs", "reward-func", "reward-function", "rewards"),
    "num-generations": ("group-size", "num-samples"),
    "max-completion-length": ("max-new-tokens",),
}
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": ("adam", "adamw", "adamw_hf"),
    "adamw_bnb_8bit": ("adam8bit", "adamw8bit", "adam_8bit"),
    "paged_adamw_32bit": ("paged_adamw",),
    "lion_32bit": ("lion",),
}
# Similarity from which a name counts as a typing error of another; below it, names of other tools are ambiguous.
SLIP = 0.85


def close_names(
    name: str, known: Collection[str], table: dict[str, tuple[str, ...]], *, cutoff: float
) -> Sequence[str]:
    """The options in ``known`` that other tools call ``name``, by ``table`` ({ours: theirs}); else the most similar."""
    meant = [ours for ours, theirs in table.items() if name.lower() in theirs and ours in known]
    called = {other: ours for ours, theirs in table.items() if ours in known for other in theirs}
    slips = difflib.get_close_matches(name, called, n=1, cutoff=SLIP)
    alike = difflib.get_close_matches(name, sorted(known), n=3, cutoff=cutoff)
    return meant or list(dict.fromkeys([*(called[other] for other in slips), *alike]))


# --- values from the command line and the YAML file of --config ---


SettingsT = TypeVar("SettingsT", bound=Settings)


def read_settings(
    kind: type[SettingsT],
    file: Path | None,
    given: Fields,
    earlier: Callable[[Fields], Fields] | None = None,
) -> SettingsT:
    """Settings from a YAML ``file`` (keys are the long options), overridden by ``given`` from the command line.

    ``earlier`` takes both and returns values of lower priority, such as the settings of a run that is resumed.

    Raises ConfigError: RW102 for a file that cannot be read, RW103 with every wrong or unknown key in one message.
    """
    of_file = read_settings_file(file) if file else {}
    merged = {
        **{key: value for key, value in of_file.items() if key not in kind.only_given},
        **{key: value for key, value in given.items() if value is not None},
    }
    if earlier is not None:
        merged = {**earlier(merged), **merged}
    try:
        return kind.model_validate(merged)
    except ValidationError as error:
        # A default that depends on other options is not computed where one of these is wrong.
        faults = (item for item in deepest_faults(error) if item["type"] != "default_factory_not_called")
        problems = dict.fromkeys(_problem(item, kind) for item in faults)
        raise ConfigError("RW103", f"{'; '.join(problems)}.") from None


def _problem(item: ErrorDetails, kind: type[Settings]) -> str:
    field = str(item["loc"][0])
    extra = getattr(kind.model_fields.get(field), "json_schema_extra", None)
    is_argument = isinstance(extra, dict) and bool(extra.get("argument"))
    name = "the first argument" if is_argument else flag(field)
    if item["type"] == "extra_forbidden":
        ours = [flag(other).removeprefix("--") for other in kind.model_fields]
        close = close_names(name.removeprefix("--"), ours, OPTIONS, cutoff=0.6)
        return f"{name} is not an option" + (f" (did you mean --{close[0]}?)" if close else "")
    if item["type"] == "missing":
        return f"{name} is missing"
    if item["type"] == "literal_error" and is_argument:
        return f"{name} is {item['input']!r}; give {item['ctx']['expected'].replace(chr(39), '')}"
    given = item["input"]
    # Python may give any object, and a model's repr has many lines.
    words = repr(given) if isinstance(given, str | int | float | list | tuple | dict) else f"a {type(given).__name__}"
    return f"{name} is {words}: {fault(item)}"


def read_settings_file(file: Path) -> JsonObject:
    """``{key: value}``, keys with underscores. Raises ConfigError (RW102) for a file that cannot be read."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError("RW102", f"cannot read the settings file {file}: {one_line(error)}; give a file.") from None
    except (yaml.YAMLError, TypeError, ValueError) as error:
        # A list as a key is a TypeError, and text not in UTF-8 a ValueError.
        raise ConfigError("RW102", f"the settings file {file} is not YAML ({one_line(error)}); correct it.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        kind = type(content).__name__
        raise ConfigError("RW102", f"the settings file {file} holds a {kind}; write one `option: value` a line.")
    return {str(key).replace("-", "_"): value for key, value in content.items()}

"""What a user can set: the adapter and the training run. Imports no torch.

``LoraConfig`` speaks PEFT's names. ``TrainSettings`` is the command line of ``rankwise train`` and the keys of
its YAML file; it stops at ``training.run``, inner functions take plain arguments.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeGuard, TypeVar, get_args

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from rankwise.errors import ConfigError
from rankwise.known_names import OPTIONS, close_names

Bias = Literal["none", "all", "lora_only"]
AdapterDtype = Literal["float32", "base"]
Method = Literal["lora", "qlora", "dora", "qdora", "full", "bottleneck", "prefix"]
QuantType = Literal["nf4", "fp4"]

FOUR_BITS = ("qlora", "qdora")
DORA = ("dora", "qdora")
BASELINES = ("bottleneck", "prefix")
# The papers' other methods, which are compared but merge into nothing.

ALL_LINEAR = "all-linear"

_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")

# Bounds of options, far above what anyone trains: whatever lies below them fits into 64 bits, in products too.
MANY = 10**9
LARGEST_SEED = 2**32 - 1
# NumPy's.
LARGEST_BATCH = 2**16
LONGEST_ROW = 2**22
LARGEST_RANK = 2**16
LARGEST_NUMBER = 1e30
# Float32 holds it.
SMALLEST_TEMPERATURE = 1e-4
# Logits divided by less can be infinite.

DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
# The model that `demo` stands for, and its name on the hub.


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """LoRA (Hu et al. 2021) or, with ``use_dora``, DoRA (Liu et al. 2024). Field names and meanings are PEFT's.

    Raises ConfigError (RW101) with every wrong field in one message.
    """

    r: int = 16
    # Rank of the update: A is (r, in), B is (out, r).
    lora_alpha: float = 32
    # The update is scaled by s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    lora_dropout: float = 0.0
    # Dropout on the input of the low-rank path; the frozen product never sees it.
    target_modules: str | Sequence[str] | None = ALL_LINEAR
    # A list matches a module's whole name or its end after a dot; a string is a full-match regular expression;
    # "all-linear" is every linear layer but the output head.
    target_parameters: Sequence[str] | None = None
    # Stacked experts, by the names of their parameters: ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]. They
    # match like a list of target_modules, and adapt besides those; target_modules=[] adapts experts alone. As in PEFT
    # exclude_modules, layers_to_transform and layers_pattern leave them alone: a whole name chooses a layer.
    use_dora: bool = False
    # Train a magnitude per output row besides A and B.
    use_rslora: bool = False
    # Scale by lora_alpha / sqrt(r) (Kalajdzievski 2023).
    exclude_modules: str | Sequence[str] | None = None
    # Matched like target_modules; what it matches is left alone.
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    # Another r for some modules; a key matches as the regular expression (.*\.)?(KEY)$.
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    # Another lora_alpha for some modules, matched like rank_pattern.
    bias: Bias = "none"
    # Which biases of the base train: none, all of the model's, or those of adapted layers.
    modules_to_save: Sequence[str] | None = None
    # Modules trained whole and saved with the adapter (a new output head, for example). A tied head is untied.
    layers_to_transform: int | Sequence[int] | None = None
    # Only these layer indices are adapted; goes with a list of target_modules, of which a whole name stands for itself.
    layers_pattern: str | Sequence[str] | None = None
    # Name of the module list that layers_to_transform counts in, where it is not the first in the path.
    enable_lora: Mapping[str, Sequence[bool]] = dataclasses.field(default_factory=dict)
    # Fused projections of which only some equal parts adapt, as in loralib's MergedLinear:
    # {"c_attn": [True, False, True]} adapts q and v of GPT-2 and freezes k. Keys match like target_modules.
    init_lora_weights: bool = True
    # True: A Kaiming-uniform, B zero, so that training starts at the base model. False: B random too (for tests).
    adapter_dtype: AdapterDtype = "float32"
    # float32 keeps A, B and m in full precision and rounds them to the layer's dtype in the product; base stores
    # them in the base's dtype (half the adapter's memory, and small updates are lost to rounding).

    def __post_init__(self) -> None:
        wrong = list(_type_problems(self))
        if wrong:
            raise ConfigError("RW101", "; ".join(wrong) + ".")
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        if self.target_parameters is not None and not isinstance(self.target_parameters, str):
            object.__setattr__(self, "target_parameters", tuple(self.target_parameters) or None)
        for name in ("target_modules", "exclude_modules", "modules_to_save", "layers_pattern"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        if self.enable_lora:
            fused = {k: tuple(v) if isinstance(v, Sequence) else v for k, v in self.enable_lora.items()}
            object.__setattr__(self, "enable_lora", fused)
        problems = list(_lora_problems(self))
        if problems:
            raise ConfigError("RW101", "; ".join(problems) + ".")

    def scaling(self, r: int, lora_alpha: float) -> float:
        """``s = lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with rsLoRA."""
        return float(lora_alpha / r**0.5 if self.use_rslora else lora_alpha / r)

    def trains_whole(self, path: str) -> bool:
        """Whether ``modules_to_save`` names the module at ``path`` or one that contains it."""
        parts = f".{path}."
        return any(f".{key}." in parts for key in self.modules_to_save or ())


def _type_problems(config: LoraConfig) -> Iterator[str]:
    """What a file may hold instead of names, mappings and switches."""
    for name in ("target_modules", "target_parameters", "exclude_modules", "modules_to_save", "layers_pattern"):
        value = getattr(config, name)
        is_list = isinstance(value, Iterable) and not isinstance(value, Mapping)
        if value is not None and not (is_list and all(isinstance(item, str) for item in value)):
            yield f"{name} is {value!r} and must be a name or a list of names"
    for name in ("rank_pattern", "alpha_pattern", "enable_lora"):
        value = getattr(config, name)
        if not (isinstance(value, Mapping) and all(isinstance(key, str) for key in value)):
            yield f"{name} is {value!r} and must be a mapping from module names"
    for name in ("use_dora", "use_rslora", "init_lora_weights"):
        if not isinstance(getattr(config, name), bool):
            yield f"{name} is {getattr(config, name)!r} and must be true or false"


def _lora_problems(config: LoraConfig) -> Sequence[str]:
    problems = list(_pattern_problems(config))
    if problems:
        return problems
    ranks = {"r": config.r, **{f"rank_pattern[{key!r}]": value for key, value in config.rank_pattern.items()}}
    alphas = {
        "lora_alpha": config.lora_alpha,
        **{f"alpha_pattern[{key!r}]": value for key, value in config.alpha_pattern.items()},
    }
    for name, rank in ranks.items():
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            problems.append(f"{name} is {rank!r} and must be a whole number of 1 or more")
    for name, alpha in alphas.items():
        if not _is_number(alpha) or not 0 < alpha < math.inf:
            problems.append(f"{name} is {alpha!r} and must be a number above 0")
    if not _is_number(config.lora_dropout) or not 0 <= config.lora_dropout < 1:
        problems.append(f"lora_dropout is {config.lora_dropout!r} and must lie in [0, 1)")
    if config.bias not in get_args(Bias):
        problems.append(f"bias is {config.bias!r} and must be one of {', '.join(get_args(Bias))}")
    if config.adapter_dtype not in get_args(AdapterDtype):
        problems.append(f"adapter_dtype is {config.adapter_dtype!r} and must be float32 or base")
    return [*problems, *_target_problems(config)]


def _target_problems(config: LoraConfig) -> Iterator[str]:
    if config.target_modules is not None and len(config.target_modules) == 0 and not config.target_parameters:
        yield 'target_modules is empty; give a list of names, a regular expression, or "all-linear"'
    yield from _parameter_problems(config)
    layers = config.layers_to_transform
    indices = [layers] if isinstance(layers, int) else layers
    is_list = isinstance(indices, Iterable) and not isinstance(indices, str)
    if indices is not None and not (is_list and all(type(index) is int and index >= 0 for index in indices)):
        yield f"layers_to_transform is {layers!r} and must be a layer's index or a list of them"
    elif layers is not None and isinstance(config.target_modules, str):
        yield (
            "layers_to_transform goes with a list of target_modules, and target_modules is "
            f"{config.target_modules!r}; give the module names as a list"
        )
    if config.layers_pattern and layers is None:
        yield f"layers_pattern is {config.layers_pattern!r} and says where layers_to_transform counts; give both"
    for key, parts in config.enable_lora.items():
        if not isinstance(parts, Sequence) or not any(parts):
            yield f"enable_lora[{key!r}] is {parts!r} and must be a list that enables at least one part"


def _parameter_problems(config: LoraConfig) -> Iterator[str]:
    """As in PEFT, stacked experts take LoRA alone."""
    if config.target_parameters is None:
        return
    if isinstance(config.target_parameters, str):
        yield f"target_parameters is {config.target_parameters!r} and must be a list of names of parameters"
    if config.use_dora:
        yield "use_dora is set with target_parameters, and stacked experts take LoRA alone; leave one of the two out"
    if config.lora_dropout:
        yield (
            f"lora_dropout is {config.lora_dropout!r} with target_parameters, and stacked experts take no dropout; set "
            "it to 0 or leave target_parameters out"
        )


def _pattern_problems(config: LoraConfig) -> Iterator[str]:
    """Regular expressions that do not compile."""
    patterns = {name: getattr(config, name) for name in ("target_modules", "exclude_modules")}
    named = [(f"{name} is {value!r}", value) for name, value in patterns.items() if isinstance(value, str)]
    layers = config.layers_pattern or ()
    # As they are matched: flags that stand inside fail there alone.
    each = [layers] if isinstance(layers, str) else layers
    named += [(f"layers_pattern has {value!r}", f"({value})") for value in each]
    for name in ("rank_pattern", "alpha_pattern"):
        named += [(f"{name}[{key!r}] is set", f"({key})") for key in getattr(config, name)]
    for described, pattern in named:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{described}, which is no regular expression ({error})"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


class Settings(BaseModel):
    """Base of every settings table: unknown keys are refused, and keys may be spelled with hyphens."""

    # Built at the first use: every --help would wait for all ten. No option means infinity, and `nan` passes no test.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), defer_build=True, allow_inf_nan=False
    )


SettingsT = TypeVar("SettingsT", bound=Settings)


def comma_list(value: Any) -> Any:
    """Text is a list with commas in it, or of one item; anything else is left to the check of its type."""
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return (value,) if isinstance(value, int | float) else value


def module_list(value: Any) -> Any:
    """A comma makes a list, and so does a bare module name: as a regular expression it would match almost nothing.
    Nothing is the empty list."""
    is_list = isinstance(value, str) and value != ALL_LINEAR and ("," in value or re.fullmatch(r"\w*", value))
    return comma_list(value) if is_list else value


def text_list(value: Any) -> Any:
    """One text is a list of one; its commas are its own."""
    return (value,) if isinstance(value, str) else value


def named_values(value: Any) -> Any:
    """``q_proj=4,v_proj=8`` as a mapping. A name may hold ``=``, a comma only in a YAML mapping."""
    if not isinstance(value, str):
        return value
    pairs = [part.rpartition("=") for part in comma_list(value)]
    if not all(name.strip() and item.strip() for name, _, item in pairs):
        raise ValueError("write NAME=VALUE, with commas between several")
    return {name.strip(): item.strip() for name, _, item in pairs}


def named_parts(value: Any) -> Any:
    """``c_attn=1:0:1`` as a mapping to switches."""
    named = named_values(value)
    if not isinstance(named, Mapping):
        return named
    return {name: tuple(item.split(":")) if isinstance(item, str) else item for name, item in named.items()}


def _no_tiny_temperature(value: float) -> float:
    if 0 < value < SMALLEST_TEMPERATURE:
        raise ValueError(f"give 0, or {SMALLEST_TEMPERATURE:g} and more")
    return value


Temperature = Annotated[float, AfterValidator(_no_tiny_temperature)]


class TrainSettings(Settings):
    """The options of ``rankwise train``, and the keys of its ``--config`` file."""

    model: str = Field(description="Hub id, folder, .gguf file, or `demo`.")
    data: str = Field(description="Training data: hub id, folder, or .jsonl/.json/.csv/.parquet file (also .gz).")
    output: Path = Field(description="Run folder to write.")
    eval_data: str | None = Field(None, description="Evaluation data, in any of the same forms.")
    method: Method = Field("lora", description="lora, qlora, dora, qdora, full, bottleneck or prefix.")

    r: int = Field(
        16, ge=1, le=LARGEST_RANK, description="Rank of the adapter; width of a bottleneck, length of a prefix."
    )
    lora_alpha: float = Field(
        32, gt=0, le=LARGEST_NUMBER, description="Scale of the adapter: the update is multiplied by alpha / r."
    )
    lora_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the low-rank path.")
    target_modules: Annotated[str | tuple[str, ...], BeforeValidator(module_list)] = Field(
        ALL_LINEAR, description='Module names, comma-separated; or a regular expression; or "all-linear".'
    )
    target_parameters: Annotated[tuple[str, ...] | None, BeforeValidator(comma_list)] = Field(
        None,
        description="Stacked experts to adapt too, by parameter: mlp.experts.gate_up_proj,mlp.experts.down_proj; "
        'with --target-modules "" they alone.',
    )
    exclude_modules: Annotated[str | tuple[str, ...] | None, BeforeValidator(module_list)] = Field(
        None, description="Module names to leave alone."
    )
    modules_to_save: Annotated[tuple[str, ...] | None, BeforeValidator(comma_list)] = Field(
        None, description="Modules to train whole, comma-separated."
    )
    use_rslora: bool = Field(False, description="Scale by alpha / sqrt(r).")
    adapter_dtype: AdapterDtype = Field("float32", description="float32, or base for the base model's dtype.")
    bias: Bias = Field("none", description="Biases of the base to train: none, all, or those of adapted layers.")
    layers_to_transform: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MANY)], ...] | None, BeforeValidator(comma_list)
    ] = Field(None, description="Adapt only these layers, counted from 0; needs a list of --target-modules.")
    rank_pattern: Annotated[dict[str, Annotated[int, Field(ge=1, le=LARGEST_RANK)]], BeforeValidator(named_values)] = (
        Field({}, description="Another rank for some modules: q_proj=4,v_proj=8; a name may be a regular expression.")
    )
    alpha_pattern: Annotated[
        dict[str, Annotated[float, Field(gt=0, le=LARGEST_NUMBER)]], BeforeValidator(named_values)
    ] = Field({}, description="Another --lora-alpha for some modules, written like --rank-pattern.")
    enable_lora: Annotated[dict[str, tuple[bool, ...]], BeforeValidator(named_parts)] = Field(
        {}, description="Adapt only some equal parts of a fused layer: c_attn=1:0:1 leaves out the second of three."
    )

    quant_type: QuantType = Field("nf4", description="4-bit type of qlora and qdora.")
    block_size: int = Field(64, description="Weights per 4-bit scale: a power of two from 32 to 4096.")
    double_quant: bool = Field(True, description="Keep the 4-bit scales in 8 bits.")

    max_steps: int | None = Field(None, ge=1, le=MANY, description="Optimizer steps; overrides --epochs.")
    epochs: float = Field(1.0, gt=0, le=1e6, description="Passes over the training data.")
    batch_size: int = Field(8, ge=1, le=LARGEST_BATCH, description="Rows per micro-batch.")
    gradient_accumulation: int = Field(1, ge=1, le=LARGEST_BATCH, description="Micro-batches per optimizer step.")
    max_length: int = Field(
        1024, ge=2, le=LONGEST_ROW, description="Tokens per row; longer rows are cut, counted and reported."
    )
    learning_rate: float = Field(2e-4, gt=0, le=LARGEST_NUMBER, description="Peak learning rate.")
    lr_scheduler_type: str = Field("linear", description="Schedule: linear, cosine, constant, ... (transformers).")
    warmup_steps: int = Field(0, ge=0, le=MANY, description="Steps over which the learning rate rises from 0.")
    weight_decay: float = Field(0.0, ge=0, le=LARGEST_NUMBER, description="AdamW's weight decay.")
    max_grad_norm: float = Field(
        1.0, ge=0, le=LARGEST_NUMBER, description="Gradients are clipped to this norm; 0 switches it off."
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="Label smoothing.")
    optimizer: str = Field(
        "adamw_torch", description="Optimizer, by transformers' name (paged_adamw_8bit, ...), or adamw_offload."
    )
    seed: int = Field(0, ge=0, le=LARGEST_SEED, description="Seed of the adapter, the data order and dropout.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Dtype of the base: auto is bfloat16 where the device has it."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = Field("auto", description="Device; auto takes the fastest.")
    devices: int | None = Field(
        None, ge=1, le=LARGEST_BATCH, description="Train in N processes on this machine, each on a device of its own."
    )
    strategy: Literal["ddp", "fsdp"] | None = Field(
        None, description="What several processes share: ddp (default) gives each the whole model, fsdp a part of it."
    )
    packing: bool = Field(False, description="Fill every row with several examples that do not see each other.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    activation_offloading: bool = Field(
        False, description="Keep activations in CPU memory until the backward pass needs them (accelerators only)."
    )
    fast: bool = Field(
        True, description="Fused operators, own attention on CPUs, no padding, memory kept between steps."
    )
    chat_template: Path | None = Field(None, description="Jinja file that overrides the tokenizer's template.")
    prompt_column: str | None = Field(None, description="Column with the prompt, for tables of other names.")
    completion_column: str | None = Field(None, description="Column with the completion.")
    skip_bad_rows: int = Field(0, ge=0, le=MANY, description="Leave out up to N bad rows of each file, and list them.")

    save_steps: int | None = Field(
        None, ge=1, le=MANY, description="Checkpoint every N steps; default: at each evaluation."
    )
    save_total_limit: int = Field(2, ge=1, le=MANY, description="Checkpoints kept, the best one besides.")
    eval_steps: int | None = Field(
        None, ge=1, le=MANY, description="Evaluate every N steps; default: a tenth of the run."
    )
    eval_limit: int | None = Field(
        None,
        ge=0,
        le=MANY,
        description="Evaluate on the first N rows; 0: on all; default: on 256, spread evenly, where there are more.",
    )
    logging_steps: int | None = Field(
        None,
        ge=1,
        le=MANY,
        description="Log every N steps; default: a tenth of the run, at most 10. First and last always.",
    )
    early_stopping: int | None = Field(
        None, ge=1, le=MANY, description="Stop after N evaluations without a better loss."
    )
    sample_prompt: str | None = Field(None, description="Answered again at every evaluation.")
    tensorboard: bool = Field(False, description="Write TensorBoard events too (extra `tensorboard`).")

    trust_remote_code: bool = Field(False, description="Run Python code that comes with a hub repository.")
    revision: str | None = Field(None, description="Branch, tag or commit of a hub model.")
    cache: Path | None = Field(
        None, description="Keep the quantized base and the encoded rows in this folder, for other runs of the same."
    )
    ignore_plan: bool = Field(False, description="Train although the predicted memory is more than there is.")
    resume: bool = Field(
        False,
        description="Continue the run in --output from its last checkpoint, with its settings where none are given; a "
        "larger --max-steps or --epochs lengthens it.",
    )
    overwrite: bool = Field(False, description="Replace the run in --output.")


def logging_steps_of(steps: int) -> int:
    """Steps from one logged loss to the next in a run of ``steps``, where the user does not say."""
    return min(10, max(1, steps // 10))


def read_settings(
    kind: type[SettingsT],
    file: Path | None,
    given: Mapping[str, Any],
    earlier: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
) -> SettingsT:
    """Settings from a YAML ``file`` (keys are the long options) overridden by what the command line ``given``.

    ``earlier`` gets both and gives what holds below them, such as the settings of a run that is resumed.

    Raises ConfigError: RW102 the file cannot be read, RW103 with every wrong or unknown key in one message, RW104 for
    text that holds no characters.
    """
    merged = {
        **(_from_file(file) if file else {}),
        **{key: value for key, value in given.items() if value is not None},
    }
    if earlier is not None:
        merged = {**earlier(merged), **merged}
    _refuse_half_characters(merged)
    try:
        return kind.model_validate(merged)
    except pydantic.ValidationError as error:
        raise ConfigError("RW103", _one_sentence(error, kind)) from None


def _from_file(file: Path) -> dict[str, Any]:
    _refuse_half_characters({"config": str(file)})
    # Not above: --help needs no YAML.
    from rankwise.settings_file import read_settings_file

    return read_settings_file(file)


def _refuse_half_characters(given: Mapping[str, Any]) -> None:
    """Raise ConfigError (RW104) for a NUL or a byte that is no UTF-8 (Python: a lone surrogate): no path can hold the
    one, and no record the other."""
    for name, value in given.items():
        odd = next((found for text in _texts([name, value]) if (found := _NO_CHARACTER.search(text))), None)
        if odd is not None:
            what = "a NUL" if odd[0] == "\0" else "a byte that is no UTF-8"
            raise ConfigError(
                "RW104", f"--{name.replace('_', '-')} holds {what} at position {odd.start()}; give text in UTF-8."
            )


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _one_sentence(error: pydantic.ValidationError, kind: type[Settings]) -> str:
    problems = []
    for item in error.errors():
        name = "--" + ".".join(str(part) for part in item["loc"][:1]).replace("_", "-")
        extra = getattr(kind.model_fields.get(str(item["loc"][0])), "json_schema_extra", None)
        if isinstance(extra, dict) and extra.get("argument"):
            name = "the first argument"
        if item["type"] == "extra_forbidden":
            ours = [field.replace("_", "-") for field in kind.model_fields]
            close = close_names(name.removeprefix("--"), ours, OPTIONS, cutoff=0.6)
            hint = f" (did you mean --{close[0]}?)" if close else ""
            problems.append(f"{name} is no option{hint}")
        elif item["type"] == "missing":
            problems.append(f"{name} is missing")
        elif item["type"] == "literal_error" and not name.startswith("--"):
            problems.append(f"{name} is {item['input']!r}; give {item['ctx']['expected'].replace(chr(39), '')}")
        else:
            reason = item["msg"].removeprefix("Value error, ")
            problems.append(f"{name} is {item['input']!r}: {reason[0].lower()}{reason[1:]}")
    return "; ".join(dict.fromkeys(problems)) + "."


def idle_options(method: str) -> dict[str, tuple[str, ...]]:
    """{reason: options of `rankwise train`} of those that have no effect on ``method``."""
    adapter = tuple(field.name for field in dataclasses.fields(LoraConfig) if field.name in TrainSettings.model_fields)
    idle: dict[str, tuple[str, ...]] = {}
    if method not in FOUR_BITS:
        idle["only qlora and qdora make 4-bit weights"] = ("quant_type", "block_size", "double_quant")
    if method == "full":
        idle["it trains all weights and adds no adapter"] = adapter
    if method in BASELINES:
        rest = tuple(name for name in adapter if name != "r")
        idle["of the adapter's options this baseline takes --r alone"] = rest
    return idle

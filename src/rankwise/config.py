"""A user's settings: the adapter and the training run. Imports no torch.

``LoraConfig`` uses PEFT's names. ``TrainSettings`` is the command line of ``rankwise train`` and the keys of its YAML
file. Each option is in one table, from which others inherit:

    AdapterOptions            an adapter           LoraConfig
    └── StepOptions           one training step    the memory plan's ``Workload``, and
        └── RunOptions        one training run     CompareSettings: equal for all its runs
            └── TrainSettings

``PlanSettings`` has StepOptions, and ModelOptions and LengthOptions as RunOptions has.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeGuard, get_args

from pydantic import AfterValidator, BeforeValidator, Field

from rankwise.errors import ConfigError
from rankwise.options import (
    ALL_LINEAR,
    LARGEST_NUMBER,
    Batch,
    Count,
    Length,
    Modules,
    Names,
    NotNegative,
    Panel,
    Positive,
    Rank,
    Seed,
    Settings,
    Share,
    Tokens,
    WarmTemperature,
    Whole,
    comma_list,
    named_parts,
    named_values,
    option,
    text_list,
)

Bias = Literal["none", "all", "lora_only"]
AdapterDtype = Literal["float32", "base"]
Method = Literal["lora", "qlora", "dora", "qdora", "full", "bottleneck", "prefix"]
QuantType = Literal["nf4", "fp4"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Objective = Literal["sft", "dpo", "kto", "grpo"]
Tracker = Literal["wandb", "trackio", "tensorboard", "mlflow"]

METHODS: tuple[str, ...] = get_args(Method)
FOUR_BITS = ("qlora", "qdora")
DORA = ("dora", "qdora")
# The papers' other methods, which are compared but merge into nothing.
BASELINES = ("bottleneck", "prefix")

# The model that `demo` stands for, and its name on the hub.
DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

MODEL = "Hub id, folder, .gguf file, or `demo`."
TRAINING_DATA = "Training data: hub id, folder, or .jsonl/.json/.csv/.parquet file (also .gz)."


_adapter = functools.partial(option, Panel.ADAPTER)
_training = functools.partial(option, Panel.TRAINING)
_device = functools.partial(option, Panel.DEVICE)
_saving = functools.partial(option, Panel.SAVING)
_objective = functools.partial(option, Panel.OBJECTIVE)


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """The options of an adapter: each is one of ``train``, ``compare`` and ``plan`` too."""

    # A is (r, in), B is (out, r).
    r: Annotated[Rank, _adapter("Rank of the adapter; width of a bottleneck, length of a prefix.")] = 16
    # s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    lora_alpha: Annotated[Positive, _adapter("Scale of the adapter: the update is multiplied by alpha / r.")] = 32
    # On the input of that path; the frozen product never sees it.
    lora_dropout: Annotated[Share, _adapter("Dropout on the low-rank path.")] = 0.0
    # A list matches a module's whole name or its end after a dot; a string is a full-match regular expression;
    # "all-linear" is every linear layer but the output head.
    target_modules: Annotated[
        Modules | None, _adapter('Module names, comma-separated; or a regular expression; or "all-linear".')
    ] = ALL_LINEAR
    # They match like a list of target_modules, and adapt besides those; target_modules=[] adapts experts alone. As in
    # PEFT exclude_modules, layers_to_transform and layers_pattern leave them alone: a whole name chooses a layer.
    target_parameters: Annotated[
        Names | None,
        _adapter(
            "Stacked experts to adapt too, by parameter: mlp.experts.gate_up_proj,mlp.experts.down_proj; "
            'with --target-modules "" they alone.'
        ),
    ] = None
    # They match like target_modules.
    exclude_modules: Annotated[Modules | None, _adapter("Module names to leave alone.")] = None
    # They are saved with the adapter (a new output head, for example). A tied head is untied.
    modules_to_save: Annotated[Names | None, _adapter("Modules to train whole, comma-separated.")] = None
    # Kalajdzievski 2023.
    use_rslora: Annotated[bool, _adapter("Scale by alpha / sqrt(r).")] = False
    # float32 keeps A, B and m in full precision and rounds them to the layer's dtype in the product; base takes half
    # the adapter's memory, and loses small updates to rounding.
    adapter_dtype: Annotated[AdapterDtype, _adapter("float32, or base for the base model's dtype.")] = "float32"
    bias: Annotated[Bias, _adapter("Biases of the base to train: none, all, or those of adapted layers.")] = "none"
    # A whole name among the target_modules stands for itself.
    layers_to_transform: Annotated[
        int | Sequence[Whole] | None,
        BeforeValidator(comma_list),
        _adapter("Adapt only these layers, counted from 0; needs a list of --target-modules.", metavar="N,..."),
    ] = None
    # A key matches as the regular expression (.*\.)?(KEY)$.
    rank_pattern: Annotated[
        Mapping[str, Rank],
        BeforeValidator(named_values),
        Field(default_factory=dict),
        _adapter(
            "Another rank for some modules: q_proj=4,v_proj=8; a name may be a regular expression.",
            metavar="NAME=R,...",
        ),
    ] = dataclasses.field(default_factory=dict)
    alpha_pattern: Annotated[
        Mapping[str, Positive],
        BeforeValidator(named_values),
        Field(default_factory=dict),
        _adapter("Another --lora-alpha for some modules, written like --rank-pattern.", metavar="NAME=X,..."),
    ] = dataclasses.field(default_factory=dict)
    # As in loralib's MergedLinear: {"c_attn": [True, False, True]} adapts q and v of GPT-2 and freezes k. Keys match
    # like target_modules.
    enable_lora: Annotated[
        Mapping[str, Sequence[bool]],
        BeforeValidator(named_parts),
        Field(default_factory=dict),
        _adapter(
            "Adapt only some equal parts of a fused layer: c_attn=1:0:1 leaves out the second of three.",
            metavar="NAME=1:0:1,...",
        ),
    ] = dataclasses.field(default_factory=dict)


ADAPTER = tuple(field.name for field in dataclasses.fields(AdapterOptions))


class Init(NamedTuple):
    """How A and B start."""

    # default, random, pissa, loftq, eva or orthogonal.
    kind: str
    # Of pissa: subspace iterations of a randomised SVD; None is an exact one.
    niter: int | None = None
    # Of eva: how many times its rank a layer may get when ranks are redistributed; 1 leaves them.
    rho: float = 1.0


_INIT = re.compile(
    r"(?P<kind>pissa|loftq|eva|orthogonal)"
    r"((?<=pissa)_niter_(?P<niter>\d{1,3})|(?<=eva)_rho_(?P<rho>[1-9]\d{0,2}(\.\d{1,6})?))?"
)


def _init_of(value: object) -> Init | None:
    """None for a value that PEFT and we do not know."""
    if isinstance(value, bool):
        return Init("default" if value else "random")
    found = _INIT.fullmatch(value) if isinstance(value, str) else None
    if found is None:
        return None
    niter, rho = found["niter"], found["rho"]
    return Init(found["kind"], None if niter is None else int(niter), 1.0 if rho is None else float(rho))


def _checked_init(value: str) -> str:
    """``pissa:4`` and ``eva:2`` hold a number after a colon; PEFT's names are taken too."""
    if value != "default" and _init_of(_peft_init(value)) is None:
        raise ValueError("give default, pissa, pissa:N, loftq, eva, eva:RHO (1 or more) or orthogonal")
    return value


def _peft_init(value: str) -> bool | str:
    if value == "default":
        return True
    return value.replace("pissa:", "pissa_niter_").replace("eva:", "eva_rho_")


@dataclasses.dataclass(frozen=True)
class LoraConfig(AdapterOptions):
    """LoRA (Hu et al. 2021) or, with ``use_dora``, DoRA (Liu et al. 2024). Names and meanings of the fields are PEFT's.

    Weights are (out, in), A is (r, in), B is (out, r) and s is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with
    ``use_rslora``. LoRA computes ``W x + s B A x``, and DoRA ``m / ||W + s B A|| * (W + s B A) x`` with a norm per row.

    Raises:
        ConfigError: RW101, with every wrong field in one message.
    """

    # Train a magnitude per output row besides A and B.
    use_dora: bool = False
    # Name of the module list that layers_to_transform counts in, where it is not the first in the path.
    layers_pattern: str | Sequence[str] | None = None
    # True: A Kaiming-uniform, B zero, so that training starts at the base model. False: B random too (for tests).
    # "pissa", "pissa_niter_N", "loftq", "eva" and "orthogonal" as in PEFT; "eva_rho_X" is PEFT's eva_config(rho=X), and
    # "eva" alone keeps the ranks (rho=1). ``adapters.inits`` defines them.
    init_lora_weights: bool | str = True
    # Token ids whose rows of the embedding train, and no others: new tokens. A mapping names embeddings and heads by
    # their module; a list is the input embedding's. A head of the same weight follows.
    trainable_token_indices: Sequence[int] | Mapping[str, Sequence[int]] | None = None

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

    @property
    def init(self) -> Init:
        """``init_lora_weights``, taken apart."""
        return _init_of(self.init_lora_weights) or Init("default")

    @property
    def token_rows(self) -> dict[str | None, list[int]]:
        """{module: token ids} of ``trainable_token_indices``; None stands for the input embedding."""
        given = self.trainable_token_indices or ()
        return {
            name: list(ids) for name, ids in (given if isinstance(given, Mapping) else {None: given}).items() if ids
        }

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
    rows = config.trainable_token_indices
    lists = list(rows.values()) if isinstance(rows, Mapping) else [] if rows is None else [rows]
    ids = [index for one in lists if isinstance(one, Sequence) for index in one]
    is_lists = all(isinstance(one, Sequence) and not isinstance(one, str) for one in lists)
    if not is_lists or not all(type(index) is int and index >= 0 for index in ids):
        yield f"trainable_token_indices is {rows!r} and must be a list of token ids, or lists by module"
    elif any(len(set(one)) < len(one) for one in lists):
        yield f"trainable_token_indices is {rows!r} and names a token twice"
    for name in ("use_dora", "use_rslora"):
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
    return [*problems, *_init_problems(config, ranks), *_target_problems(config)]


def _init_problems(config: LoraConfig, ranks: Mapping[str, int]) -> Iterator[str]:
    init, given = _init_of(config.init_lora_weights), f"init_lora_weights is {config.init_lora_weights!r}"
    if init is None:
        yield f"{given} and must be true, false, pissa, pissa_niter_N, loftq, eva, eva_rho_X or orthogonal"
    elif init.kind not in ("default", "random"):
        idle = {"enable_lora": "a part of a fused layer", "target_parameters": "stacked experts"}
        yield from (
            f"{given} with {name}, and {place} can only start by default"
            for name, place in idle.items()
            if getattr(config, name)
        )
        if init.kind == "orthogonal":
            odd = [f"{name} = {rank}" for name, rank in ranks.items() if rank % 2]
            yield from (f"{given}, which halves the rank, and {item} is odd" for item in odd)


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
            yield f"{described}, which is not a regular expression ({error})"


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True)
class StepOptions(AdapterOptions):
    """The options of one training step: its memory depends on them."""

    # In Python it is LoraConfig's init_lora_weights.
    init: Annotated[
        str,
        AfterValidator(_checked_init),
        _adapter(
            "How A and B start: default, pissa or pissa:N (N iterations of a fast SVD), loftq, eva or eva:RHO (ranks "
            "redistributed, up to RHO times --r), orthogonal.",
            metavar="INIT",
        ),
    ] = "default"
    quant_type: Annotated[QuantType, option(Panel.FOUR_BITS, "4-bit type of qlora and qdora.")] = "nf4"
    block_size: Annotated[int, option(Panel.FOUR_BITS, "Weights per 4-bit scale: a power of two from 32 to 4096.")] = 64
    double_quant: Annotated[bool, option(Panel.FOUR_BITS, "Keep the 4-bit scales in 8 bits.")] = True
    batch_size: Annotated[Batch, _training("Rows per micro-batch.")] = 8
    max_length: Annotated[Length, _training("Tokens per row; longer rows are cut, counted and reported.")] = 1024
    optimizer: Annotated[
        str, _training("Optimizer, by transformers' name (paged_adamw_8bit, ...), or adamw_offload.")
    ] = "adamw_torch"
    gradient_checkpointing: Annotated[bool, _device("Recompute activations: less memory, more time.")] = False
    activation_offloading: Annotated[
        bool, _device("Keep activations in CPU memory until the backward pass needs them (accelerators only).")
    ] = False
    # False: PyTorch's own step: no fused parts, kernels or losses of ours.
    fast: Annotated[
        bool,
        _device("Fused operators, own attention on CPUs, no padding, memory kept between steps."),
    ] = True

    def lora_config(self, *, use_dora: bool) -> LoraConfig:
        """The adapter. Raises ConfigError (RW101)."""
        given = {name: getattr(self, name) for name in ADAPTER}
        return LoraConfig(**given, use_dora=use_dora, init_lora_weights=_peft_init(self.init))


class ModelOptions(Settings):
    """How a model is fetched."""

    trust_remote_code: Annotated[
        bool,
        option(Panel.LOADING, "Run Python code that comes with a hub repository."),
    ] = False
    revision: Annotated[str | None, option(Panel.LOADING, "Branch, tag or commit of a hub model.")] = None


class TextOptions(Settings):
    """How rows of data become text."""

    chat_template: Annotated[
        Path | None, option(Panel.TEXT, "Jinja file that overrides the tokenizer's template.", metavar="FILE")
    ] = None
    prompt_column: Annotated[
        str | None,
        option(Panel.TEXT, "Column with the prompt, for tables of other names."),
    ] = None
    completion_column: Annotated[str | None, option(Panel.TEXT, "Column with the completion.")] = None

    @property
    def columns(self) -> dict[str, Any]:
        """The columns of prompts and completions, in the form that the readers of data take."""
        return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}


class LengthOptions(Settings):
    """How many steps a run takes, and in which dtype."""

    gradient_accumulation: Annotated[Batch, _training("Micro-batches per optimizer step.")] = 1
    max_steps: Annotated[Count | None, _training("Optimizer steps; overrides --epochs.")] = None
    epochs: Annotated[float, _training("Passes over the training data.", gt=0, le=1e6)] = 1.0
    dtype: Annotated[Dtype, _device("Dtype of the base: auto is bfloat16 where the device has it.")] = "auto"


class RunOptions(ModelOptions, TextOptions, LengthOptions, StepOptions):
    """The options of ``rankwise train`` that are equal for all runs of a comparison."""

    lr_scheduler_type: Annotated[str, _training("Schedule: linear, cosine, constant, ... (transformers).")] = "linear"
    warmup_steps: Annotated[Whole, _training("Steps over which the learning rate rises from 0.")] = 0
    weight_decay: Annotated[NotNegative, _training("AdamW's weight decay.")] = 0.0
    # Hayou et al. 2024, arXiv 2402.12354.
    loraplus_ratio: Annotated[
        float | None, _training("LoRA+: B's learning rate over A's; 16 is usual.", ge=1, le=1e6)
    ] = None
    # Jain et al. 2023, arXiv 2310.05914.
    neftune_noise_alpha: Annotated[
        Positive | None,
        _training("NEFTune: noise on the embeddings in training, this over sqrt(length x width); 5 is usual."),
    ] = None
    max_grad_norm: Annotated[NotNegative, _training("Gradients are clipped to this norm; 0 switches it off.")] = 1.0
    label_smoothing: Annotated[Share, _training("Label smoothing.")] = 0.0
    packing: Annotated[bool, _training("Fill every row with several examples that do not see each other.")] = False
    early_stopping: Annotated[Count | None, _training("Stop after N evaluations without a better loss.")] = None

    device: Annotated[Device, _device("Device; auto takes the fastest.")] = "auto"
    ignore_plan: Annotated[bool, _device("Train although the predicted memory is more than there is.")] = False

    save_steps: Annotated[Count | None, _saving("Checkpoint every N steps; default: at each evaluation.")] = None
    save_total_limit: Annotated[Count, _saving("Checkpoints kept, the best one besides.")] = 2
    eval_steps: Annotated[Count | None, _saving("Evaluate every N steps; default: a tenth of the run.")] = None
    eval_limit: Annotated[
        Whole | None,
        _saving("Evaluate on the first N rows; 0: on all; default: on 256, spread evenly, where there are more."),
    ] = None
    logging_steps: Annotated[
        Count | None, _saving("Log every N steps; default: a tenth of the run, at most 10. First and last always.")
    ] = None


class PreferenceOptions(Settings):
    """What a run learns from, and the options of preferences. An option that the objective does not have stays None."""

    objective: Annotated[
        Objective,
        _objective(
            "What to learn from. sft: demonstrations; dpo: pairs of a better and a worse answer; kto: answers marked "
            "good or bad; grpo: rewards."
        ),
    ] = "sft"
    beta: Annotated[
        Positive | None,
        _objective(
            "dpo, kto, grpo: how strongly the model is kept near its reference; default: 0.1, with grpo not at all."
        ),
    ] = None
    loss_type: Annotated[
        str | None,
        _objective(
            "dpo: sigmoid (default), ipo, hinge, ...; kto: kto (default) or apo_zero_unpaired; grpo: dapo (default), "
            "grpo, dr_grpo or bnpo."
        ),
    ] = None
    desirable_weight: Annotated[Positive | None, _objective("kto: weight of good answers; default: 1.")] = None
    undesirable_weight: Annotated[Positive | None, _objective("kto: weight of bad answers; default: 1.")] = None


class ObjectiveOptions(PreferenceOptions):
    """All options of the objectives."""

    reward: Annotated[
        Sequence[str] | None,
        BeforeValidator(text_list),
        _objective(
            "grpo: what scores an answer: FILE.py:NAME, a function in a Python file; or answer, format=REGEX, "
            "length=N. May be given several times; their sum counts.",
            metavar="R",
            repeated=True,
        ),
    ] = None
    reward_weights: Annotated[
        Sequence[Annotated[float, Field(ge=-LARGEST_NUMBER, le=LARGEST_NUMBER)]] | None,
        BeforeValidator(comma_list),
        _objective("grpo: a factor for each --reward, in their order; default: 1 each.", metavar="X,..."),
    ] = None
    num_generations: Annotated[
        int | None, _objective("grpo: answers to a prompt, which are compared; default: 8.", ge=2, le=2**16)
    ] = None
    max_completion_length: Annotated[Tokens | None, _objective("grpo: tokens of an answer; default: 256.")] = None
    temperature: Annotated[
        WarmTemperature | None, _objective("grpo: answers are drawn at this temperature; default: 1.")
    ] = None


# {objective: those of its options that not every objective has}.
OBJECTIVE_OPTIONS: Mapping[Objective, tuple[str, ...]] = {
    "sft": ("label_smoothing", "packing", "prompt_column", "completion_column"),
    "dpo": ("beta", "loss_type", "label_smoothing"),
    "kto": ("beta", "loss_type", "desirable_weight", "undesirable_weight"),
    "grpo": (
        "beta",
        "loss_type",
        "reward",
        "reward_weights",
        "num_generations",
        "max_completion_length",
        "temperature",
        "prompt_column",
        "completion_column",
    ),
}
# trl's names, the default first.
LOSS_TYPES = {
    "dpo": (
        *("sigmoid", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
        *("apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"),
    ),
    "kto": ("kto", "apo_zero_unpaired"),
}
# trl's, of dpo and kto: beta; of grpo: answers to a prompt.
BETA, GENERATIONS = 0.1, 8
# Of those losses the ones that --label-smoothing acts on.
SMOOTHED = ("robust", "exo_pair", "aot", "aot_unpaired")


class TrainSettings(ObjectiveOptions, RunOptions):
    """The options of ``rankwise train``, and the keys of its ``--config`` file."""

    model: Annotated[str, option(Panel.MODEL, MODEL, metavar="M")]
    data: Annotated[str, option(Panel.MODEL, TRAINING_DATA, metavar="D")]
    output: Annotated[Path, option(Panel.MODEL, "Run folder to write.", metavar="DIR")]
    eval_data: Annotated[
        str | None,
        option(Panel.MODEL, "Evaluation data, in any of the same forms.", metavar="E"),
    ] = None
    method: Annotated[Method, option(Panel.MODEL, "lora, qlora, dora, qdora, full, bottleneck or prefix.")] = "lora"
    adapter: Annotated[
        Path | None,
        option(
            Panel.MODEL,
            "Train this adapter on: a run or PEFT folder. With --objective dpo or kto it is the reference too.",
            metavar="A",
        ),
    ] = None
    skip_bad_rows: Annotated[Whole, option(Panel.MODEL, "Leave out up to N bad rows of each file, and list them.")] = 0

    new_tokens: Annotated[
        str | None,
        _adapter(
            "Tokens to add to the vocabulary, with commas between them, or a file with one a line; of embedding and "
            "head their rows alone train.",
            metavar="FILE|A,B",
        ),
    ] = None
    learning_rate: Annotated[Positive, _training("Peak learning rate.")] = 2e-4
    seed: Annotated[Seed, _training("Seed of the adapter, the data order and dropout.")] = 0
    devices: Annotated[Batch | None, _device("Train in N processes on this machine, each on a device of its own.")] = (
        None
    )
    strategy: Annotated[
        Literal["ddp", "fsdp"] | None,
        _device("What several processes share: ddp (default) gives each the whole model, fsdp a part of it."),
    ] = None
    cache: Annotated[
        Path | None,
        _device("Keep the quantized base and the encoded rows in this folder, for other runs of the same."),
    ] = None

    sample_prompt: Annotated[str | None, _saving("Answered again at every evaluation.")] = None
    report_to: Annotated[
        tuple[Tracker, ...],
        BeforeValidator(comma_list),
        _saving("Trackers to tell too: wandb, trackio, tensorboard, mlflow.", metavar="NAME,..."),
    ] = ()
    tensorboard: Annotated[bool, _saving("The same as --report-to tensorboard.")] = False
    resume: Annotated[
        bool,
        _saving(
            "Continue the run in --output from its last checkpoint, with its settings where none are given; a larger "
            "--max-steps or --epochs lengthens it."
        ),
    ] = False
    overwrite: Annotated[bool, _saving("Replace the run in --output.")] = False
    dry_run: Annotated[bool, _saving("Check everything, say what would be done, and write nothing.")] = False

    @property
    def trackers(self) -> list[str]:
        more: tuple[Tracker, ...] = ("tensorboard",) if self.tensorboard else ()
        return sorted({*self.report_to, *more})


def logging_steps_of(steps: int) -> int:
    """Steps from one logged loss to the next in a run of ``steps``, where the user does not say."""
    return min(10, max(1, steps // 10))


# What a word after a method's name sets in `rankwise compare --methods METHOD+WORD`.
VARIANTS: dict[str, dict[str, Any]] = {
    **{kind: {"init": kind} for kind in ("pissa", "loftq", "eva", "orthogonal")},
    # The paper's ratio.
    "plus": {"loraplus_ratio": 16.0},
    "rslora": {"use_rslora": True},
}


def variant_of(name: str) -> tuple[str, dict[str, Any]]:
    """``lora+pissa`` as the method and the options of `rankwise train` that its words set.

    Raises ValueError for a method or a word that there is not, words that set the same, and words that the method has
    no use for.
    """
    method, *words = name.split("+")
    if method not in METHODS:
        raise ValueError(f"{method!r} is not a method")
    options: dict[str, Any] = {}
    idle = {option for names in idle_options(method).values() for option in names}
    for word in words:
        if word not in VARIANTS:
            raise ValueError(f"{word!r} is not a variant")
        if options.keys() & VARIANTS[word].keys():
            raise ValueError(f"two words of {name} set the same")
        if idle & VARIANTS[word].keys() or (word == "loftq" and method not in FOUR_BITS):
            raise ValueError(f"{method} has no use for {word}")
        options |= VARIANTS[word]
    return method, options


# Options besides AdapterOptions that need an adapter.
OF_ADAPTERS = ("init", "loraplus_ratio", "new_tokens")


def idle_options(method: str) -> dict[str, tuple[str, ...]]:
    """{reason: options of `rankwise train`} of those that have no effect on ``method``."""
    idle: dict[str, tuple[str, ...]] = {}
    if method not in FOUR_BITS:
        idle["only qlora and qdora make 4-bit weights"] = ("quant_type", "block_size", "double_quant")
    if method == "full":
        idle["it trains all weights and adds no adapter"] = (*ADAPTER, *OF_ADAPTERS)
    if method in BASELINES:
        idle["of the adapter's options this baseline takes --r alone"] = tuple(
            name for name in (*ADAPTER, *OF_ADAPTERS) if name != "r"
        )
    return idle

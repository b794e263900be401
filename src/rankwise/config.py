"""The settings of a training run. Imports no torch.

``TrainSettings`` holds the options of ``rankwise train``, which are also the keys of its YAML file. Each option is
declared in one table, from which others inherit:

    AdapterOptions            an adapter           LoraConfig (both in ``lora_config``)
    └── StepOptions           one training step    the memory plan's ``Workload``, and
        └── RunOptions        one training run     CompareSettings, whose runs share these values
            └── TrainSettings

``PlanSettings`` inherits StepOptions, ModelOptions and LengthOptions.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from rankwise.foreign import JsonObject
from rankwise.lora_config import ADAPTER, AdapterOptions, LoraConfig, init_of
from rankwise.methods import METHODS, METHODS_GROUP, is_known, method_of, methods_with, other_kinds
from rankwise.objectives import ObjectiveName
from rankwise.options import (
    LARGEST_NUMBER,
    Batch,
    Count,
    Length,
    NotNegative,
    Panel,
    Positive,
    Seed,
    Settings,
    Share,
    Tokens,
    WarmTemperature,
    Whole,
    comma_list,
    option,
    text_list,
)

QuantType = Literal["nf4", "fp4"]
Dtype = Literal["auto", "bfloat16", "float16", "float32"]
Products = Literal["auto", "bfloat16", "int8"]
Shares = Literal["auto", "on", "off"]
Device = Literal["auto", "cpu", "cuda", "mps"]
# As text: YAML reads 16 as a number.
BaseBits = Annotated[Literal["file", "16"] | None, BeforeValidator(lambda given: None if given is None else str(given))]
Tracker = Literal["wandb", "trackio", "tensorboard"]

# The model that `demo` stands for, and its name on the hub.
DEMO = "demo"
DEMO_HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

MODEL = "Hub id, folder, .gguf file, or `demo`."
TRAINING_DATA = "Training data: hub id, folder, .jsonl/.json/.csv/.tsv/.parquet/.txt file (also .gz), or `stdlib`."


_adapter = functools.partial(option, Panel.ADAPTER)
_training = functools.partial(option, Panel.TRAINING)
_device = functools.partial(option, Panel.DEVICE)
_saving = functools.partial(option, Panel.SAVING)
_objective = functools.partial(option, Panel.OBJECTIVE)


def _peft_init(value: str) -> bool | str:
    return True if value == "default" else value.replace("pissa:", "pissa_niter_")


def _checked_init(value: str) -> str:
    """Check ``--init``: ``pissa:4`` and the like, or PEFT's own names. Raises ValueError."""
    try:
        init_of(_peft_init(value))
    except ValueError:
        raise ValueError("give default, pissa, pissa:N or loftq") from None
    return value


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepOptions(AdapterOptions):
    """The options of one training step, which determine its memory."""

    # LoraConfig's name for this option is init_lora_weights.
    init: Annotated[
        str,
        AfterValidator(_checked_init),
        _adapter(
            "How A and B start: default, pissa or pissa:N (N iterations of a fast SVD), loftq.",
            metavar="INIT",
        ),
    ] = "default"
    quant_type: Annotated[QuantType, option(Panel.FOUR_BITS, "4-bit type of qlora and qdora.")] = "nf4"
    block_size: Annotated[int, option(Panel.FOUR_BITS, "Weights per 4-bit scale: a power of two from 32 to 4096.")] = 64
    double_quant: Annotated[bool, option(Panel.FOUR_BITS, "Keep the 4-bit scales in 8 bits.")] = True
    base_bits: Annotated[
        BaseBits,
        option(
            Panel.FOUR_BITS,
            "A GGUF base in the file's own bits (file), or expanded (16). Default: file for a .gguf on a CPU, with "
            "lora and dora.",
            metavar="file|16",
        ),
    ] = None
    batch_size: Annotated[Batch, _training("Rows per micro-batch.")] = 8
    max_length: Annotated[Length, _training("Tokens per row; longer rows are cut, counted and reported.")] = 1024
    optimizer: Annotated[str, _training("Optimizer, by transformers' name (paged_adamw_8bit, ...).")] = "adamw_torch"
    gradient_checkpointing: Annotated[bool, _device("Recompute activations: less memory, more time.")] = False
    activation_offloading: Annotated[
        bool, _device("Keep activations in CPU memory until the backward pass needs them (accelerators only).")
    ] = False
    label_smoothing: Annotated[Share, _training("Label smoothing.")] = 0.0
    # Jain et al. 2023, arXiv 2310.05914.
    neftune_noise_alpha: Annotated[
        Positive | None,
        _training("NEFTune: noise of X / sqrt(length x width) on the embeddings in training; 5 is usual."),
    ] = None
    packing: Annotated[bool, _training("Fill every row with several examples that do not see each other.")] = False
    share_prompts: Annotated[
        Shares,
        _device(
            "Compute what several rows of a micro-batch begin with once: auto (where the model permits it and nothing "
            "is dropped out), on, or off."
        ),
    ] = "auto"
    # False: the step runs in plain PyTorch and transformers, without rankwise's kernels and fused losses.
    fast: Annotated[
        bool,
        _device("Use rankwise's fused operators and CPU attention, train without padding, keep memory between steps."),
    ] = True

    products: Annotated[
        Products,
        _device(
            "Frozen products of adapted layers: int8 (8 bits, but for the last quarter of 100 steps or more), "
            "bfloat16 (the base's dtype), or auto: int8 if it is at least 1.2 times as fast and a measurement on the "
            "model and its first rows admits it."
        ),
    ] = "auto"

    def lora_config(self, method: str) -> LoraConfig:
        """The configuration of the method's adapter. Raises ConfigError (RW101) with every wrong field."""
        given = {name: getattr(self, name) for name in ADAPTER}
        kind = method_of(method).kind
        given |= {"use_dora": kind == "dora", "other_kind": kind if kind in other_kinds() else None}
        return LoraConfig(**given, init_lora_weights=_peft_init(self.init))


class ModelOptions(Settings):
    """How a model is downloaded."""

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
        option(Panel.TEXT, "Column with the prompt, if the data's columns have names of their own."),
    ] = None
    completion_column: Annotated[str | None, option(Panel.TEXT, "Column with the completion.")] = None

    @property
    def columns(self) -> JsonObject:
        """The prompt and completion columns as keyword arguments of the data readers."""
        return {"prompt_column": self.prompt_column, "completion_column": self.completion_column}


class LengthOptions(Settings):
    """The number of optimizer steps of a run, and the dtype of its base model."""

    gradient_accumulation: Annotated[Batch, _training("Micro-batches per optimizer step.")] = 1
    max_steps: Annotated[Count | None, _training("Optimizer steps; overrides --epochs.")] = None
    epochs: Annotated[float, _training("Passes over the training data.", gt=0, le=1e6)] = 1.0
    dtype: Annotated[Dtype, _device("Dtype of the base: auto is bfloat16 if the device has it.")] = "auto"


class RunOptions(ModelOptions, TextOptions, LengthOptions, StepOptions):
    """The options of ``rankwise train`` that all runs of a comparison share."""

    lr_scheduler_type: Annotated[str, _training("Schedule: linear, cosine, constant, ... (transformers).")] = "linear"
    warmup_steps: Annotated[Whole, _training("Steps over which the learning rate rises from 0.")] = 0
    weight_decay: Annotated[NotNegative, _training("AdamW's weight decay.")] = 0.0
    # Hayou et al. 2024, arXiv 2402.12354.
    loraplus_ratio: Annotated[
        float | None, _training("LoRA+: the learning rate of B divided by that of A; 16 is usual.", ge=1, le=1e6)
    ] = None
    max_grad_norm: Annotated[NotNegative, _training("Gradients are clipped to this norm; 0 switches it off.")] = 1.0
    early_stopping: Annotated[Count | None, _training("Stop after N evaluations in a row without a better loss.")] = (
        None
    )

    device: Annotated[Device, _device("Device; auto takes a CUDA GPU, else the CPU.")] = "auto"
    ignore_plan: Annotated[bool, _device("Train although the predicted memory is more than there is.")] = False

    save_steps: Annotated[
        Count | None, _saving("Checkpoint every N steps; default: --eval-steps, else a tenth of the run.")
    ] = None
    save_total_limit: Annotated[Count, _saving("Checkpoints to keep, in addition to the best one.")] = 2
    eval_steps: Annotated[
        Count | None,
        _saving("Evaluate every N steps; default: a tenth of the run, or rarer for a fifth of its time at most."),
    ] = None
    eval_limit: Annotated[
        Whole | None,
        _saving("Evaluate on the first N rows; 0: all. Default: all, or 256 evenly spaced ones if there are more."),
    ] = None
    logging_steps: Annotated[
        Count | None, _saving("Log every N steps, and the first and the last; default: a tenth of the run, at most 10.")
    ] = None


class RetainOptions(Settings):
    """What a run must not forget."""

    retain: Annotated[
        str | None,
        option(
            Panel.MEASURED,
            "Rows of abilities to keep: data in any of the forms of --data, or a task of lm-evaluation-harness with "
            "choices (TASK, or TASK=D with its data). Its loss is measured before training and after.",
            metavar="D",
        ),
    ] = None
    retain_margin: Annotated[
        float,
        option(Panel.MEASURED, "A loss on what --retain names that rises by less than this share is kept.", gt=0, lt=1),
    ] = 0.02


class PreferenceOptions(Settings):
    """The objective, and the options of the preference losses. Options that the objective does not use stay None."""

    objective: Annotated[
        ObjectiveName,
        _objective(
            "What to learn from. sft: demonstrations; dpo: pairs of a better and a worse answer; kto: answers marked "
            "good or bad; grpo: rewards; classify: texts with labels."
        ),
    ] = "sft"
    beta: Annotated[
        Positive | None,
        _objective("dpo, kto, grpo: how strongly the model is kept near its reference; default: 0.1, of grpo 0."),
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
    """The options of every objective."""

    reward: Annotated[
        Sequence[str] | None,
        BeforeValidator(text_list),
        _objective(
            "grpo: what scores an answer: FILE.py:NAME, a function in a Python file; or answer, format=REGEX, "
            "length=N. May be given several times; the rewards are added.",
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
        int | None, _objective("grpo: answers to each prompt, compared with each other; default: 8.", ge=2, le=2**16)
    ] = None
    max_completion_length: Annotated[Tokens | None, _objective("grpo: longest answer, in tokens; default: 256.")] = None
    temperature: Annotated[
        WarmTemperature | None, _objective("grpo: answers are drawn at this temperature; default: 1.")
    ] = None


def _checked_rate(value: object) -> object:
    """A rate above 0, ``auto``, or ``auto:`` and at least two different rates. Raises ValueError."""
    if value is None:
        return None
    word, colon, given = str(value).partition(":")
    is_search = word == "auto"
    try:
        rates = [float(rate) for rate in (comma_list(given) if is_search else [str(value)])]
    except ValueError:
        rates = [math.nan]
    too_few = bool(colon) and not len(set(rates)) == len(rates) > 1
    if too_few or not all(0 < rate <= LARGEST_NUMBER for rate in rates):
        raise ValueError("give a number above 0, auto, or auto: with two or more different rates above 0")
    return value if is_search else rates[0]


class TrainSettings(ObjectiveOptions, RetainOptions, RunOptions):
    """The options of ``rankwise train``, and the keys of its ``--config`` file."""

    model: Annotated[str, option(Panel.MODEL, MODEL, metavar="M")]
    data: Annotated[str, option(Panel.MODEL, TRAINING_DATA, metavar="D")]
    output: Annotated[Path, option(Panel.MODEL, "Run folder to write.", metavar="DIR")]
    eval_data: Annotated[
        str | None,
        option(Panel.MODEL, "Evaluation data, in any of the same forms.", metavar="E"),
    ] = None
    method: Annotated[
        str,
        AfterValidator(lambda name: _known_method(name)),
        option(
            Panel.MODEL,
            "LoRA; QLoRA (4-bit base); DoRA; QDoRA; all weights; or a method of another package.",
            metavar="|".join(METHODS),
        ),
    ] = "lora"
    adapter: Annotated[
        Path | None,
        option(
            Panel.MODEL,
            "Continue to train this adapter: a run folder or a PEFT folder. With --objective dpo or kto, a frozen copy "
            "of it is the reference.",
            metavar="A",
        ),
    ] = None
    skip_bad_rows: Annotated[
        Whole, option(Panel.MODEL, "Leave out up to N bad rows of each file, and list them; with more, stop.")
    ] = 0

    new_tokens: Annotated[
        str | None,
        _adapter(
            "Tokens to add to the vocabulary, or that it has and whose rows are to train: separated by commas, or a "
            "file with one token on each line. Of the embedding and the head, only the rows of these tokens train.",
            metavar="FILE|A,B",
        ),
    ] = None
    learning_rate: Annotated[
        float | str | None,
        BeforeValidator(_checked_rate),
        _training(
            "Peak learning rate; default: by the model's width, method and alpha. auto tries three around the default, "
            "and auto:RATE,RATE,... others, in short runs judged on training rows that these do not see.",
            metavar="X|auto",
        ),
    ] = None
    budget: Annotated[
        Positive | None,
        _training(
            "With --learning-rate auto: steps of all short runs together, as a share of the run's steps; default: 0.25."
        ),
    ] = None
    seed: Annotated[Seed, _training("Seed of the adapter, the data order and dropout.")] = 0
    devices: Annotated[
        Batch | None,
        _device("Train in N processes on this machine, each on a GPU of its own; on CPUs they share the cores."),
    ] = None
    strategy: Annotated[
        Literal["ddp", "fsdp"] | None,
        _device(
            "With several processes: each holds the whole model (ddp) or its part of the weights (fsdp). Default: ddp."
        ),
    ] = None
    cache: Annotated[
        Path | None,
        _device(
            "Keep the prepared base in this folder, from which later runs map it. Default: on a CPU, the user's cache."
        ),
    ] = None
    mmap: Annotated[
        bool, _device("On a CPU, read frozen weights from mapped files; --no-mmap copies them into memory.")
    ] = True

    report_to: Annotated[
        tuple[Tracker, ...],
        BeforeValidator(comma_list),
        _saving("Report to these trackers too: wandb, trackio, tensorboard.", metavar="NAME,..."),
    ] = ()
    resume: Annotated[
        bool,
        _saving(
            "Continue the run in --output from its last checkpoint, with its settings if none are given; a larger "
            "--max-steps or --epochs lengthens it."
        ),
    ] = False
    overwrite: Annotated[bool, _saving("Replace the run in --output.")] = False

    @property
    def searches(self) -> bool:
        """Whether short runs find the learning rate."""
        return isinstance(self.learning_rate, str)

    @property
    def searched_rates(self) -> tuple[float, ...]:
        """The rates that ``--learning-rate auto:RATE,...`` names, lowest first."""
        _, _, given = str(self.learning_rate).partition(":")
        return tuple(sorted(float(rate) for rate in comma_list(given)))

    @property
    def trackers(self) -> list[str]:
        return sorted(set(self.report_to))


def logging_steps_of(steps: int) -> int:
    """The default of ``logging_steps`` for a run of ``steps`` optimizer steps: a tenth, from 1 to 10."""
    return min(10, max(1, steps // 10))


# {word: (its name for people, the options that it sets)} for `rankwise compare --methods METHOD+WORD`.
VARIANTS: dict[str, tuple[str, JsonObject]] = {
    "pissa": ("PiSSA", {"init": "pissa"}),
    "loftq": ("LoftQ", {"init": "loftq"}),
    # The ratio that the LoRA+ paper recommends.
    "plus": ("LoRA+", {"loraplus_ratio": 16.0}),
    "rslora": ("rsLoRA", {"use_rslora": True}),
    # The layers of LoRA's paper, in place of all linear ones.
    "qv": ("q, v", {"target_modules": ["q_proj", "v_proj"]}),
    "int8": ("8-bit products", {"products": "int8"}),
}
# A word of its own for each rank: ``lora+r4``.
RANK = re.compile(r"r([1-9]\d*)")


def _known_method(name: str) -> str:
    if not is_known(name):
        installed = (entry.name for entry in entry_points(group=METHODS_GROUP))
        raise ValueError(f"give {', '.join((*METHODS, *installed))}")
    return name


def variant_of(name: str) -> tuple[str, JsonObject]:
    """Split ``lora+pissa`` into the method and the options of `rankwise train` that its words set. ``rN``, as in
    ``lora+r4``, sets the rank N and alpha = 2 N.

    Raises ValueError for an unknown method, an unknown word, two words that set the same option, or a word that has no
    effect on the method.
    """
    method, *words = name.split("+")
    if not is_known(method):
        raise ValueError(f"{method!r} is not a method")
    options: JsonObject = {}
    idle = {option for names in idle_options(method).values() for option in names}
    for word in words:
        rank = RANK.fullmatch(word)
        chosen = {"r": int(rank[1]), "lora_alpha": 2.0 * int(rank[1])} if rank else VARIANTS.get(word, (word, None))[1]
        if chosen is None:
            raise ValueError(f"{word!r} is not a variant")
        if options.keys() & chosen.keys():
            raise ValueError(f"two words of {name} set the same")
        if idle & chosen.keys() or (word == "loftq" and not method_of(method).four_bits):
            raise ValueError(f"{method} has no use for {word}")
        options |= chosen
    return method, options


def keeps_file_bits(asked: str | None, method: str, *, is_file: bool, on_cpu: bool) -> bool:
    """Whether a base stays in its GGUF file's own bits, by ``--base-bits`` or by default; ``is_file``: whether the
    user named a GGUF file."""
    row = method_of(method)
    return is_file and on_cpu and row.has_adapter and not row.four_bits if asked is None else asked == "file"


# Options outside of AdapterOptions that need an adapter.
OF_ADAPTERS = ("init", "loraplus_ratio", "new_tokens")


def idle_options(method: str) -> dict[str, tuple[str, ...]]:
    """{reason: options of `rankwise train` that have no effect on ``method``}."""
    idle: dict[str, tuple[str, ...]] = {}
    row = method_of(method)
    if not row.four_bits:
        packed = " and ".join(methods_with(four_bits=True))
        idle[f"only {packed} make 4-bit weights"] = (
            "quant_type",
            "block_size",
            "double_quant",
        )
    if row.trains_all:
        idle["it trains all weights and adds no adapter"] = (*ADAPTER, *OF_ADAPTERS, "products")
    if row.is_guest:
        idle["of the adapter's options this method takes only --r"] = tuple(
            name for name in (*ADAPTER, *OF_ADAPTERS) if name != "r"
        )
    return idle

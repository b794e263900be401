"""The settings of an adapter: ``AdapterOptions`` of the commands, and ``LoraConfig``, which uses PEFT's names.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import InitVar
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, Field

from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject, wrong_fields
from rankwise.methods import other_kinds
from rankwise.options import (
    ALL_LINEAR,
    Modules,
    Names,
    Panel,
    Positive,
    Rank,
    Share,
    Whole,
    comma_list,
    from_text,
    named_parts,
    named_values,
    option,
)

Bias = Literal["none", "all", "lora_only"]
ForMerge = Literal["nf4", "q4_0"]

_adapter = functools.partial(option, Panel.ADAPTER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterOptions:
    """The options of an adapter, which ``train``, ``compare`` and ``plan`` inherit."""

    # A is (r, in), B is (out, r).
    r: Annotated[Rank, _adapter("Rank of the adapter; for a method of another package its size.")] = 16
    # s = lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
    lora_alpha: Annotated[Positive, _adapter("Scale of the adapter: the update is multiplied by alpha / r.")] = 32
    # Dropout acts on the input of A, not on the input of the frozen W.
    lora_dropout: Annotated[Share, _adapter("Dropout on the low-rank path.")] = 0.0
    # A list matches a module's whole name or its end after a dot; a string is a full-match regular expression;
    # "all-linear" is every linear layer but the output head.
    target_modules: Annotated[
        Modules | None, _adapter('Module names, comma-separated; or a regular expression; or "all-linear".')
    ] = ALL_LINEAR
    # Names match as in a list of target_modules. They are adapted in addition to target_modules; target_modules=[]
    # adapts only the experts. As in PEFT, exclude_modules, layers_to_transform and layers_pattern do not apply to
    # them; a parameter's whole name selects one layer.
    target_parameters: Annotated[
        Names | None,
        _adapter(
            "Stacked experts to adapt as well, by parameter (mlp.experts.down_proj). "
            'With --target-modules "", only these are adapted.'
        ),
    ] = None
    # Names match as in target_modules.
    exclude_modules: Annotated[Modules | None, _adapter("Modules that get no adapter, by name.")] = None
    # The trained modules (a new output head, for example) are saved with the adapter. A tied head is untied. A name
    # stands for every module whose name ends in it, as in PEFT, not only after a dot.
    modules_to_save: Annotated[
        Names | None, _adapter("Modules whose own weights train, without an adapter, comma-separated.")
    ] = None
    # Kalajdzievski 2023.
    use_rslora: Annotated[bool, _adapter("Scale by alpha / sqrt(r).")] = False
    for_merge: Annotated[
        ForMerge | None,
        _adapter(
            "Train the weights that a merged 4-bit file will hold: nf4 (bitsandbytes) or q4_0 (llama.cpp). Products "
            "use the rounded sum of base and adapter, so rounding it for the file loses nothing."
        ),
    ] = None
    bias: Annotated[Bias, _adapter("Biases of the base to train: none, all, or those of adapted layers.")] = "none"
    # It does not restrict a whole module name in target_modules.
    layers_to_transform: Annotated[
        Whole | Sequence[Whole] | None,
        from_text(comma_list),
        _adapter("Adapt only these layers, counted from 0; needs a list of --target-modules.", metavar="N,..."),
    ] = None
    # A key matches as the regular expression (.*\.)?(KEY)$.
    rank_pattern: Annotated[
        Mapping[str, Rank],
        from_text(named_values),
        Field(default_factory=dict),
        _adapter(
            "A different rank for some modules: q_proj=4,v_proj=8; a name may be a regular expression.",
            metavar="NAME=R,...",
        ),
    ] = dataclasses.field(default_factory=dict)
    alpha_pattern: Annotated[
        Mapping[str, Positive],
        from_text(named_values),
        Field(default_factory=dict),
        _adapter("A different --lora-alpha for some modules, written like --rank-pattern.", metavar="NAME=X,..."),
    ] = dataclasses.field(default_factory=dict)
    # As in loralib's MergedLinear, {"c_attn": [True, False, True]} adapts q and v of GPT-2 and freezes k. Keys match as
    # in target_modules.
    enable_lora: Annotated[
        Mapping[str, Sequence[bool]],
        from_text(named_parts),
        Field(default_factory=dict),
        _adapter(
            "Adapt only some equal parts of a fused layer: c_attn=1:0:1 leaves out the second of three.",
            metavar="NAME=1:0:1,...",
        ),
    ] = dataclasses.field(default_factory=dict)


ADAPTER = tuple(field.name for field in dataclasses.fields(AdapterOptions))


class Init(NamedTuple):
    """How A and B start."""

    # default, random, pissa or loftq.
    kind: str
    # pissa: subspace iterations of a randomised SVD; None means an exact SVD.
    niter: int | None = None


_INIT = re.compile(r"(?P<kind>pissa|loftq)((?<=pissa)_niter_(?P<niter>\d{1,3}))?")


def init_of(value: bool | str) -> Init:
    """Parse ``init_lora_weights``. Raises ValueError for a value that rankwise does not support."""
    if isinstance(value, bool):
        return Init("default" if value else "random")
    found = _INIT.fullmatch(value)
    if found is None:
        raise ValueError("give true, false, pissa, pissa_niter_N or loftq")
    return Init(found["kind"], None if found["niter"] is None else int(found["niter"]))


def _each_once(ids: Sequence[int]) -> Sequence[int]:
    if len(set(ids)) < len(ids):
        raise ValueError("it names a token twice")
    return ids


TokenIds = Annotated[Sequence[Whole], AfterValidator(_each_once)]

# Fields of PEFT that change what an adapter computes, each with the only value that rankwise has.
FIXED_FIELDS: JsonObject = {
    "alora_invocation_tokens": None,
    "arrow_config": None,
    "kasa_config": None,
    "layer_replication": None,
    "lora_bias": False,
    "megatron_config": None,
    "use_bdlora": None,
    "use_qalora": False,
    "velora_config": None,
}
# Those that change only how an adapter starts and trains: a saved one has left them behind.
_OF_TRAINING = (
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "loftq_config",
    "lora_ga_config",
    "monteclora_config",
)


def unsupported(given: Fields, names: Iterable[str] = tuple(FIXED_FIELDS)) -> list[str]:
    """Those of PEFT's fields ``names`` whose value in ``given`` would change the result."""
    return [name for name in names if given.get(name) not in (None, False, [], {})]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _PeftFields:
    """The fields of PEFT's LoraConfig that `LoraConfig` takes and does not keep."""

    # They describe an adapter, or follow from its model, and have no effect.
    auto_mapping: InitVar[Any] = None
    base_model_name_or_path: InitVar[str | None] = None
    fan_in_fan_out: InitVar[bool] = False
    inference_mode: InitVar[bool] = False
    megatron_core: InitVar[str | None] = None
    peft_version: InitVar[str | None] = None
    qalora_group_size: InitVar[int | None] = None
    revision: InitVar[str | None] = None
    runtime_config: InitVar[Any] = None
    task_type: InitVar[str | None] = None
    # They would change the result, so that other values than PEFT's defaults are refused.
    alora_invocation_tokens: InitVar[Any] = None
    arrow_config: InitVar[Any] = None
    corda_config: InitVar[Any] = None
    ensure_weight_tying: InitVar[bool] = False
    eva_config: InitVar[Any] = None
    kasa_config: InitVar[Any] = None
    layer_replication: InitVar[Any] = None
    lora_bias: InitVar[bool] = False
    lora_ga_config: InitVar[Any] = None
    loftq_config: InitVar[Any] = None
    megatron_config: InitVar[Any] = None
    monteclora_config: InitVar[Any] = None
    peft_type: InitVar[str | None] = None
    use_bdlora: InitVar[Any] = None
    use_qalora: InitVar[bool] = False
    velora_config: InitVar[Any] = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig(_PeftFields, AdapterOptions):
    """LoRA (Hu et al. 2021) or, with ``use_dora``, DoRA (Liu et al. 2024). Names and meanings of the fields are PEFT's.

    Weights are (out, in), A is (r, in), B is (out, r) and s is ``lora_alpha / r``, or ``lora_alpha / sqrt(r)`` with
    ``use_rslora``. LoRA computes ``W x + s B A x``, and DoRA ``m / ||W + s B A|| * (W + s B A) x`` with a norm per row.

    Raises:
        ConfigError: RW101, with every wrong field in one message.
    """

    # DoRA: train a magnitude per output row in addition to A and B.
    use_dora: bool = False
    # The kind of the adapters, by its name in ``methods``, where it is neither LoRA nor DoRA. PEFT does not read these.
    other_kind: str | None = None
    # Name of the module list whose indices layers_to_transform means, if it is not the first list in the path.
    layers_pattern: str | Sequence[str] | None = None
    # True: A is Kaiming-uniform and B zero, so that training starts at the base model. False: B is random (for tests).
    # "pissa", "pissa_niter_N" and "loftq" as in PEFT. ``adapters.beginning`` defines them.
    init_lora_weights: Annotated[bool | str, AfterValidator(init_of)] = True
    # Token ids whose embedding rows train, such as those of new tokens; all other rows stay frozen. A list applies to
    # the input embedding; a mapping gives {module: ids} of embeddings and heads. A tied head shares the trained rows.
    trainable_token_indices: TokenIds | Mapping[str, TokenIds] | None = None

    def __post_init__(self, *given: Any) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _with_tuples(getattr(self, field.name)))
        if isinstance(self.modules_to_save, str):
            object.__setattr__(self, "modules_to_save", (self.modules_to_save,))
        if isinstance(self.layers_to_transform, int):
            object.__setattr__(self, "layers_to_transform", (self.layers_to_transform,))
        object.__setattr__(self, "target_parameters", self.target_parameters or None)
        problems = [*_peft_problems(dict(zip(_PeftFields.__annotations__, given)), self.kind)] + (
            wrong_fields(self)
            or [*_pattern_problems(self)]
            or [
                *_kind_problems(self),
                *_init_problems(self),
                *_target_problems(self),
            ]
        )
        if problems:
            raise ConfigError("RW101", "; ".join(problems) + ".")

    @property
    def kind(self) -> str:
        """The kind of the adapter, of `rankwise.methods`."""
        return self.other_kind or ("dora" if self.use_dora else "lora")

    @property
    def init(self) -> Init:
        """``init_lora_weights``, parsed."""
        return init_of(self.init_lora_weights)

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
        """Whether ``modules_to_save`` names the module at ``path`` or one that contains it. A key is any end of a name,
        as in PEFT: ``norm`` stands for ``input_layernorm`` too.
        """
        keys, parts = tuple(self.modules_to_save or ()), path.split(".")
        return any(".".join(parts[:count]).endswith(keys) for count in range(1, len(parts) + 1))


def _with_tuples(value: Any) -> Any:
    """``value`` with lists, sets and ranges as tuples, also inside a mapping."""
    if isinstance(value, Mapping):
        return {key: _with_tuples(item) for key, item in value.items()}
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str | bytes) else value


def _peft_problems(given: Fields, kind: str) -> Iterator[str]:
    """A message for each of PEFT's fields that would change the result."""
    for name in unsupported(given, (*FIXED_FIELDS, *_OF_TRAINING)):
        yield f"{name} is {given[name]!r}, which changes the result and is not supported; leave it out, or use PEFT"
    if given["peft_type"] not in (None, kind.upper(), "LORA"):
        yield f"peft_type is {given['peft_type']!r}, and this is LORA (LoRA and DoRA); leave it out, or use PEFT"


def _pattern_problems(config: LoraConfig) -> Iterator[str]:
    """A message for each regular expression that does not compile."""
    patterns = {name: getattr(config, name) for name in ("target_modules", "exclude_modules")}
    odd = [(f"{name} is {value!r}", value) for name, value in patterns.items() if isinstance(value, str)]
    layers = config.layers_pattern or ()
    # Compiled inside a group, as they are matched: inline flags such as (?i) fail only there.
    each = [layers] if isinstance(layers, str) else layers
    odd += [(f"layers_pattern has {value!r}", f"({value})") for value in each]
    for name in ("rank_pattern", "alpha_pattern"):
        odd += [(f"{name}[{key!r}] is set", f"({key})") for key in getattr(config, name)]
    for described, pattern in odd:
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            yield f"{described}, which is not a regular expression ({error})"


def _kind_problems(config: LoraConfig) -> Iterator[str]:
    if config.other_kind is None:
        return
    if config.other_kind not in other_kinds():
        yield f"other_kind is {config.other_kind!r}; give one of: {', '.join(other_kinds()) or 'none there'}"
    idle = [name for name in ("use_dora", "target_parameters", "enable_lora", "for_merge") if getattr(config, name)]
    if idle := [*idle, *(["init_lora_weights"] if config.init.kind in ("pissa", "loftq") else [])]:
        yield f"{', '.join(idle)}: for LoRA and DoRA, and not for {config.kind}; leave it out"


def _init_problems(config: LoraConfig) -> Iterator[str]:
    given = f"init_lora_weights is {config.init_lora_weights!r}"
    if config.init.kind in ("default", "random"):
        return
    idle = {"enable_lora": "a part of a fused layer", "target_parameters": "stacked experts"}
    idle |= {"for_merge": "the sum of base and adapter"} if config.init.kind == "pissa" else {}
    yield from (
        f"{given} with {name}, and {place} can only start with the default initialisation"
        for name, place in idle.items()
        if getattr(config, name)
    )


def _target_problems(config: LoraConfig) -> Iterator[str]:
    if config.target_modules is not None and len(config.target_modules) == 0 and not config.target_parameters:
        yield 'target_modules is empty; give a list of names, a regular expression, or "all-linear"'
    if "" in (config.modules_to_save or ()):
        yield "modules_to_save holds an empty name, in which every module's name ends; leave it out"
    # As in PEFT, stacked experts take only LoRA.
    if config.target_parameters is not None and config.use_dora:
        yield (
            "use_dora is set with target_parameters, and stacked experts take only LoRA: DoRA's norms would read all "
            "their weights once more in each step, also of experts that no token visits; take LoRA (--method lora or "
            "qlora), or leave target_parameters out"
        )
    if config.target_parameters is not None and config.lora_dropout:
        yield (
            f"lora_dropout is {config.lora_dropout!r} with target_parameters, and stacked experts take no dropout; set "
            "it to 0 or leave target_parameters out"
        )
    idle = [name for name in ("lora_dropout", "target_parameters") if getattr(config, name)] if config.for_merge else []
    if idle:
        yield f"for_merge trains whole weights of linear layers, without {' and '.join(idle)}; leave one of them out"
    if config.layers_to_transform is not None and isinstance(config.target_modules, str):
        yield (
            "layers_to_transform goes with a list of target_modules, and target_modules is "
            f"{config.target_modules!r}; give the module names as a list"
        )
    if config.layers_pattern and config.layers_to_transform is None:
        yield (
            f"layers_pattern is {config.layers_pattern!r} without layers_to_transform, whose module list it names; "
            "give both"
        )
    for key, parts in config.enable_lora.items():
        if not any(parts):
            yield f"enable_lora[{key!r}] is {parts!r} and must be a list that enables at least one part"

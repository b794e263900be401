"""The layers of a model by name and size, from its config.json or GGUF header alone. Imports no torch.

    module    path, kind, (in, out), bias     for every module that holds parameters

So parameter counts, of the model or of an adapter, are exact by construction.
h hidden width, f MLP width, V vocabulary, d head width, E experts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from rankwise.errors import ModelError
from rankwise.foreign import Fields, Json, JsonObject
from rankwise.models.gguf_file import read_gguf_header
from rankwise.models.source import ModelSource

# conv1d: a linear layer stored transposed; plain: stacked experts and routers, which no adapter can wrap.
Kind = Literal["linear", "conv1d", "embedding", "norm", "plain"]


@dataclasses.dataclass(frozen=True)
class Module:
    """One module: ``parameters`` includes its bias. For norms and plain tensors ``inputs`` is 0."""

    name: str
    kind: Kind
    inputs: int = 0
    outputs: int = 0
    bias: bool = False
    # Parameters of a norm or of plain tensors.
    extra: int = 0

    # Shapes (E, out, in) of the stacked experts among the plain tensors.
    stacks: tuple[tuple[int, int, int], ...] = ()

    @property
    def weights(self) -> int:
        return self.inputs * self.outputs + self.extra

    @property
    def parameters(self) -> int:
        return self.weights + (self.outputs if self.bias else 0)

    @property
    def is_linear(self) -> bool:
        return self.kind in ("linear", "conv1d")

    @property
    def is_adaptable(self) -> bool:
        return self.is_linear or self.kind == "embedding"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of a model that its memory depends on."""

    family: str
    hidden: int
    layers: int
    # Width of the dense MLP, or of one expert.
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    max_positions: int | None
    tied: bool
    modules: tuple[Module, ...]
    experts: int = 0
    experts_per_token: int = 0
    # Width of the expert that sees every token.
    shared_mlp: int = 0
    # Norms of q and k in a layer: one for each head, or two over all heads; or none.
    qk_norms: int = 0
    fused_qkv: bool = False
    norms_per_layer: int = 2
    # The base model's dropout on hidden states.
    dropout: float = 0.0
    # The base model's dropout on attention weights.
    attention_dropout: float = 0.0
    window: int | None = None
    # Share of the layers whose attention is limited to a ``window`` of tokens.
    windowed_share: float = 0.0
    # Whether attention is eager (one operation after the other) in transformers.
    eager: bool = False
    # Whether attention scores pass a tanh.
    softcapped: bool = False
    # Whether logits pass a tanh.
    capped_logits: bool = False
    # For a multimodal model: the name prefix of its language part.
    text: str = ""

    @property
    def queries(self) -> int:
        """The width of the queries: heads d."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """The width of the keys: key-value heads times d."""
        return self.kv_heads * self.head_dim

    @property
    def parameters(self) -> int:
        """The number of parameters; tied ones count once."""
        head = self.modules[-1].parameters if self.tied else 0
        return sum(module.parameters for module in self.modules) - head


class ConfigFields:
    """A config's fields. Missing and wrong ones are collected and raised together."""

    def __init__(self, config: Fields, name: str) -> None:
        self.config, self.name = config, name

    def required(self, *names: str) -> list[int]:
        """Whole numbers above 0. Raises ModelError (RW326) that names all that are missing or wrong."""
        wrong = [
            f"{name} is missing" if self.config.get(name) is None else f"{name} is {self.config[name]!r}"
            for name in names
            if not _is_count(self.config.get(name))
        ]
        wrong = wrong or [
            f"{name} is {self.config[name]:,}, and more than {MOST_LAYERS:,} are not planned"
            for name in names
            if name in LAYER_COUNTS and self.config[name] > MOST_LAYERS
        ]
        if wrong:
            raise ModelError(
                "RW326",
                f"the config of {self.name} does not give the sizes that a plan needs (whole numbers above 0): "
                f"{', '.join(wrong)}; take the config.json that came with the model.",
            )
        return [self.config[name] for name in names]

    def count(self, name: str, default: int) -> int:
        """An integer field, or ``default`` (transformers') where it is missing."""
        if self.config.get(name) is None:
            return default
        return self.required(name)[0]

    def flag(self, name: str, default: bool) -> bool:
        """A field that is true or false. Raises ModelError (RW326) otherwise: the text "false" would count as true."""
        value = self.config.get(name)
        if value not in (None, False, True):
            raise self._wrong(name, "true or false")
        return default if value is None else bool(value)

    def part(self, name: str) -> ConfigFields:
        """The config inside this one. Raises ModelError (RW326) where there is none."""
        found = self.config.get(name)
        if not isinstance(found, Mapping):
            raise ModelError(
                "RW326", f"the config of {self.name} has no {name}; take the one that came with the model."
            )
        return ConfigFields(found, f"{self.name} ({name})")

    def with_defaults(self, defaults: Fields) -> ConfigFields:
        """The same fields, with ``defaults`` for those that the config lacks."""
        given = {name: value for name, value in self.config.items() if value is not None}
        return ConfigFields({**defaults, **given}, self.name)

    def share(self, name: str, default: float) -> float:
        """A number from 0 to 1, such as a dropout. Raises ModelError (RW326) for anything else."""
        value = self.config.get(name)
        if value is None:
            return default
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise self._wrong(name, "a number from 0 to 1")
        return float(value)

    def entries(self, name: str) -> list[Json]:
        """A list field (of layers, or of one value per layer); empty where it is missing. Raises ModelError (RW326) for
        another type."""
        value = self.config.get(name)
        if value is not None and not isinstance(value, list):
            raise self._wrong(name, "a list")
        return value or []

    @property
    def max_positions(self) -> int | None:
        """The number of positions; None where the config has none. Raises ModelError (RW326) for a wrong value."""
        names = ("max_position_embeddings", "n_positions")
        given = [name for name in names if self.config.get(name) is not None]
        return self.required(given[0])[0] if given else None

    def _wrong(self, name: str, wanted: str) -> ModelError:
        return ModelError(
            "RW326",
            f"in the config of {self.name}, {name} is {self.config[name]!r} and must be {wanted}; take the config.json "
            "that came with the model.",
        )


MOST_LAYERS = 10_000
# Each layer becomes objects, so an untrusted config.json must not name millions of them.
LAYER_COUNTS = ("num_hidden_layers", "n_layer")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


GGUF_FIELDS = {
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "context_length": "max_position_embeddings",
    "expert_count": "num_local_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
GGUF_GPT2 = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "intermediate_size": "n_inner",
    "max_position_embeddings": "n_positions",
}
GGUF_FAMILIES = {"gemma3": "gemma3_text", "qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}


def gguf_config(source: ModelSource) -> JsonObject:
    """A GGUF header as fields of config.json; the vocabulary and a tied head come from its tensors."""
    assert source.path is not None
    header = read_gguf_header(source.path)
    family = header.metadata["general.architecture"]
    config = {ours: header.metadata.get(f"{family}.{theirs}") for theirs, ours in GGUF_FIELDS.items()}
    if family == "llama" and config["num_local_experts"]:
        family = "mixtral"
    if family in ("qwen2moe", "qwen3moe"):
        config["num_experts"] = config["num_local_experts"]
    table = header.tensors.get("token_embd.weight")
    config["vocab_size"] = table.shape[-1] if table else None
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    if family == "gpt2":
        config |= {theirs: config.pop(ours) for ours, theirs in GGUF_GPT2.items()}
    return {**config, "model_type": GGUF_FAMILIES.get(family, family)}

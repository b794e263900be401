"""The facts of a model that determine the speed of training, from config.json or a GGUF header. Imports no torch.

L layers, h width, V vocabulary, E experts, of which e process each token.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path

from rankwise.foreign import Fields
from rankwise.models.folder import read_config
from rankwise.models.gguf_file import read_gguf_header
from rankwise.models.load import config_table_rows
from rankwise.models.source import ModelSource
from rankwise.planning.architectures import FAMILIES, shape_of
from rankwise.planning.shape import Shape, gguf_config

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")

# transformers' names of quantized formats that support adapters (rankwise.adapters.base_layer).
PACKED_FORMATS = ("gptq", "awq", "hqq", "torchao")


@dataclasses.dataclass(frozen=True)
class Stored:
    """The quantization of the weights in the files, from ``quantization_config`` in config.json."""

    # transformers' quant_method: gptq, fp8, bitsandbytes, ...
    format: str
    # Whether the format is bitsandbytes' 4 bits, on which training can run directly.
    four_bit: bool = False
    double_quant: bool = False
    # For another library's format that supports adapters: bits of a weight, and number of weights that share a scale
    # (0: a whole row or matrix).
    bits: int = 0
    group: int = 0

    @property
    def note(self) -> str:
        """A note for the plan, whose rows count the original, dense weights."""
        if self.bits:
            return (
                f"the files hold weights in {self.bits} bits ({self.format}): lora and dora train over these weights, "
                "with these sizes; they cannot be quantized again (RW316), so the sizes of qlora and qdora are for the "
                "original"
            )
        if not self.four_bit:
            return (
                f"the files hold quantized weights ({self.format}), which cannot be quantized again (RW316): these are "
                "the sizes for the original"
            )
        double = "with" if self.double_quant else "without"
        return (
            f"the files hold 4-bit weights already ({self.format}, {double} double quantization): training takes them "
            "as they are, with lora as with qlora; these are the sizes for the original"
        )


def stored_quantization(config: Fields) -> Stored | None:
    """The quantization of the stored weights; None for plain weights."""
    stored = config.get("quantization_config")
    if not isinstance(stored, Mapping) or not stored:
        return None
    # As in `rewrite_bitsandbytes_config`, but without torch.
    four_bit = bool(stored.get("load_in_4bit") or stored.get("_load_in_4bit"))
    name = stored.get("quant_method") or ("bitsandbytes" if four_bit else "by no named method")
    if not four_bit and name in PACKED_FORMATS:
        bits, group = _packing(stored)
        return Stored(str(name), bits=bits, group=group)
    return Stored(str(name), four_bit, four_bit and bool(stored.get("bnb_4bit_use_double_quant")))


def _packing(stored: Fields) -> tuple[int, int]:
    """(bits, group size) of another library's format; 0 where the config does not give them in a known way."""
    text = json.dumps(stored, default=str)
    bits = re.search(r'"(?:w_?bit|n?bits)": (\d)|int(\d)_?weight', text, re.IGNORECASE)
    group = re.search(r'"(?:q_)?group_size": (\d+)', text)
    return int(bits[1] or bits[2]) if bits else 0, int(group[1]) if group else 0


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model; 0 where the config does not give them."""

    layers: int
    width: int
    vocabulary: int
    head_is_tied: bool
    # Parameters of experts that a token does not visit: L (E - e) 3 h w with the width w of an expert.
    idle_expert_parameters: int = 0
    # Share of the experts that process a token: e / E.
    visited_share: float = 1.0
    experts: int = 0
    # Rows of a table of learned positions, the longest possible row; None without such a table.
    position_rows: int | None = None
    # The quantization of the weights in the files, if any.
    stored: Stored | None = None

    @property
    def head_parameters(self) -> int:
        """The parameters of the head: V h."""
        return self.vocabulary * self.width

    def matrix_parameters(self, total: int) -> int:
        """The weights that multiply each token: all except an untied embedding and the idle experts."""
        return max(0, self.read_parameters(total) - self.idle_expert_parameters)

    def read_parameters(self, total: int) -> int:
        """The weights that a micro-batch reads: all except an untied embedding. Its tokens together use all experts."""
        return max(0, total - (0 if self.head_is_tied else self.head_parameters))


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """A model to plan for. Its config is read once, and its weights are not."""

    source: ModelSource
    config: Fields
    facts: ModelFacts
    # None where the closed form does not know the family.
    shape: Shape | None
    trust_remote_code: bool = False

    @property
    def family(self) -> str:
        """transformers' ``model_type``; empty where the config has none."""
        return str(self.config.get("model_type") or "")

    @property
    def place(self) -> str | Path:
        """The hub id or path from which the model can be loaded again."""
        return self.source.path if self.source.path is not None else self.source.name

    def known_shape(self) -> Shape:
        """The model's shape. Raises ModelError (RW325, RW326) as ``shape_of`` does where there is none."""
        return self.shape if self.shape is not None else shape_of(self.config, str(self.place))


def read_model(source: ModelSource, *, trust_remote_code: bool = False) -> PlannedModel:
    """A fetched model. Raises ModelError (RW326) as ``shape_of`` does."""
    assert source.path is not None
    config = gguf_config(source) if source.is_gguf else read_config(source.path)
    shape = shape_of(config, str(source.path)) if config.get("model_type") in FAMILIES else None
    facts = _of_gguf(source) if source.is_gguf and shape is None else _facts(config, shape)
    return PlannedModel(source, config, facts, shape, trust_remote_code)


def read_facts(source: ModelSource) -> ModelFacts:
    """The sizes of a fetched model. Raises ModelError (RW326) as ``shape_of`` does."""
    return read_model(source).facts


def facts_of(config: Fields, name: str = "the config") -> ModelFacts:
    """The facts of a config.json. For a known family they come from the closed form's shape, so the two cannot
    differ.
    """
    return _facts(config, shape_of(config, name) if config.get("model_type") in FAMILIES else None)


def _facts(config: Fields, shape: Shape | None) -> ModelFacts:
    text = config.get("text_config")
    facts = _of_config(text if isinstance(text, Mapping) else config) if shape is None else _of_shape(shape)
    return dataclasses.replace(facts, position_rows=config_table_rows(config), stored=stored_quantization(config))


def _of_shape(shape: Shape) -> ModelFacts:
    experts = sum(module.extra for module in shape.modules if module.name.endswith(".experts"))
    return ModelFacts(
        layers=shape.layers,
        width=shape.hidden,
        vocabulary=shape.vocabulary,
        head_is_tied=shape.tied,
        idle_expert_parameters=_idle(experts, shape.experts, shape.experts_per_token),
        visited_share=_visited(shape.experts, shape.experts_per_token),
        experts=shape.experts,
    )


def _idle(parameters: int, experts: int, visited: int) -> int:
    """The share of the experts' parameters that a token does not use: (E - e) / E."""
    return parameters * max(0, experts - visited) // experts if experts else 0


def _visited(experts: int, visited: int) -> float:
    return min(1.0, visited / experts) if experts and visited else 1.0


def _of_config(config: Fields) -> ModelFacts:
    layers, width = _number(config, LAYERS), _number(config, WIDTH)
    experts, visited = _number(config, EXPERTS), _number(config, EXPERTS_PER_TOKEN)
    idle = layers * max(0, experts - visited) * 3 * width * _number(config, EXPERT_WIDTH) if experts else 0
    return ModelFacts(
        layers=layers,
        width=width,
        vocabulary=_number(config, ("vocab_size",)),
        head_is_tied=bool(config.get("tie_word_embeddings")),
        idle_expert_parameters=idle,
        visited_share=_visited(experts, visited),
        experts=experts,
    )


def _of_gguf(source: ModelSource) -> ModelFacts:
    assert source.path is not None
    header = read_gguf_header(source.path)
    family = header.metadata["general.architecture"]
    table = header.tensors.get("token_embd.weight")
    # Stacked experts: blk.3.ffn_up_exps.weight.
    experts = sum(prod(tensor.shape) for name, tensor in header.tensors.items() if "_exps." in name)
    count, visited = (_number(header.metadata, (f"{family}.{key}",)) for key in ("expert_count", "expert_used_count"))
    return ModelFacts(
        layers=_number(header.metadata, (f"{family}.block_count",)),
        width=_number(header.metadata, (f"{family}.embedding_length",)),
        vocabulary=table.shape[-1] if table else 0,
        head_is_tied="output.weight" not in header.tensors,
        idle_expert_parameters=_idle(experts, count, visited),
        visited_share=_visited(count, visited),
        experts=count,
    )


def _number(config: Fields, names: tuple[str, ...]) -> int:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)

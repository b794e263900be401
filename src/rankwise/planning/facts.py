"""What the pace of training depends on, from config.json or a GGUF header. Imports no torch.

L layers, h width, V vocabulary, E experts of which e see a token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from rankwise.models.folder import read_config
from rankwise.models.gguf_file import read_gguf_header
from rankwise.models.source import ModelSource

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk")
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")


@dataclasses.dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model; 0 where the config does not tell."""

    layers: int
    width: int
    vocabulary: int
    head_is_tied: bool
    idle_expert_parameters: int = 0
    # Parameters of experts that a token does not visit: L (E - e) 3 h w with the width w of an expert.

    @property
    def head_parameters(self) -> int:
        """V h."""
        return self.vocabulary * self.width

    def matrix_parameters(self, total: int) -> int:
        """Weights that multiply each token: all but an untied embedding table and the idle experts."""
        table = 0 if self.head_is_tied else self.head_parameters
        return max(0, total - table - self.idle_expert_parameters)


def read_facts(source: ModelSource) -> ModelFacts:
    """The sizes of a fetched model."""
    assert source.path is not None
    if source.is_gguf:
        return _of_gguf(source)
    config = read_config(source.path)
    text = config.get("text_config")
    return facts_of(text if isinstance(text, Mapping) else config)


def facts_of(config: Mapping[str, Any]) -> ModelFacts:
    layers, width = _number(config, LAYERS), _number(config, WIDTH)
    experts, visited = _number(config, EXPERTS), _number(config, EXPERTS_PER_TOKEN)
    idle = layers * max(0, experts - visited) * 3 * width * _number(config, EXPERT_WIDTH) if experts else 0
    tied = config.get("tie_word_embeddings")
    return ModelFacts(
        layers=layers,
        width=width,
        vocabulary=_number(config, ("vocab_size",)),
        # Models that tie by default write nothing.
        head_is_tied=bool(tied) if tied is not None else config.get("model_type") in ("gpt2", "gemma", "gemma2"),
        idle_expert_parameters=idle,
    )


def _of_gguf(source: ModelSource) -> ModelFacts:
    assert source.path is not None
    header = read_gguf_header(source.path)
    family = header.metadata["general.architecture"]
    table = header.tensors.get("token_embd.weight")
    return ModelFacts(
        layers=_number(header.metadata, (f"{family}.block_count",)),
        width=_number(header.metadata, (f"{family}.embedding_length",)),
        vocabulary=table.shape[-1] if table else 0,
        head_is_tied="output.weight" not in header.tensors,
    )


def _number(config: Mapping[str, Any], names: tuple[str, ...]) -> int:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)

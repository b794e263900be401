"""What a plan knows of a model: its sizes, from config.json or a GGUF header, and how its weights are stored.

Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

from rankwise.compat.system import cache_folder
from rankwise.constants import MXFP4
from rankwise.errors import ModelError
from rankwise.foreign import Fields
from rankwise.labels import Labels
from rankwise.models.folder import CONFIG_FILE, read_config
from rankwise.models.gguf_file import GgufHeader, read_gguf_header
from rankwise.models.load import config_table_rows
from rankwise.models.source import ModelSource, fetch_model
from rankwise.records import write_json

LAYERS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
WIDTH = ("hidden_size", "n_embd", "d_model", "dim")
EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_PER_TOKEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k")
EXPERT_WIDTH = ("moe_intermediate_size", "intermediate_size")
# transformers' names of quantized formats that support adapters (rankwise.adapters.base_layer).
PACKED_FORMATS = ("gptq", "awq", "hqq", "torchao")
# ggml's numbers of F32, F16 and BF16.
DENSE_GGML_TYPES = (0, 1, 30)


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

    def keeps_mxfp4(self, device_type: str) -> bool:
        """Whether the model's experts stay in the files' MXFP4."""
        return self.format == MXFP4 and device_type == "cpu"

    def note(self, device_type: str) -> str:
        """A note for the plan, whose rows count the original, dense weights unless they stay as they are."""
        if self.keeps_mxfp4(device_type):
            return (
                "the files hold the experts in MXFP4: training takes them as they are, with every method that trains "
                "an adapter, and these are their sizes; qlora rounds the other layers"
            )
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelFacts:
    """Sizes of a model; 0 where the config does not give them."""

    layers: int
    width: int
    vocabulary: int
    head_is_tied: bool
    # Parameters of experts that a token does not visit: L (E - e) 3 h w of L mixtures with experts of width w.
    idle_expert_parameters: int = 0
    # Share of the experts that process a token: e / E.
    visited_share: float = 1.0
    experts: int = 0
    # Rows of a table of learned positions, the longest possible row; None without such a table.
    position_rows: int | None = None
    # The quantization of the weights in the files, if any.
    stored: Stored | None = None
    # Of a GGUF file: the bytes of its packed matrices, of its experts alone, and the elements of its other tensors.
    packed_bytes: int = 0
    packed_expert_bytes: int = 0
    dense_elements: int = 0
    # Whether a small head of labels stands in the place of the vocabulary's.
    has_labels: bool = False

    @property
    def head_parameters(self) -> int:
        """The parameters of the head: V h, or next to none of labels."""
        return 0 if self.has_labels else self.vocabulary * self.width

    def matrix_parameters(self, total: int) -> int:
        """The weights that multiply each token: all except an untied embedding and the idle experts."""
        return max(0, self.read_parameters(total) - self.idle_expert_parameters)

    def read_parameters(self, total: int) -> int:
        """The weights that a micro-batch reads: all except an untied embedding. Its tokens together use all experts."""
        embedding_multiplies = self.head_is_tied and not self.has_labels
        return max(0, total - (0 if embedding_multiplies else self.vocabulary * self.width))


@dataclasses.dataclass(frozen=True)
class PlannedModel:
    """A model to plan for. Its config is read once, and its weights are not."""

    source: ModelSource
    # transformers' ``model_type``; empty where the config has none.
    family: str
    facts: ModelFacts
    # What its memory depends on: the config, or the header of a GGUF file.
    identity: object
    trust_remote_code: bool = False


def read_model(source: ModelSource, *, trust_remote_code: bool = False, labels: int = 0) -> PlannedModel:
    """A fetched model, with a head of so many ``labels``."""
    source = dataclasses.replace(source, labels=Labels(tuple(map(str, range(labels)))) if labels else None)
    identity: object
    if source.is_gguf:
        header = read_gguf_header(source.place)
        family, facts = header.metadata["general.architecture"], _of_gguf(header)
        identity = [{name: tensor.shape for name, tensor in header.tensors.items()}, header.metadata]
    else:
        identity = config = read_config(source.place)
        family, facts = str(config.get("model_type") or ""), facts_of(config)
    facts = dataclasses.replace(facts, has_labels=labels > 0)
    return PlannedModel(source, family, facts, identity, trust_remote_code)


# Codes of errors of the hub that do not speak against a name: no network, terms that were not accepted.
UNREACHED = ("RW313", "RW315")


def source_or_shape(model: str, **options: Any) -> tuple[ModelSource, str | None]:
    """(``fetch_model`` without weights, None), or where the hub does not give a well-known model's config, (a folder
    with the sizes in ``shapes.json``, why). Raises ModelError as ``fetch_model`` does.
    """
    try:
        return fetch_model(model, weights=False, **options), None
    except ModelError as error:
        table = json.loads(Path(__file__).with_name("shapes.json").read_text(encoding="utf-8"))
        config = next((row["config"] for row in table if model in row["ids"]), None)
        if config is None or error.code not in UNREACHED:
            raise
        folder = cache_folder() / "shapes" / model.replace("/", "--")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / CONFIG_FILE, config)
        return ModelSource(kind="hub", name=model, path=folder, base_model=model), error.message


def facts_of(config: Fields) -> ModelFacts:
    """The facts of a config.json."""
    text = config.get("text_config")
    facts = _of_config(text if isinstance(text, Mapping) else config)
    return dataclasses.replace(facts, position_rows=config_table_rows(config), stored=stored_quantization(config))


def _visited(experts: int, visited: int) -> float:
    return min(1.0, visited / experts) if experts and visited else 1.0


def _mixed_layers(config: Fields, layers: int) -> int:
    """How many layers are mixtures of experts, by the families' options; the others are dense."""
    if isinstance(named := config.get("mlp_layer_types"), list):
        return named.count("sparse")
    if isinstance(mixed := config.get("moe_layers"), list):
        return len(mixed)
    step = max(1, _number(config, ("decoder_sparse_step", "interleave_moe_layer_step")))
    first, only = _number(config, ("first_k_dense_replace",)), config.get("mlp_only_layers")
    dense = only if isinstance(only, list) else []
    return sum(layer >= first and layer not in dense for layer in range(step - 1, layers, step))


def _of_config(config: Fields) -> ModelFacts:
    layers, width = _number(config, LAYERS), _number(config, WIDTH)
    experts, visited = _number(config, EXPERTS), _number(config, EXPERTS_PER_TOKEN)
    idle = _mixed_layers(config, layers) * max(0, experts - visited) * 3 * width * _number(config, EXPERT_WIDTH)
    return ModelFacts(
        layers=layers,
        width=width,
        vocabulary=_number(config, ("vocab_size",)),
        # transformers' default, which configs leave out.
        head_is_tied=bool(config.get("tie_word_embeddings", True)),
        idle_expert_parameters=idle,
        visited_share=_visited(experts, visited),
        experts=experts,
    )


def _of_gguf(header: GgufHeader) -> ModelFacts:
    family = header.metadata["general.architecture"]
    table = header.tensors.get("token_embd.weight")
    # Stacked experts: blk.3.ffn_up_exps.weight.
    experts = sum(prod(tensor.shape) for name, tensor in header.tensors.items() if "_exps." in name)
    count, visited = (_number(header.metadata, (f"{family}.{key}",)) for key in ("expert_count", "expert_used_count"))
    matrices = {name: one for name, one in header.tensors.items() if len(one.shape) > 1}
    packed = {name: one for name, one in matrices.items() if one.ggml_type not in DENSE_GGML_TYPES}
    elements = sum(prod(tensor.shape) for tensor in header.tensors.values())
    return ModelFacts(
        packed_bytes=sum(tensor.end - tensor.begin for tensor in packed.values()),
        packed_expert_bytes=sum(tensor.end - tensor.begin for name, tensor in packed.items() if "_exps." in name),
        dense_elements=elements - sum(prod(tensor.shape) for tensor in packed.values()),
        layers=_number(header.metadata, (f"{family}.block_count",)),
        width=_number(header.metadata, (f"{family}.embedding_length",)),
        vocabulary=table.shape[-1] if table else 0,
        head_is_tied="output.weight" not in header.tensors,
        idle_expert_parameters=experts * max(0, count - visited) // count if count else 0,
        visited_share=_visited(count, visited),
        experts=count,
    )


def _number(config: Fields, names: tuple[str, ...]) -> int:
    found = (config.get(name) for name in names)
    return next((value for value in found if isinstance(value, int) and not isinstance(value, bool)), 0)

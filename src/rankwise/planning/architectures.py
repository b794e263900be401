"""The families of models that the closed form knows: which modules a config means. Imports no torch.

Module names are transformers', so that target_modules mean here what they mean on the model.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from types import MappingProxyType
from typing import Any

from rankwise.errors import ModelError
from rankwise.models.folder import read_config
from rankwise.models.source import fetch_model
from rankwise.planning.shape import Fields, Module, Shape, gguf_config

Family = Callable[[Fields], Shape]


def decoder(
    fields: Fields,
    *,
    family: str,
    tied: bool = False,
    qkv_bias: bool | None = None,
    qk_norm: int = 0,
    norms_per_layer: int = 2,
    head_dim: int | None = None,
    fused: bool = False,
    kv_heads: int | None = None,
    experts: bool = False,
    eager: bool = False,
    path: str = "model",
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> Shape:
    """The line of Llama: RMSNorm, rotary positions, grouped queries, a gated MLP or gated experts.

    ``qkv_bias``: of q, k and v, where the config does not say; None: attention_bias of the config, on all four.
    ``qk_norm``: 1 over each head, 2 over all heads together. ``fused``: qkv_proj and gate_up_proj as in Phi-3.
    ``eager``: attention as in Gemma 2, whose capped scores no kernel of torch's computes.
    ``path``: of the decoder in the model. ``defaults``: transformers', for sizes that a config.json leaves out.
    """
    given, fields = fields, fields.with_defaults(defaults)
    h, layers, heads, V = fields.required("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    d = fields.count("head_dim", head_dim or h // heads)
    # Written as null it means one for each head, whatever the family's default.
    is_null = given.config.get("num_key_value_heads", heads) is None
    groups = heads if is_null else fields.count("num_key_value_heads", kv_heads or heads)
    attention_bias = fields.flag("attention_bias", False)
    sizes: dict[str, Any] = {
        "h": h,
        "q": heads * d,
        "k": groups * d,
        "qkv_bias": attention_bias if qkv_bias is None else fields.flag("qkv_bias", qkv_bias),
        "o_bias": attention_bias and qkv_bias is None,
        "norm": {0: 0, 1: d, 2: heads * d}[qk_norm],
        "k_norm": {0: 0, 1: d, 2: groups * d}[qk_norm],
    }
    moe = _experts(fields, family) if experts else None
    width = moe["f"] if moe else fields.required("intermediate_size")[0]
    modules = [Module(f"{path}.embed_tokens", "embedding", V, h)]
    for index in range(layers):
        layer = f"{path}.layers.{index}"
        modules += _attention(f"{layer}.self_attn", fused=fused, **sizes)
        is_sparse = moe is not None and index not in moe["dense_layers"]
        modules += _moe(f"{layer}.mlp", h, moe) if is_sparse and moe else _mlp(f"{layer}.mlp", h, fields, fused)
        modules += [Module(f"{layer}.{name}", "norm", 0, 0, extra=h) for name in NORM_NAMES[norms_per_layer, family]]
    modules += [Module(f"{path}.norm", "norm", 0, 0, extra=h), Module("lm_head", "linear", h, V)]
    return Shape(
        family=family,
        hidden=h,
        layers=layers,
        mlp=width,
        heads=heads,
        kv_heads=groups,
        head_dim=d,
        vocabulary=V,
        max_positions=fields.max_positions,
        tied=fields.flag("tie_word_embeddings", tied),
        modules=tuple(modules),
        experts=moe["E"] if moe else 0,
        experts_per_token=moe["k"] if moe else 0,
        shared_mlp=moe["shared"] if moe else 0,
        qk_norm=bool(qk_norm),
        fused_qkv=fused,
        norms_per_layer=norms_per_layer,
        attention_dropout=fields.share("attention_dropout", 0.0),
        **_window(given, family, layers),
        eager=eager,
        softcapped=eager and bool(given.config.get("attn_logit_softcapping", GEMMA2_SOFTCAP)),
        capped_logits=bool(given.config.get("final_logit_softcapping", CAPPED_LOGITS.get(family))),
    )


GEMMA2_SOFTCAP = 50.0
CAPPED_LOGITS = {"gemma2": 30.0}
# transformers' defaults; null in a config turns them off.


WINDOW = 4096
# transformers' default, of families that have one.
WINDOWED = ("mistral", "gemma3_text", "gemma3")
ALL_LAYERS_WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe")
ONLY_WHERE_USED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")
# By ``use_sliding_window``.
GLOBAL_EVERY = 6
# Of Gemma 3's layers.


def _window(fields: Fields, family: str, layers: int) -> dict[str, Any]:
    """How far back layers look, and the share of those that do not look at all tokens; nothing where all do."""
    default = WINDOW if family in (*WINDOWED, *ONLY_WHERE_USED) else None
    if family in ONLY_WHERE_USED and not fields.flag("use_sliding_window", False):
        return {}
    if fields.config.get("sliding_window", default) is None:
        return {}
    window = fields.count("sliding_window", WINDOW)
    kinds = fields.entries("layer_types")
    if family in ALL_LAYERS_WINDOWED:
        windowed = layers
    elif kinds:
        windowed = kinds.count("sliding_attention")
    elif family in WINDOWED:
        every = fields.count("sliding_window_pattern", GLOBAL_EVERY)
        windowed = sum(bool((index + 1) % every) for index in range(layers))
    else:
        windowed = max(0, layers - fields.count("max_window_layers", 28))
    return {"window": window, "windowed_share": windowed / layers}


class _Names(dict[tuple[int, str], tuple[str, ...]]):
    def __missing__(self, key: tuple[int, str]) -> tuple[str, ...]:
        two = ("input_layernorm", "post_attention_layernorm")
        return two if key[0] == 2 else (*two, "pre_feedforward_layernorm", "post_feedforward_layernorm")


NORM_NAMES = _Names({(2, "olmo2"): ("post_attention_layernorm", "post_feedforward_layernorm")})


def _attention(
    path: str, *, fused: bool, h: int, q: int, k: int, qkv_bias: bool, o_bias: bool, norm: int, k_norm: int
) -> Iterator[Module]:
    if fused:
        yield Module(f"{path}.o_proj", "linear", q, h)
        yield Module(f"{path}.qkv_proj", "linear", h, q + 2 * k)
        return
    yield Module(f"{path}.q_proj", "linear", h, q, qkv_bias)
    yield Module(f"{path}.k_proj", "linear", h, k, qkv_bias)
    yield Module(f"{path}.v_proj", "linear", h, k, qkv_bias)
    yield Module(f"{path}.o_proj", "linear", q, h, o_bias)
    if norm:
        yield Module(f"{path}.q_norm", "norm", 0, 0, extra=norm)
        yield Module(f"{path}.k_norm", "norm", 0, 0, extra=k_norm)


def _mlp(path: str, h: int, fields: Fields, fused: bool = False) -> Iterator[Module]:
    (f,) = fields.required("intermediate_size")
    bias = fields.flag("mlp_bias", False)
    if fused:
        yield Module(f"{path}.gate_up_proj", "linear", h, 2 * f)
    else:
        yield Module(f"{path}.gate_proj", "linear", h, f, bias)
        yield Module(f"{path}.up_proj", "linear", h, f, bias)
    yield Module(f"{path}.down_proj", "linear", f, h, bias)


def _experts(fields: Fields, family: str) -> dict:
    name = "num_local_experts" if fields.config.get("num_local_experts") else "num_experts"
    E, k = fields.required(name, "num_experts_per_tok")
    width = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    layers, step = fields.required("num_hidden_layers")[0], fields.count("decoder_sparse_step", 1)
    only = fields.entries("mlp_only_layers")
    dense = {index for index in range(layers) if index in only or (index + 1) % step}
    shared = fields.required("shared_expert_intermediate_size")[0] if family == "qwen2_moe" else 0
    return {"E": E, "k": k, "f": fields.required(width)[0], "shared": shared, "dense_layers": dense}


def _moe(path: str, h: int, moe: dict) -> Iterator[Module]:
    """Stacked experts (E, 2 f, h) and (E, h, f), a router (E, h), and an expert that sees every token."""
    yield Module(f"{path}.gate", "plain", 0, 0, extra=moe["E"] * h)
    stacks = (moe["E"], 2 * moe["f"], h), (moe["E"], h, moe["f"])
    yield Module(f"{path}.experts", "plain", 0, 0, extra=sum(map(prod, stacks)), stacks=stacks)
    if moe["shared"]:
        s = moe["shared"]
        yield Module(f"{path}.shared_expert.gate_proj", "linear", h, s)
        yield Module(f"{path}.shared_expert.up_proj", "linear", h, s)
        yield Module(f"{path}.shared_expert.down_proj", "linear", s, h)
        yield Module(f"{path}.shared_expert_gate", "linear", h, 1)


_gemma3_text = partial(
    decoder,
    tied=True,
    head_dim=256,
    kv_heads=4,
    norms_per_layer=4,
    qk_norm=1,
    defaults=MappingProxyType({"num_attention_heads": 8, "vocab_size": 262_208}),
)


def gemma3(fields: Fields) -> Shape:
    """Gemma 3 with eyes: a decoder by ``text_config``, of which the hub's files leave sizes out, and a SigLIP tower by
    ``vision_config``, which text never enters but whose weights are there and whose linear layers adapt.
    """
    text, vision = fields.part("text_config"), fields.part("vision_config")
    tied = fields.flag("tie_word_embeddings", True)
    shape = _gemma3_text(text, family="gemma3", path="model.language_model")
    modules = (*_siglip("model.vision_tower", vision), *_projector(vision, shape.hidden), *shape.modules)
    return dataclasses.replace(shape, modules=modules, tied=tied)


def _siglip(path: str, fields: Fields) -> Iterator[Module]:
    """LayerNorms with bias, biased linear layers, a patch of c p p pixels a position."""
    h, f, layers = fields.required("hidden_size", "intermediate_size", "num_hidden_layers")
    patch, image = fields.required("patch_size", "image_size")
    yield Module(
        f"{path}.embeddings.patch_embedding", "plain", 0, h, True, fields.count("num_channels", 3) * patch**2 * h
    )
    yield Module(f"{path}.embeddings.position_embedding", "embedding", (image // patch) ** 2, h)
    for index in range(layers):
        layer = f"{path}.encoder.layers.{index}"
        yield from (Module(f"{layer}.{name}", "norm", 0, h, True, extra=h) for name in ("layer_norm1", "layer_norm2"))
        projections = ("k_proj", "v_proj", "q_proj", "out_proj")
        yield from (Module(f"{layer}.self_attn.{name}", "linear", h, h, True) for name in projections)
        yield Module(f"{layer}.mlp.fc1", "linear", h, f, True)
        yield Module(f"{layer}.mlp.fc2", "linear", f, h, True)
    yield Module(f"{path}.post_layernorm", "norm", 0, h, True, extra=h)


def _projector(fields: Fields, h: int) -> Iterator[Module]:
    (eye,) = fields.required("hidden_size")
    yield Module("model.multi_modal_projector", "plain", 0, 0, extra=eye * h)
    yield Module("model.multi_modal_projector.mm_soft_emb_norm", "norm", 0, 0, extra=eye)


def gpt2(fields: Fields) -> Shape:
    """LayerNorm with bias, learnt positions, fused q, k and v, a plain MLP; weights are stored transposed."""
    h, layers, heads, V, positions = fields.required("n_embd", "n_layer", "n_head", "vocab_size", "n_positions")
    f = fields.count("n_inner", 4 * h)
    modules = [Module("transformer.wte", "embedding", V, h), Module("transformer.wpe", "embedding", positions, h)]
    for index in range(layers):
        path = f"transformer.h.{index}"
        modules += [
            Module(f"{path}.ln_1", "norm", 0, h, True, extra=h),
            Module(f"{path}.attn.c_attn", "conv1d", h, 3 * h, True),
            Module(f"{path}.attn.c_proj", "conv1d", h, h, True),
            Module(f"{path}.ln_2", "norm", 0, h, True, extra=h),
            Module(f"{path}.mlp.c_fc", "conv1d", h, f, True),
            Module(f"{path}.mlp.c_proj", "conv1d", f, h, True),
        ]
    modules += [Module("transformer.ln_f", "norm", 0, h, True, extra=h), Module("lm_head", "linear", h, V)]
    return Shape(
        family="gpt2",
        hidden=h,
        layers=layers,
        mlp=f,
        heads=heads,
        kv_heads=heads,
        head_dim=h // heads,
        vocabulary=V,
        max_positions=positions,
        tied=fields.flag("tie_word_embeddings", True),
        modules=tuple(modules),
        dropout=fields.share("resid_pdrop", 0.1),
        attention_dropout=fields.share("attn_pdrop", 0.1),
    )


FAMILIES: dict[str, Family] = {
    "llama": partial(decoder, family="llama"),
    "smollm3": partial(decoder, family="smollm3", tied=True, kv_heads=4),
    "granite": partial(decoder, family="granite"),
    "mistral": partial(decoder, family="mistral", kv_heads=8),
    "qwen2": partial(decoder, family="qwen2", qkv_bias=True, kv_heads=32),
    "qwen3": partial(decoder, family="qwen3", qk_norm=1, head_dim=128, kv_heads=32),
    "gemma": partial(decoder, family="gemma", tied=True, head_dim=256, kv_heads=16),
    "gemma2": partial(decoder, family="gemma2", tied=True, head_dim=256, kv_heads=4, norms_per_layer=4, eager=True),
    "gemma3_text": partial(_gemma3_text, family="gemma3_text"),
    "gemma3": gemma3,
    "phi3": partial(decoder, family="phi3", fused=True),
    "olmo2": partial(decoder, family="olmo2", qk_norm=2),
    "mixtral": partial(decoder, family="mixtral", kv_heads=8, experts=True),
    "qwen2_moe": partial(decoder, family="qwen2_moe", qkv_bias=True, kv_heads=16, experts=True),
    "qwen3_moe": partial(decoder, family="qwen3_moe", qk_norm=1, kv_heads=4, experts=True),
    "gpt2": gpt2,
}
"""By ``model_type``. Defaults are transformers', for fields that a config.json may leave out."""

# Families that transformers builds only where the hidden size is a multiple of the heads; the others round down.
WHOLE_HEADS = frozenset({"llama", "gemma2", "gemma3", "gemma3_text", "gpt2"})
HEAD_FIELDS = "hidden_size, num_attention_heads, num_key_value_heads"


def read_shape(model: str | os.PathLike[str], *, trust_remote_code: bool = False, revision: str | None = None) -> Shape:
    """The shape of a hub id, folder, GGUF file or demo; of a hub id the weights are not downloaded.

    Raises ModelError: as ``fetch_model`` and ``read_config`` do; RW325, RW326 as ``shape_of``.
    """
    source = fetch_model(model, revision=revision, trust_remote_code=trust_remote_code, weights=False)
    config = gguf_config(source) if source.is_gguf else read_config(source.path)  # type: ignore[arg-type]
    return shape_of(config, str(source.path or source.name))


def shape_of(config: Mapping[str, Any], name: str = "the config") -> Shape:
    """The shape that a config.json describes.

    Raises ModelError: RW325 an architecture that the closed form does not know, RW326 fields that are missing, are not
    of their kind or do not go together.
    """
    family = config.get("model_type")
    if family is None:
        raise ModelError("RW326", f"{name} has no model_type; take the config.json that came with the model.")
    if family not in FAMILIES:
        raise ModelError(
            "RW325",
            f"{name} is a {family!r} model, which the closed form does not know; plan with --exact, which runs the "
            f"model's own code, or give one of {', '.join(sorted(FAMILIES))}.",
        )
    shape = FAMILIES[family](Fields(config, name))
    _check_heads(shape, name)
    return shape


def _check_heads(shape: Shape, name: str) -> None:
    """Raises ModelError (RW326) for heads that no model of transformers has: its attention would fail."""
    wrong = []
    if shape.hidden % shape.heads and shape.family in WHOLE_HEADS:
        wrong.append(f"the hidden size {shape.hidden} is no multiple of its {shape.heads} attention heads")
    if shape.heads % shape.kv_heads:
        wrong.append(f"its {shape.heads} attention heads are no multiple of its {shape.kv_heads} key-value heads")
    if wrong:
        names = "n_embd, n_head" if shape.family == "gpt2" else HEAD_FIELDS
        raise ModelError(
            "RW326",
            f"the sizes in the config of {name} do not go together: {'; '.join(wrong)} ({names}); take the config.json "
            "that came with the model.",
        )

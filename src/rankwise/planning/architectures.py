"""The model families of the closed form, and the modules that follow from a config. Imports no torch.

Module names are transformers', so that target_modules mean here what they mean on the model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from math import prod
from typing import Literal

from rankwise.errors import ModelError
from rankwise.foreign import Fields
from rankwise.planning.shape import ConfigFields, Module, Shape

Family = Callable[[ConfigFields], Shape]


@dataclasses.dataclass(frozen=True)
class Line:
    """How a family differs from Llama: RMSNorm, rotary positions, grouped queries, a gated MLP or gated experts."""

    family: str
    tied: bool = False
    # Whether q, k and v have a bias; None: the config's attention_bias says so for q, k, v and o.
    qkv_bias: bool | None = None
    # A norm over each head (1), or over all heads together (2).
    qk_norm: Literal[0, 1, 2] = 0
    norms_per_layer: int = 2
    head_dim: int | None = None
    kv_heads: int | None = None
    # qkv_proj and gate_up_proj as in Phi-3.
    fused: bool = False
    experts: bool = False
    # Attention as in Gemma 2, whose soft-capped scores no kernel of torch supports.
    eager: bool = False
    # Path of the decoder in the model.
    path: str = "model"
    # transformers' defaults of sizes that a config.json may omit.
    defaults: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Attention:
    """Sizes of one layer's attention: widths h of the input, q of queries, k of keys and of values; 0: no norm."""

    h: int
    q: int
    k: int
    qkv_bias: bool
    o_bias: bool
    q_norm: int
    k_norm: int
    fused: bool

    def modules(self, path: str) -> Iterator[Module]:
        h, q, k = self.h, self.q, self.k
        if self.fused:
            yield Module(f"{path}.o_proj", "linear", q, h)
            yield Module(f"{path}.qkv_proj", "linear", h, q + 2 * k)
            return
        yield Module(f"{path}.q_proj", "linear", h, q, self.qkv_bias)
        yield Module(f"{path}.k_proj", "linear", h, k, self.qkv_bias)
        yield Module(f"{path}.v_proj", "linear", h, k, self.qkv_bias)
        yield Module(f"{path}.o_proj", "linear", q, h, self.o_bias)
        if self.q_norm:
            yield Module(f"{path}.q_norm", "norm", extra=self.q_norm)
            yield Module(f"{path}.k_norm", "norm", extra=self.k_norm)


@dataclasses.dataclass(frozen=True)
class Experts:
    """Sizes of the experts: E of width f, of which a token visits k, and one of width ``shared`` that sees every token.
    ``dense_layers`` have an MLP instead.
    """

    E: int
    k: int
    f: int
    shared: int
    dense_layers: frozenset[int]

    def modules(self, path: str, h: int) -> Iterator[Module]:
        """Stacked experts (E, 2 f, h) and (E, h, f), a router (E, h), and an expert that sees every token."""
        yield Module(f"{path}.gate", "plain", extra=self.E * h)
        stacks = (self.E, 2 * self.f, h), (self.E, h, self.f)
        yield Module(f"{path}.experts", "plain", extra=sum(map(prod, stacks)), stacks=stacks)
        if self.shared:
            yield Module(f"{path}.shared_expert.gate_proj", "linear", h, self.shared)
            yield Module(f"{path}.shared_expert.up_proj", "linear", h, self.shared)
            yield Module(f"{path}.shared_expert.down_proj", "linear", self.shared, h)
            yield Module(f"{path}.shared_expert_gate", "linear", h, 1)


def decoder(given: ConfigFields, line: Line) -> Shape:
    """The shape of a model that resembles Llama, except for the differences in ``line``."""
    fields, family, path = given.with_defaults(line.defaults), line.family, line.path
    h, layers, heads, V = fields.required("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    d = fields.count("head_dim", line.head_dim or h // heads)
    # null means one key-value head per head, whatever the family's default.
    is_null = given.config.get("num_key_value_heads", heads) is None
    groups = heads if is_null else fields.count("num_key_value_heads", line.kv_heads or heads)
    attention_bias = fields.flag("attention_bias", False)
    attention = Attention(
        h=h,
        q=heads * d,
        k=groups * d,
        qkv_bias=attention_bias if line.qkv_bias is None else fields.flag("qkv_bias", line.qkv_bias),
        o_bias=attention_bias and line.qkv_bias is None,
        q_norm=(0, d, heads * d)[line.qk_norm],
        k_norm=(0, d, groups * d)[line.qk_norm],
        fused=line.fused,
    )
    moe = _experts(fields, family) if line.experts else None
    width = moe.f if moe else fields.required("intermediate_size")[0]
    window, windowed_share = _window(given, family, layers)
    modules = [Module(f"{path}.embed_tokens", "embedding", V, h)]
    for index in range(layers):
        layer = f"{path}.layers.{index}"
        modules += attention.modules(f"{layer}.self_attn")
        sparse = moe if moe is not None and index not in moe.dense_layers else None
        modules += sparse.modules(f"{layer}.mlp", h) if sparse else _mlp(f"{layer}.mlp", h, fields, line.fused)
        modules += [Module(f"{layer}.{name}", "norm", extra=h) for name in _norm_names(line)]
    modules += [Module(f"{path}.norm", "norm", extra=h), Module("lm_head", "linear", h, V)]
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
        tied=fields.flag("tie_word_embeddings", line.tied),
        modules=tuple(modules),
        experts=moe.E if moe else 0,
        experts_per_token=moe.k if moe else 0,
        shared_mlp=moe.shared if moe else 0,
        qk_norms=(0, heads + groups, 2)[line.qk_norm],
        fused_qkv=line.fused,
        norms_per_layer=line.norms_per_layer,
        attention_dropout=fields.share("attention_dropout", 0.0),
        window=window,
        windowed_share=windowed_share,
        eager=line.eager,
        softcapped=line.eager and bool(given.config.get("attn_logit_softcapping", GEMMA2_SOFTCAP)),
        capped_logits=bool(given.config.get("final_logit_softcapping", CAPPED_LOGITS.get(family))),
    )


# transformers' defaults; null in a config turns them off.
GEMMA2_SOFTCAP = 50.0
CAPPED_LOGITS = {"gemma2": 30.0}

# transformers' default, of families that have a window.
WINDOW = 4096
WINDOWED = ("mistral", "gemma3_text", "gemma3")
ALL_LAYERS_WINDOWED = ("mistral", "mixtral", "phi3", "qwen3_moe")
# Families with a window only where ``use_sliding_window`` says so.
ONLY_WHERE_USED = ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe", "smollm3")
# One in GLOBAL_EVERY layers of Gemma 3 attends to all tokens.
GLOBAL_EVERY = 6


def _window(fields: ConfigFields, family: str, layers: int) -> tuple[int | None, float]:
    """(attention window, share of the layers that have it); (None, 0) where every layer attends to all tokens."""
    default = WINDOW if family in (*WINDOWED, *ONLY_WHERE_USED) else None
    if family in ONLY_WHERE_USED and not fields.flag("use_sliding_window", False):
        return None, 0.0
    if fields.config.get("sliding_window", default) is None:
        return None, 0.0
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
    return window, windowed / layers


def _norm_names(line: Line) -> tuple[str, ...]:
    if line.family == "olmo2":
        return "post_attention_layernorm", "post_feedforward_layernorm"
    two = ("input_layernorm", "post_attention_layernorm")
    return two if line.norms_per_layer == 2 else (*two, "pre_feedforward_layernorm", "post_feedforward_layernorm")


def _mlp(path: str, h: int, fields: ConfigFields, fused: bool = False) -> Iterator[Module]:
    (f,) = fields.required("intermediate_size")
    bias = fields.flag("mlp_bias", False)
    if fused:
        yield Module(f"{path}.gate_up_proj", "linear", h, 2 * f)
    else:
        yield Module(f"{path}.gate_proj", "linear", h, f, bias)
        yield Module(f"{path}.up_proj", "linear", h, f, bias)
    yield Module(f"{path}.down_proj", "linear", f, h, bias)


def _experts(fields: ConfigFields, family: str) -> Experts:
    name = "num_local_experts" if fields.config.get("num_local_experts") else "num_experts"
    E, k = fields.required(name, "num_experts_per_tok")
    width = "intermediate_size" if family == "mixtral" else "moe_intermediate_size"
    layers, step = fields.required("num_hidden_layers")[0], fields.count("decoder_sparse_step", 1)
    only = fields.entries("mlp_only_layers")
    dense = frozenset(index for index in range(layers) if index in only or (index + 1) % step)
    shared = fields.required("shared_expert_intermediate_size")[0] if family == "qwen2_moe" else 0
    return Experts(E, k, fields.required(width)[0], shared, dense)


# transformers' defaults.
IDEFICS3_EYES = {
    "hidden_size": 1152,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "patch_size": 32,
    "image_size": 224,
}
GEMMA3_TEXT = Line(
    "gemma3_text",
    tied=True,
    head_dim=256,
    kv_heads=4,
    norms_per_layer=4,
    qk_norm=1,
    defaults={"num_attention_heads": 8, "vocab_size": 262_208},
)


def gemma3(fields: ConfigFields) -> Shape:
    """Gemma 3 with a vision tower: a decoder by ``text_config`` and a SigLIP tower by ``vision_config``.

    The hub's files leave out sizes of ``text_config``. Text never enters the tower, but its weights take memory and its
    linear layers adapt.
    """
    text, vision = fields.part("text_config"), fields.part("vision_config")
    tied = fields.flag("tie_word_embeddings", True)
    shape = decoder(text, dataclasses.replace(GEMMA3_TEXT, family="gemma3", path="model.language_model"))
    modules = (*_siglip("model.vision_tower", vision), *_projector(vision, shape.hidden), *shape.modules)
    return dataclasses.replace(shape, modules=modules, tied=tied, text="model.language_model.")


def idefics3(fields: ConfigFields) -> Shape:
    """Idefics3 and SmolVLM: a Llama by ``text_config``, a SigLIP tower, and one layer between them."""
    vision = fields.part("vision_config").with_defaults(IDEFICS3_EYES)
    shape = decoder(fields.part("text_config"), Line(str(fields.config["model_type"]), path="model.text_model"))
    eyes, scale = vision.required("hidden_size")[0], fields.count("scale_factor", 2)
    joint = Module("model.connector.modality_projection.proj", "linear", eyes * scale**2, shape.hidden)
    modules = (*_siglip("model.vision_model", vision), joint, *shape.modules)
    tied = fields.flag("tie_word_embeddings", False)
    return dataclasses.replace(shape, modules=modules, tied=tied, text="model.text_model.")


def _siglip(path: str, fields: ConfigFields) -> Iterator[Module]:
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


def _projector(fields: ConfigFields, h: int) -> Iterator[Module]:
    (eye,) = fields.required("hidden_size")
    yield Module("model.multi_modal_projector", "plain", extra=eye * h)
    yield Module("model.multi_modal_projector.mm_soft_emb_norm", "norm", extra=eye)


def gpt2(fields: ConfigFields) -> Shape:
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


# Defaults are transformers', for fields that a config.json may leave out.
LINES = (
    Line("llama"),
    Line("smollm3", tied=True, kv_heads=4),
    Line("granite"),
    Line("mistral", kv_heads=8),
    Line("qwen2", qkv_bias=True, kv_heads=32),
    Line("qwen3", qk_norm=1, head_dim=128, kv_heads=32),
    Line("gemma", tied=True, head_dim=256, kv_heads=16),
    Line("gemma2", tied=True, head_dim=256, kv_heads=4, norms_per_layer=4, eager=True),
    GEMMA3_TEXT,
    Line("phi3", fused=True),
    Line("olmo2", qk_norm=2),
    Line("mixtral", kv_heads=8, experts=True),
    Line("qwen2_moe", qkv_bias=True, kv_heads=16, experts=True),
    Line("qwen3_moe", qk_norm=1, kv_heads=4, experts=True),
)
# By ``model_type``.
FAMILIES: dict[str, Family] = {line.family: partial(decoder, line=line) for line in LINES}
FAMILIES |= {"gemma3": gemma3, "gpt2": gpt2, "idefics3": idefics3, "smolvlm": idefics3}

# Families that transformers builds only where the hidden size is a multiple of the heads; the others round down.
WHOLE_HEADS = frozenset({"llama", "gemma2", "gemma3", "gemma3_text", "gpt2", "idefics3", "smolvlm"})
HEAD_FIELDS = "hidden_size, num_attention_heads, num_key_value_heads"


def shape_of(config: Fields, name: str = "the config") -> Shape:
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
    shape = FAMILIES[family](ConfigFields(config, name))
    _check_heads(shape, name)
    return shape


def _check_heads(shape: Shape, name: str) -> None:
    """Raise ModelError (RW326) for numbers of heads that attention cannot use."""
    wrong = []
    if shape.hidden % shape.heads and shape.family in WHOLE_HEADS:
        wrong.append(f"the hidden size {shape.hidden} is not a multiple of its {shape.heads} attention heads")
    if shape.heads % shape.kv_heads:
        wrong.append(f"its {shape.heads} attention heads are not a multiple of its {shape.kv_heads} key-value heads")
    if wrong:
        names = "n_embd, n_head" if shape.family == "gpt2" else HEAD_FIELDS
        raise ModelError(
            "RW326",
            f"the sizes in the config of {name} do not go together: {'; '.join(wrong)} ({names}); take the config.json "
            "that came with the model.",
        )

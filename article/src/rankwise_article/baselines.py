"""``bottleneck``, ``prefix`` and ``dora_through`` as methods of ``rankwise train`` and ``rankwise compare``.

Their parameters are float32, one module of the model's, and computed in the dtype of what they meet. ``prefix`` is
saved in PEFT's format. PEFT has none of the others, and refuses the ``peft_type`` of their ``adapter_config.json``.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear

from rankwise.errors import ConfigError
from rankwise.foreign import JsonObject, read_json
from rankwise.methods import MethodType
from rankwise.records import write_bytes, write_json

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
# The attribute of the model that holds the trained module, so that it is among the model's parameters.
ATTRIBUTE = "rankwise_baseline"
# The names of a block's sublayers in transformers.
ATTENTION = ("self_attn", "attn", "attention", "self_attention")
FEED_FORWARD = ("mlp", "feed_forward", "ffn", "block_sparse_moe")
# transformers 5.2x renames the argument.
CACHE_NAMES = ("cache", "past_key_values")
# alpha / r of dora_through, whose alpha is 2 r.
SCALING = 2.0

Output = Tensor | tuple[Tensor | None, ...]
Call = tuple[tuple[Tensor, ...], dict[str, Any]]


class Bottleneck(nn.Module):
    """Houlsby et al. 2019, arXiv 1902.00751: ``h + W_up gelu(W_down h + b_down) + b_up``

    after the attention and after the feed-forward sublayer of every block, before the residual is added. h: (..., d),
    W_down: (width, d), W_up: (d, width), zero at the start, so that training starts at the base model. The paper also
    trains the layer norms; here the base stays frozen, as in Pfeiffer et al. 2021. It cannot be merged.
    """

    def __init__(self, d: int, width: int, device: torch.device) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(width, d, device=device))
        self.down_bias = nn.Parameter(torch.zeros(width, device=device))
        self.up = nn.Parameter(torch.zeros(d, width, device=device))
        self.up_bias = nn.Parameter(torch.zeros(d, device=device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, h: Tensor) -> Tensor:
        down, down_bias, up, up_bias = (
            value.to(h.dtype) for value in (self.down, self.down_bias, self.up, self.up_bias)
        )
        return h + linear(gelu(linear(h, down, down_bias)), up, up_bias)

    def after(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Output) -> Output:
        """A forward hook. Attention returns a tuple with its output first, a feed-forward layer returns a tensor."""
        return (self(output[0]), *output[1:]) if isinstance(output, tuple) else self(output)


def add_bottleneck(model: nn.Module, width: int) -> nn.ModuleDict:
    """{sublayer's path with "/" for ".": its bottleneck}. Raises ConfigError (RA170) for blocks of other sublayers."""
    found = list(_sublayers(model))
    if not found:
        raise ConfigError(
            "RA170",
            f"bottleneck adapters need blocks with attention and feed-forward sublayers, and {type(model).__name__} "
            f"has none named {', '.join((*ATTENTION, *FEED_FORWARD))}; use lora.",
        )
    d = int(model.config.get_text_config().hidden_size)  # type: ignore[union-attr,operator]
    bottlenecks = nn.ModuleDict()
    for path, module in found:
        bottleneck = Bottleneck(d, width, next(itertools.chain(module.parameters(), module.buffers())).device)
        bottlenecks[path.replace(".", "/")] = bottleneck
        module.register_forward_hook(bottleneck.after)
    return bottlenecks


def _sublayers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(path, module) of the attention and the feed-forward sublayers of the blocks, in order."""
    for path, module in model.named_modules():
        parent, _, name = path.rpartition(".")
        if name in (*ATTENTION, *FEED_FORWARD) and parent.rpartition(".")[2].isdigit():
            yield path, module


class Prefix(nn.Module):
    """Li and Liang 2021, arXiv 2101.00190: P more keys and values before those of the text in every attention layer,

        attention(q, [K_prefix; K], [V_prefix; V])          K_prefix, V_prefix: (P, heads of keys, head size)

    They start as the model's keys and values of P random tokens, which trains far better than random numbers (section
    7.4). As in PEFT's default, the paper's reparametrization by an MLP is left out. Keys are stored after their
    rotation: the prefix has the positions 0 to P - 1, and the text follows.
    """

    def __init__(self, pairs: Tensor) -> None:
        """``pairs``: (layers, 2, heads, P, head size)."""
        super().__init__()
        self.layers, _, self.heads, self.length, self.head_size = pairs.shape
        # PEFT's name and layout: (P, layers * 2 * heads * head size).
        flat = pairs.float().permute(3, 0, 1, 2, 4).reshape(self.length, -1)
        self.prompt_embeddings = nn.Parameter(flat.contiguous())

    def config(self) -> JsonObject:
        width = self.heads * self.head_size
        return {
            "encoder_hidden_size": width,
            "num_attention_heads": self.heads,
            "num_layers": self.layers,
            "num_transformer_submodules": 1,
            "num_virtual_tokens": self.length,
            "prefix_projection": False,
            "token_dim": width,
        }

    def before(self, module: Any, inputs: tuple[Tensor, ...], named: dict[str, Any]) -> Call:
        """A forward pre-hook that passes the prefix as a cache and extends the mask and the positions by its length.

        Raises ConfigError (RA171) in training with gradient checkpointing, which drops caches.
        """
        from transformers import DynamicCache

        if module.training and any(getattr(part, "gradient_checkpointing", False) for part in module.modules()):
            raise ConfigError(
                "RA171",
                "prefix tuning passes its prefix as a cache, which gradient checkpointing drops; train without "
                "--gradient-checkpointing.",
            )
        if inputs:
            named["input_ids"], inputs = inputs[0], inputs[1:]
        ids = named.get("input_ids")
        text = named["inputs_embeds"] if ids is None else ids
        cache = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
        if cache is None:
            cache = named[_cache_name(module)] = DynamicCache()
        # In the first call of a generation the cache is empty; later calls bring the filled one.
        if cache.get_seq_length() == 0:
            self._fill(cache, text.shape[0], module.dtype)
        if isinstance(mask := named.get("attention_mask"), Tensor):
            # Columns that hide nothing, for a mask (B, L), or (B, 1, L, L) of booleans or -inf.
            is_added = mask.dim() == 4 and mask.is_floating_point()
            seen = mask.new_full((*mask.shape[:-1], self.length), 0 if is_added else 1)
            named["attention_mask"] = torch.cat([seen, mask], -1)
        if named.get("position_ids") is not None:
            named["position_ids"] = named["position_ids"] + self.length
        return inputs, named

    def _fill(self, cache: Any, batch: int, dtype: torch.dtype) -> None:
        """Put the prefix, repeated for each of ``batch`` rows and cast to ``dtype``, into an empty cache."""
        pairs = self.prompt_embeddings.view(self.length, self.layers, 2, self.heads, self.head_size).permute(
            1, 2, 3, 0, 4
        )
        for layer, (keys, values) in enumerate(pairs.to(dtype)):
            cache.update(keys.expand(batch, -1, -1, -1), values.expand(batch, -1, -1, -1), layer)


@torch.no_grad()
def add_prefix(model: Any, length: int) -> Prefix:
    """A prefix of ``length`` positions before every text, drawn with torch's generator.

    Raises ConfigError (RA171) for a model whose cache does not hold keys and values of one shape in every layer.
    """
    from transformers import DynamicCache

    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (1, length)).to(model.device)
    training = model.training
    model.eval()
    cache = DynamicCache()
    model(input_ids=ids, use_cache=True, **{_cache_name(model): cache})
    model.train(training)
    pairs: list[Any] = [(getattr(layer, "keys", None), getattr(layer, "values", None)) for layer in cache.layers]
    shapes = {tuple(key.shape) if isinstance(key, Tensor) else () for key, _ in pairs}
    if len(shapes) != 1 or () in shapes or next(iter(shapes))[2] != length:
        raise ConfigError(
            "RA171",
            f"prefix tuning needs keys and values of equal shapes in every layer, and {type(model).__name__} keeps "
            "something else; use lora.",
        )
    prefix = Prefix(torch.stack([torch.cat(pair) for pair in pairs]))
    # On the part without the head, which some callers call directly.
    model.base_model.register_forward_pre_hook(prefix.before, with_kwargs=True)
    return prefix


def _cache_name(model: nn.Module) -> str:
    return CACHE_NAMES["cache" not in inspect.signature(model.forward).parameters]


class Direction(nn.Module):
    """The trained part of one layer of ``dora_through``: A (r, in), B (out, r) and m (out,)."""

    def __init__(self, base: nn.Linear, r: int) -> None:
        super().__init__()
        weight = base.weight.detach().float()
        self.A = nn.Parameter(torch.empty(r, base.in_features, device=weight.device))
        self.B = nn.Parameter(torch.zeros(base.out_features, r, device=weight.device))
        self.m = nn.Parameter(weight.norm(dim=1))
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))


class DoraThrough(nn.Module):
    """DoRA with the gradient of the norm, as the article prints its layer; s is ``SCALING``, and W: (out, in).

        y = g * (W x + s B A x) + b,    g = m / ||W + s B A||
        ||W + s B A||^2 = ||W||^2 + 2 s <W A^T, B> + s^2 <B A A^T, B>                                           per row

    rankwise and DoRA's section 4.3 take the norm as a constant in the backward pass (NVlabs' ``dora_simple``).
    """

    def __init__(self, base: nn.Linear, direction: Direction) -> None:
        super().__init__()
        self.base, self.direction = base, direction
        self.in_features, self.out_features = base.in_features, base.out_features
        self.squared = base.weight.detach().float().square().sum(1)

    def gain(self) -> Tensor:
        A, B, W = self.direction.A, self.direction.B, self.base.weight
        cross = (linear(A.to(W.dtype), W).T.float() * B).sum(1)
        own = (B @ (A @ A.T) * B).sum(1)
        return self.direction.m / (self.squared + 2 * SCALING * cross + SCALING**2 * own).sqrt()

    def forward(self, x: Tensor) -> Tensor:
        g, dtype = self.gain(), x.dtype
        y = linear(x, self.base.weight)
        # y + (g - 1) y: in bfloat16 a gain close to 1 would round to 1.
        y = torch.addcmul(y, y, (g - 1).to(dtype))
        low = linear(linear(x, self.direction.A.to(dtype)), self.direction.B.to(dtype))
        y = torch.addcmul(y, low, (g * SCALING).to(dtype))
        return y if self.base.bias is None else y + self.base.bias


def add_dora_through(model: nn.Module, r: int) -> nn.ModuleDict:
    """{path with "/" for ".": direction} of every linear layer but the head. Raises ConfigError (RA170) without one."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    found = [(path, part) for path, part in model.named_modules() if type(part) is nn.Linear and part is not head]
    if not found:
        raise ConfigError("RA170", f"dora_through needs linear layers, and {type(model).__name__} has none; use dora.")
    directions = nn.ModuleDict()
    for path, base in found:
        directions[path.replace(".", "/")] = direction = Direction(base, r)
        model.set_submodule(path, DoraThrough(base, direction))
    return directions


# {method: (peft_type, what adds it to a frozen model)}
METHODS: Mapping[str, tuple[str, Callable[[nn.Module, int], nn.Module]]] = {
    "prefix": ("PREFIX_TUNING", add_prefix),
    "bottleneck": ("BOTTLENECK", add_bottleneck),
    "dora_through": ("DORA_THROUGH", add_dora_through),
}


def add_baseline(method: str, model: nn.Module, size: int) -> int:
    """Freeze the model and add the baseline, in place. Returns the number of trained parameters.

    ``size``: width of the bottlenecks, length of the prefix, or rank. Raises ConfigError as those in ``METHODS`` do.
    """
    model.requires_grad_(False)
    part = METHODS[method][1](model, size)
    part.method, part.size = method, size  # type: ignore[assignment]
    setattr(model, ATTRIBUTE, part)
    return sum(parameter.numel() for parameter in part.parameters())


def save_baseline(model: nn.Module, folder: Path) -> None:
    """Write the model's baseline as ``adapter_config.json`` and ``adapter_model.safetensors`` into ``folder``."""
    part = getattr(model, ATTRIBUTE)
    config: JsonObject = {
        "base_model_name_or_path": getattr(model, "name_or_path", None),
        "inference_mode": True,
        "peft_type": METHODS[part.method][0],
        "task_type": "CAUSAL_LM",
    }
    config |= part.config() if isinstance(part, Prefix) else {"width": part.size}
    tensors = {key: value.detach().cpu().contiguous() for key, value in part.named_parameters()}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / WEIGHTS_FILE, safetensors.torch.save(tensors, metadata={"format": "pt"}))
    write_json(folder / CONFIG_FILE, dict(sorted(config.items())))


def load_baseline(model: nn.Module, folder: Path) -> None:
    """Add the baseline in ``folder`` to the model, frozen. Raises ConfigError (RA172) if there is none, or it does
    not fit.
    """
    try:
        config = read_json(folder / CONFIG_FILE)
        method = {peft_type: method for method, (peft_type, _) in METHODS.items()}[config["peft_type"]]
        size = int(config["num_virtual_tokens" if method == "prefix" else "width"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError("RA172", f"{folder} holds no baseline ({error!r}); give the folder of a run.") from None
    add_baseline(method, model, size)
    load_baseline_weights(model, folder)
    getattr(model, ATTRIBUTE).requires_grad_(False)


def load_baseline_weights(model: nn.Module, folder: Path) -> None:
    """Copy the tensors that ``save_baseline`` wrote into the model's parameters. Raises ConfigError (RA172) if they
    do not fit.
    """
    try:
        getattr(model, ATTRIBUTE).load_state_dict(safetensors.torch.load_file(folder / WEIGHTS_FILE))
    except RuntimeError as error:
        raise ConfigError("RA172", f"the tensors in {folder} do not fit this model: {str(error)[:300]}") from None


BOTTLENECK, PREFIX, DORA_THROUGH = (
    MethodType(functools.partial(add_baseline, method), save_baseline, load_baseline_weights, load_baseline)
    for method in ("bottleneck", "prefix", "dora_through")
)

"""The model and the step that a plan traces, as a run prepares and computes them, on fake or on real tensors.

B rows, L tokens a row, P positions of a row that are scored, V vocabulary, H heads, Hkv key-value heads, D head width.
"""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from rankwise.acceleration import (
    LossOptions,
    flattening_obstacle,
    fused_head,
    optimize_for_training,
)
from rankwise.acceleration.generation import cache_bytes_per_token, drawn
from rankwise.acceleration.loss import losses, scored_positions
from rankwise.acceleration.memory import average_gradients
from rankwise.acceleration.scoring import LOSS_LOGITS, hidden_states, window_of
from rankwise.adapters.select import with_heads
from rankwise.compat.torch import (
    Ctx,
    is_fake,
    is_unit,
    own_buffers,
    own_parameters,
    own_part,
)
from rankwise.compat.transformers import attention_of, kept_in_float32
from rankwise.config import DORA, FOUR_BITS
from rankwise.constants import CACHE_BYTES, IGNORED
from rankwise.labels import SINGLE
from rankwise.models.load import keep_heads_exact
from rankwise.ops.selection import as_autocast
from rankwise.planning.workload import Workload, rule_of, state_bytes

Enter = Callable[[str], None]
CARD_ATTENTION = "rankwise_card"
# A phase whose memory no run takes.
UNCOUNTED = "uncounted"


# --- the model ---


def materialize(
    model: nn.Module, dtype: torch.dtype, *, fill: bool = False, device: torch.device | str = "cpu"
) -> None:
    """Move a model from the meta device to ``device``, as fake tensors where a fake mode is active.

    Floating parameters get ``dtype``, except in modules that the model keeps in float32; buffers keep their dtype. Tied
    parameters stay tied. ``fill``: use small random values, and zero in tensors that are not floating.
    """
    keep = kept_in_float32(model)
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def remade(tensor: Tensor, wanted: torch.dtype) -> Any:
        if id(tensor) not in made:
            # The reference to the old tensor keeps its id from being reused.
            made[id(tensor)] = (tensor, _empty_like(tensor, wanted, device, fill))
        return made[id(tensor)][1]

    for path, module in model.named_modules():
        for name, parameter in own_parameters(module).items():
            if parameter is not None:
                full = f"{path}.{name}"
                wanted = torch.float32 if any(part in full.split(".") for part in keep) else dtype
                own_parameters(module)[name] = remade(parameter, wanted)
        for name, buffer in own_buffers(module).items():
            if buffer is not None:
                own_buffers(module)[name] = remade(buffer, buffer.dtype)
        for name, value in list(vars(module).items()):
            # Some modules hold tensors that are not buffers, such as rotary embeddings' original frequencies.
            if isinstance(value, Tensor) and value.is_meta:
                setattr(module, name, remade(value, value.dtype))


@torch.no_grad()
def _empty_like(tensor: Tensor, dtype: torch.dtype, device: torch.device | str, fill: bool) -> Tensor:
    new = torch.empty(tensor.shape, dtype=dtype if tensor.is_floating_point() else tensor.dtype, device=device)
    if fill:
        new = new.normal_(std=0.02) if new.is_floating_point() else new.zero_()
    return nn.Parameter(new, requires_grad=new.is_floating_point()) if isinstance(tensor, nn.Parameter) else new


def weights_dtype(method: str, workload: Workload) -> torch.dtype:
    """The dtype of the base. Full fine-tuning keeps float32 weights, because 16 bits would lose small updates."""
    return torch.float32 if method == "full" else getattr(torch, workload.dtype)


def prepare(model: PreTrainedModel, method: str, workload: Workload) -> bool:
    """Quantize, add the adapter and, with ``fast``, accelerate the model, as a run does. Returns whether the run
    concatenates the rows of a batch whose attention takes their bounds."""
    from rankwise.adapters import add_adapter
    from rankwise.adapters.layer import Origin
    from rankwise.adapters.lora import LowRankPair
    from rankwise.adapters.state import DEFAULT_NAME, adapted_layers
    from rankwise.quantization import quantize
    from rankwise.quantization.config import CONFIGS

    if workload.labels:
        keep_heads_exact(model)
        # As a tokenizer has set it; no keys and values are kept for a next token.
        model.config.get_text_config().pad_token_id, model.config.use_cache = 0, False
    if method in FOUR_BITS:
        kind = CONFIGS[workload.quant_type]
        quantize(model, kind(block_size=workload.block_size, double_quant=workload.double_quant))
    if method == "full":
        model.requires_grad_(True)
    else:
        config = with_heads(model, workload.lora_config(use_dora=method in DORA))
        # Other initialisations need values, which fake tensors do not have.
        add_adapter(model, dataclasses.replace(config, init_lora_weights=True))
        for _, layer in adapted_layers(model, DEFAULT_NAME) if config.init.kind == "pissa" else ():
            if isinstance(pair := layer.adapter(DEFAULT_NAME), LowRankPair):
                layer.origin = Origin(pair.lora_A.detach().clone(), pair.lora_B.detach().clone(), pair.scaling)
    if workload.gradient_checkpointing:
        with warnings.catch_warnings():
            # transformers renames it in 5.2x; the old name works in every version that we admit.
            warnings.simplefilter("ignore", FutureWarning)
            model.gradient_checkpointing_enable()
    flat = _accelerate(model, workload)
    model.train()
    return flat


def _accelerate(model: PreTrainedModel, workload: Workload) -> bool:
    done = optimize_for_training(model) if workload.fast else None
    stands_for_card = workload.device_type == "cuda" and next(model.parameters()).device.type == "cpu"
    if done is None or not done.attention:
        if stands_for_card:
            use_card_attention(model)
        return False
    # The CPU attention kernel does not support float16, to which autocast casts.
    if workload.dtype == "float16" and workload.device_type == "cpu":
        return False
    if is_fake(next(model.parameters())):
        # flattening_obstacle compares values; here the signature decides.
        names = inspect.signature(type(model).forward).parameters
        return {"position_ids", "logits_to_keep"} <= set(names) and not drops_attention(model)
    return flattening_obstacle(model) is None and not drops_attention(model)


def drops_attention(model: PreTrainedModel) -> bool:
    """Whether the model has dropout on attention weights. Training then uses a kernel that saves all weights, so rows
    are not concatenated, which would need the square of all tokens."""
    config = model.config
    return any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop"))


# --- attention of a card ---


def use_card_attention(model: PreTrainedModel) -> None:
    """Replace torch's scaled_dot_product_attention in the model by the functions of this module."""
    if attention_of(model.config) != "sdpa":
        return
    AttentionInterface.register(CARD_ATTENTION, card_attention)
    AttentionMaskInterface.register(CARD_ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(CARD_ATTENTION)


def card_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: object
) -> tuple[Tensor, None]:
    """transformers' attention function: query (B, H, L, D), key and value (B, Hkv, L, D) -> (B, L, H, D).

    With a mask transformers repeats keys and values for every head (without one the kernel groups them), and torch
    turns a boolean mask into an additive one of the query's dtype, again in every layer.
    """
    query, key, value = map(as_autocast, (query, key, value))
    bias = None
    if attention_mask is not None:
        groups = query.shape[1] // key.shape[1]
        key, value = repeat_kv(key, groups), repeat_kv(value, groups)
        bias = torch.empty(attention_mask.shape, dtype=query.dtype, device=query.device)
    return _Kept.apply(query, key, value, bias), None


class _Kept(torch.autograd.Function):
    """Saves q, k, v, the mask, the output and a float32 log-sum per head and position, as flash and memory-efficient
    attention do, without computing attention."""

    @staticmethod
    def forward(ctx: Ctx[None], q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        B, H, L, _ = q.shape
        out = q.new_empty(B, L, H, v.shape[-1])
        ctx.save_for_backward(q, k, v, bias, out, q.new_empty(B, H, L, dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[None], grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


# --- the batch and its loss ---


@dataclasses.dataclass(frozen=True)
class Batch:
    """``inputs``: the model's inputs without labels; ``labels`` (B, L), -100 where nothing is scored, or (B,) of a head
    of labels."""

    inputs: Mapping[str, object]
    labels: Tensor
    # (P,): what is scored, the same in each row.
    positions: Tensor
    label_smoothing: float
    # Whether the loss is one of each token's log-probability.
    of_log_probs: bool


def make_batch(workload: Workload, device: torch.device | str = "cpu", *, flat: bool = False) -> Batch:
    """Rows of full length. The last of several rows has one token of padding, as in batches of rows with different
    lengths.

    ``flat``: the rows are concatenated into one row with their bounds, in the cases where a run does so.
    """
    B, L = workload.sequences, workload.max_length
    P = workload.trained_tokens // B
    ids, mask, labels = (torch.ones(B, L, dtype=torch.long, device=device) for _ in range(3))
    labels[:, P + 1 :] = IGNORED
    if workload.labels:
        labels = torch.zeros(B, dtype=torch.long, device=device)
    positions = torch.arange(P, device=device)
    loss = workload.label_smoothing, workload.objective in ("dpo", "kto", "grpo")
    if not flat:
        mask[-1, -1] = int(B == 1)
        return Batch({"input_ids": ids, "attention_mask": mask}, labels, positions, *loss)
    labels[:, 0] = IGNORED
    starts = torch.arange(B, device=device)[:, None] * L
    bounds = torch.arange(0, B * L + 1, L, dtype=torch.int32, device=device)
    inputs = {
        "input_ids": ids.view(1, -1),
        "position_ids": torch.arange(L, device=device).repeat(B)[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": L,
        "max_length_k": L,
    }
    return Batch(inputs, labels.view(1, -1), (starts + positions).reshape(-1), *loss)


def autocast_dtype(method: str, workload: Workload) -> torch.dtype | None:
    """The dtype of autocast: full fine-tuning computes in 16 bits with float32 weights. None: no autocast."""
    return getattr(torch, workload.dtype) if method == "full" and workload.dtype != "float32" else None


def begin_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The gradients that earlier micro-batches of a step have left."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


def take_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    enter: Enter,
    autocast: torch.dtype | None,
) -> None:
    """Forward, backward, clipping, optimizer. ``enter`` is called when a phase begins."""
    enter("forward")
    value = loss_of(model, batch, autocast)
    enter("backward")
    value.backward()
    del value
    enter("optimizer")
    if is_unit(model):
        average_gradients([parameter for parameter in model.parameters() if parameter.requires_grad])
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    # foreach where the optimizer uses it, as on a GPU.
    nn.utils.clip_grad_norm_(trained, 1.0, foreach=optimizer.defaults.get("foreach"))
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def loss_of(model: nn.Module, batch: Batch, autocast: torch.dtype | None) -> Tensor:
    """Mean cross-entropy over the scored positions, with the entropy and the accuracy that a run reports."""
    with torch.autocast(batch.labels.device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        if batch.labels.dim() == 1:
            logits = model(**batch.inputs).logits.float()
            return losses(logits, batch.labels, SINGLE).mean()
        if fused_head(model) is not None:
            options = LossOptions(
                batch.label_smoothing,
                want_stats=True,
                want_log_probs=batch.of_log_probs,
                scored=scored_positions(batch.labels),
            )
            given = {"labels": batch.labels, "use_cache": False, "loss_options": options}
            return model(**batch.inputs, **given).loss
        logits = _logits(model, batch)
    # The outputs of an autocast model become float32.
    return loss_from(logits if autocast is None else logits.float(), batch)


def loss_from(logits: Tensor, batch: Batch) -> Tensor:
    """The loss from the model's own logits (B, P, V)."""
    V = logits.shape[-1]
    # The scored logits are selected by a mask, which copies them.
    scored = torch.arange(logits.numel() // V, device=logits.device)
    chosen = logits.reshape(-1, V)[scored].float()
    wanted = batch.labels[:, batch.positions + 1].reshape(-1)
    total = F.cross_entropy(chosen, wanted, reduction="sum", label_smoothing=batch.label_smoothing)
    _entropy_and_accuracy(chosen.detach(), wanted)
    return total / wanted.numel()


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """(B, P, V), or (B, L, V) of a model that cannot leave positions out, cut to (B, P, V)."""
    keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
    kept = {"logits_to_keep": batch.positions} if keeps else {}
    logits: Tensor = model(**batch.inputs, use_cache=False, **kept).logits
    return logits if keeps else logits[:, batch.positions]


@torch.no_grad()
def _entropy_and_accuracy(logits: Tensor, wanted: Tensor) -> None:
    log_p = F.log_softmax(logits, dim=-1)
    -(log_p.exp() * log_p).sum(-1).mean()
    (logits.argmax(-1) == wanted).float().mean()


@torch.no_grad()
def evaluate(model: PreTrainedModel, workload: Workload, autocast: torch.dtype | None) -> None:
    """The pass of ``acceleration.scoring.loss_scorer`` over one batch: packed rows under a mask, logits in chunks."""
    if workload.labels:
        loss_of(model, make_batch(workload), autocast)
        return
    B, L = workload.sequences, workload.max_length
    ids, mask = torch.ones(B, L, dtype=torch.long), torch.ones(B, 1, L, L, dtype=torch.bool)
    head, V = model.get_output_embeddings(), model.config.get_text_config().vocab_size
    with torch.autocast("cpu", dtype=autocast or torch.bfloat16, enabled=autocast is not None):
        hidden = hidden_states(model, ids, torch.arange(L).expand(B, -1), mask).flatten(0, 1)
        rows = min(workload.trained_tokens, max(1, LOSS_LOGITS // V))
        head(hidden[torch.arange(rows)]).float().logsumexp(-1)


# --- optimizers ---


def new_optimizer(workload: Workload, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as the device runs it (fused on a GPU), or a stand-in for an optimizer that torch does not have."""
    if workload.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=workload.device_type == "cuda")
    return CountedOptimizer(parameters, workload.optimizer)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that exists from the second step on."""
    if isinstance(optimizer, CountedOptimizer):
        optimizer.step()
        return
    for parameter in (item for group in optimizer.param_groups for item in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.ones(()), **moments}


class CountedOptimizer(torch.optim.Optimizer):
    """Holds as many bytes of state for each parameter as the rule of ``name`` gives, and its copies during the step."""

    def __init__(self, parameters: list[torch.nn.Parameter], name: str) -> None:
        super().__init__(parameters, {})
        self.name = name

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        copies = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self._keep(parameter)
                if rule_of(self.name).copies:
                    copies.append(torch.empty_like(parameter))

    def _keep(self, parameter: torch.Tensor) -> None:
        size, _ = state_bytes(self.name, [(tuple(own_part(parameter).shape), parameter.element_size())])
        if size and not self.state[parameter]:
            self.state[parameter]["bytes"] = torch.empty(size, dtype=torch.uint8)


# --- generation ---


def write_a_token(model: PreTrainedModel, method: str, workload: Workload, enter: Enter) -> None:
    """Run the pass over the prompts and that of the last token, in one of which generation has its peak.

    The pass that fills the cache up to the last token happens in no run, so it is in the phase ``UNCOUNTED``.
    """
    rows = workload.written
    if workload.device_type == "cpu":
        rows = min(rows, max(1, CACHE_BYTES // max(1, cache_bytes_per_token(model) * workload.max_length)))
    with _writing(model, method, workload):
        enter("generation")
        _draw(model, min(workload.prompts, rows), workload.prompt_tokens, DynamicCache(config=model.config))
        cache = DynamicCache(config=model.config)
        enter(UNCOUNTED)
        _draw(model, rows, workload.max_length - 1, cache)
        enter("generation")
        _draw(model, rows, 1, cache)


@contextmanager
def _writing(model: PreTrainedModel, method: str, workload: Workload) -> Iterator[None]:
    dtype, training = autocast_dtype(method, workload), model.training
    model.eval()
    with (
        torch.no_grad(),
        torch.autocast(model.device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None),
    ):
        yield
    model.train(training)


def _draw(model: PreTrainedModel, rows: int, tokens: int, cache: DynamicCache) -> None:
    """Compute ``tokens`` new positions of each row after those in the cache, and draw the next token."""
    before = cache.get_seq_length()
    mask = torch.ones(rows, before + tokens, dtype=torch.long)
    if before and window_of(model) is None:
        # Prompts differ in length, so that a token has a mask, for which keys and values are copied to every head.
        mask = mask.bool()[:, None, None]
    known = inspect.signature(model.forward).parameters
    given = {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True}
    if "logits_to_keep" in known:
        given["logits_to_keep"] = 1
    output = model(
        input_ids=torch.ones(rows, tokens, dtype=torch.long),
        attention_mask=mask,
        position_ids=torch.arange(before, before + tokens).expand(rows, -1),
        **given,
    )
    logits = output.logits[:, -1].float()
    drawn(torch.softmax(logits / 1.0, -1), torch.rand(rows))

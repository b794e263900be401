"""What a plan has in the place of a run's files: a model without values or with random ones, made-up rows, optimizers
that are only counted, a GPU's attention. The step itself and the making of the model are the run's (training/step.py).

B sequences, L tokens of each, V vocabulary, H heads, Hkv key-value heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from rankwise.acceleration.generation import cache_bytes_per_token, drawn
from rankwise.acceleration.layouts import LEAST_SHARED, Layout
from rankwise.acceleration.scoring import LOSS_LOGITS, hidden_states, window_of
from rankwise.adapters.select import with_heads
from rankwise.compat.torch import Ctx, own_buffers, own_parameters, own_part
from rankwise.compat.transformers import attention_of, kept_in_float32
from rankwise.constants import CACHE_BYTES, IGNORED
from rankwise.data.objectives import ANSWER_IDS
from rankwise.labels import SINGLE, Labels
from rankwise.methods import method_of
from rankwise.models.load import keep_heads_exact
from rankwise.objectives import OBJECTIVES
from rankwise.ops.selection import as_autocast
from rankwise.planning.workload import MEASURED_OPTIMIZERS, Workload, rule_of, state_bytes
from rankwise.training.batches import Batch, Row
from rankwise.training.grpo import RewardedAnswers
from rankwise.training.objectives import MISMATCHED, Classification, Demonstrations, Preferences, Scoring
from rankwise.training.optimizers import implementation_of, make_optimizer
from rankwise.training.parts import part_of
from rankwise.training.reference import Reference
from rankwise.training.step import (
    Computing,
    Objective,
    Prepared,
    choose,
    make_trainable,
    mixed,
    mixed_precision,
    prepare_model,
)

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


def made(model: PreTrainedModel, method: str, workload: Workload) -> Prepared:
    """Quantize, add the adapter and, with ``fast``, accelerate the model, as a run does."""
    from rankwise.adapters.layer import Origin
    from rankwise.adapters.lora import LowRankPair
    from rankwise.adapters.state import DEFAULT_NAME, adapted_layers
    from rankwise.adapters.switch import keep_reference
    from rankwise.quantization import quantize
    from rankwise.quantization.config import CONFIGS
    from rankwise.quantization.experts import four_bit_stacks
    from rankwise.quantization.transformers_plugin import put_mxfp4

    if workload.labels:
        keep_heads_exact(model)
        # As a tokenizer has set it.
        model.config.get_text_config().pad_token_id = 0
    if workload.experts_in_mxfp4:
        put_mxfp4(model, next(model.parameters()).device)
        for _, stack in four_bit_stacks(model):
            stack.codes.zero_()
            stack.scales.absmax.fill_(127)
    if method_of(method).four_bits:
        kind = CONFIGS[workload.quant_type]
        quantize(model, kind(block_size=workload.block_size, double_quant=workload.double_quant))
    config = with_heads(model, workload.lora_config(method))
    # Other initialisations need values, which fake tensors do not have.
    make_trainable(model, method, dataclasses.replace(config, init_lora_weights=True))
    if not method_of(method).trains_all and config.init.kind == "pissa":
        for _, layer in adapted_layers(model, DEFAULT_NAME):
            if isinstance(pair := layer.adapter(DEFAULT_NAME), LowRankPair):
                layer.origin = Origin(pair.lora_A.detach().clone(), pair.lora_B.detach().clone(), pair.scaling)
    if workload.keeps_reference:
        keep_reference(model)
    products, _ = choose(workload, method, workload.objective, workload.strategy, model)
    ids = functools.partial(torch.ones, 1, 2, dtype=torch.long)
    prepared = prepare_model(model, method, workload.objective, part_of(Computing, workload, products=products), ids)
    stands_for_card = workload.device_type == "cuda" and next(model.parameters()).device.type == "cpu"
    if stands_for_card and (prepared.accelerated is None or not prepared.accelerated.attention):
        use_card_attention(model)
    return prepared


# --- attention of a GPU ---


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


def dtypes(method: str, workload: Workload) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtypes of the weights and of mixed precision."""
    return mixed_precision(method, getattr(torch, workload.dtype), workload.device_type)


# --- what is learned, and the batch ---


def objective_of(model: PreTrainedModel, workload: Workload, layout: Layout) -> Objective:
    """The objective of a run, without its rows."""
    none: Any = []
    of_batches = {"pad": 0, "size": workload.batch_size, "seed": 0}
    facts = OBJECTIVES[workload.objective]
    if facts.of_demonstrations:
        smoothing = workload.label_smoothing
        return Demonstrations(
            model=model, rows=none, eval_rows=None, **of_batches, layout=layout, label_smoothing=smoothing
        )
    if facts.of_labels:
        labels = Labels(tuple(map(str, range(workload.labels))), SINGLE)
        return Classification(rows=none, eval_rows=None, labels=labels, **of_batches)
    scoring = Scoring(model, layout)
    loss_type = workload.loss_type or facts.losses[0]
    if facts.of_preferences:
        preferring = {"loss_type": loss_type, "beta": workload.beta or facts.beta, "max_length": sys.maxsize}
        # A run computes its reference before the first step, in less memory than a step takes.
        kept = Reference("", values=defaultdict(float))
        return Preferences(scoring=scoring, rows=none, eval_rows=None, **of_batches, **preferring, kept=kept)  # type: ignore[arg-type]
    return RewardedAnswers(
        scoring=scoring,
        rows=none,
        eval_rows=None,
        decode=lambda answers: [],
        rewards=(),
        weights=(),
        stop_ids=frozenset(),
        asked=1,
        group=1,
        longest=workload.max_length,
        loss_type=loss_type,
        beta=workload.beta or facts.beta,
        **of_batches,
    )


def batch_of(objective: Objective, workload: Workload, layout: Layout) -> Batch:
    """A micro-batch of made-up rows of full length, on the host. Where rows are padded, the last of several has one
    token fewer, as in batches of rows with different lengths."""
    rows = [_row(workload, workload.max_length, number) for number in range(workload.batch_size)]
    if layout == "padded" and workload.batch_size > 1 and workload.max_length > 2:
        rows[-1] = _row(workload, workload.max_length - 1)
    if not isinstance(objective, RewardedAnswers):
        return objective.collate(rows)
    # A run writes the answers, which `write_a_token` stands for.
    prompts, answers = ([row[name] for row in rows] for name in ("prompt_ids", "completion_ids"))
    found = objective.laid_out(prompts, answers, sum(map(len, answers)))
    return {**found, "advantages": torch.ones(len(rows)), "figures": {}}


def _row(workload: Workload, length: int, number: int = 0) -> Row:
    """A row of ``length`` tokens, under the names of every objective. Only a pair's answers have a common beginning,
    their prompt."""
    trained = min(length - 1, workload.trained_tokens // workload.sequences)
    # The number in digits, in fewer tokens than are worth sharing.
    own = [2 + number // 8**place % 8 for place in range(LEAST_SHARED - 2)]
    ids, after = [*own, *[1] * length][:length], length - trained - 1
    answers = {name: [kind, *own, *[1] * trained][:trained] for kind, name in enumerate((*ANSWER_IDS, *MISMATCHED))}
    return {
        "input_ids": ids,
        "labels": [IGNORED, *[1] * trained, *[IGNORED] * after],
        "prompt_ids": ids[: length - trained],
        **answers,
        "label": 0 if workload.labels else True,
    }


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The batch with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: changed(item, change) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **changed(fields, change))
    return value


def true_counts(workload: Workload) -> dict[tuple[int, ...], int]:
    """{shape of the flags of trained tokens: how many are set}, which fakes do not know."""
    B, L = workload.sequences, workload.max_length
    return {(L - 1,): workload.trained_tokens // B, (B, L - 1): workload.trained_tokens}


def begin_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """The gradients that earlier micro-batches of a step have left."""
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)


@torch.no_grad()
def evaluate(model: PreTrainedModel, objective: Objective, workload: Workload, batch: Batch, dtype: Any) -> None:
    """A batch without gradients. Of demonstrations, the pass of ``acceleration.scoring.loss_scorer``, which reads
    values: packed rows under a mask, logits in chunks."""
    if isinstance(objective, RewardedAnswers):
        # Its answers are written only.
        return
    with mixed(model, dtype):
        if not isinstance(objective, Demonstrations):
            objective.loss(model, batch)
            return
        B, L = workload.sequences, workload.max_length
        ids, mask = torch.ones(B, L, dtype=torch.long), torch.ones(B, 1, L, L, dtype=torch.bool)
        head, V = model.get_output_embeddings(), model.config.get_text_config().vocab_size
        hidden = hidden_states(model, ids, torch.arange(L).expand(B, -1), mask).flatten(0, 1)
        rows = min(workload.trained_tokens, max(1, LOSS_LOGITS // V))
        head(hidden[torch.arange(rows)]).float().logsumexp(-1)


# --- optimizers ---


def new_optimizer(workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """The run's own AdamW, fused on a GPU, or a stand-in for an optimizer that torch does not have."""
    name = implementation_of(workload.optimizer, workload.device_type)
    if name in MEASURED_OPTIMIZERS:
        return make_optimizer(name, model, rate=1e-4, weight_decay=0.0)
    return CountedOptimizer([parameter for parameter in model.parameters() if parameter.requires_grad], name)


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
    dtype, training = dtypes(method, workload)[1], model.training
    model.eval()
    with torch.no_grad(), mixed(model, dtype):
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

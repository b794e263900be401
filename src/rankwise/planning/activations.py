"""Bytes saved for the backward pass by one layer: with ``planning.backward`` ALL that must be tuned anew when an
operator changes. Imports no torch.

T tokens, L of them a row, h hidden width, q and k widths of queries and of keys, f MLP width, s bytes per element,
R ranks of the layer's adapters, H heads, P = T L H scores. Measured against the dry run
(tests/planning/test_closed_form.py).
"""

from __future__ import annotations

import dataclasses

from rankwise.config import DORA, FOUR_BITS
from rankwise.planning.shape import Shape
from rankwise.planning.weights import DTYPE_BYTES, computes_in_float32, has_packed_experts
from rankwise.planning.workload import Workload

DROPPED_SCORE_BYTES, GPT2_CPU_COPIES = 12, 5
# A CPU drops attention weights in its plain kernel: weights, what dropout leaves of them and its mask in float32.
READ_FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_FIRST = ("gate_proj", "up_proj", "gate_up_proj")
# What reads a layer's first norm, and what the one before the MLP.
CHUNK_BYTES, SMALLEST_CHUNK = 32 << 20, 16
# Of logits, as in ops.linear_cross_entropy.


@dataclasses.dataclass(frozen=True)
class Step:
    """What the formulas read."""

    shape: Shape
    method: str
    workload: Workload
    ranks: float
    # R, on average over the layers.
    adapted: frozenset[str]
    # Last names of layers that adapt or train whole: q_proj, ...
    layer_weights: float
    # Parameters of one layer, on average.
    whole_head: bool = False
    # It trains beside adapters.
    expert_ranks: tuple[float, float] = (0, 0)
    # Of the adapters on stacked experts, of the first and of the second product, on average over the layers.
    expert_share: float = 0
    # Of the layers that have any.

    @property
    def T(self) -> int:
        return self.workload.tokens

    @property
    def s(self) -> int:
        return DTYPE_BYTES[self.workload.dtype]

    @property
    def on_card(self) -> bool:
        return self.workload.device_type == "cuda"

    @property
    def wide(self) -> bool:
        """Whether parts are given what ours take: float32 or bfloat16, which full fine-tuning gives in any dtype."""
        return self.method == "full" or self.workload.dtype != "float16"

    @property
    def native(self) -> bool:
        """Whether the native library's parts run."""
        return self.workload.fast and self.wide and not self.on_card and self.shape.family != "gpt2"

    @property
    def fused(self) -> bool:
        """Whether norms, rotary positions and gated MLPs are ours: on a CPU, and by Triton on a card."""
        return (self.native or self.workload.has_triton_parts) and self.shape.family != "gpt2"

    @property
    def fused_mlp(self) -> bool:
        """Phi-3 keeps gate and up in one projection, which stays PyTorch's."""
        return self.fused and self.shape.family != "phi3"

    @property
    def keeps_read(self) -> bool:
        """Whether adapters keep what they read, since it is no output of a norm of ours, which keeps what it was given;
        OLMo 2 has its norms behind attention and MLP. In float16 they always do."""
        return not self.fused or self.workload.dtype == "float16" or self.shape.family == "olmo2"

    @property
    def own_attention(self) -> bool:
        fast_cpu = self.workload.fast and self.workload.dtype != "float16" and not self.on_card and not self.scores
        dtype = "float32" if self.method == "full" else self.workload.dtype
        return fast_cpu and (dtype == "bfloat16" or computes_in_float32())

    @property
    def four_bit_experts(self) -> bool:
        """Whether experts are computed with one after the other, by `rankwise.quantization.experts`."""
        return self.method in FOUR_BITS and has_packed_experts(self.shape, self.workload)

    @property
    def expert_adapters(self) -> bool:
        """Whether experts adapt, and so are computed by `rankwise.ops.expert_lora`."""
        return self.expert_share > 0

    @property
    def routing_bytes(self) -> int:
        """Per element of the weights of a token's experts; Mixtral leaves them in float32."""
        return 4 if self.shape.family == "mixtral" else self.s

    @property
    def drops_scores(self) -> bool:
        """Whether attention weights are dropped where no kernel does it in passing."""
        return bool(self.shape.attention_dropout) and not self.on_card and not self.shape.eager

    @property
    def scores(self) -> bool:
        """Whether a layer keeps a number, or several, for each head and pair of positions: P."""
        return self.shape.eager or self.drops_scores

    @property
    def P(self) -> int:
        return self.T * self.row_tokens * self.shape.heads

    @property
    def flat(self) -> bool:
        """Whether the trainer lays the rows of a batch end to end in one: where our attention is in the model."""
        return self.own_attention

    @property
    def masked(self) -> float:
        """Share of the layers that are given a mask: all where a row is padded; of a single row those whose window is
        no longer than it."""
        if self.workload.batch_size > 1:
            return 1.0
        window = self.shape.window
        return self.shape.windowed_share if window is not None and self.workload.max_length >= window else 0.0

    @property
    def kept_keys(self) -> float:
        """Width of the keys, and of the values, that attention keeps: with a mask they are repeated for every head, but
        kernels take a single key head as it is for all; eager products copy it."""
        shape = self.shape
        if self.own_attention or (shape.kv_heads == 1 and not shape.eager):
            return shape.keys
        masked = 1.0 if shape.eager else self.masked
        return masked * shape.queries + (1 - masked) * shape.keys

    @property
    def row_tokens(self) -> int:
        """Tokens of a row as the model sees it."""
        return self.T if self.flat else self.workload.max_length

    def has(self, *names: str) -> bool:
        return any(name in self.adapted for name in names)


def layer_bytes(step: Step) -> int:
    """All that one layer keeps: norms, attention, MLP, adapters, and for full fine-tuning its weights in 16 bits."""
    if step.shape.family == "gpt2":
        per_token = _gpt2_per_token(step)
    elif step.method == "full":
        per_token = _full_per_token(step)
    else:
        per_token = _norms(step) + _attention(step) + _mlp(step) + _low_rank(step)
    return round(step.T * per_token + scores_bytes(step) + _mask(step) + cast_weights_bytes(step))


def unsaved_bytes(step: Step) -> int:
    """Of the first layer what lies before all that adapts: no gradient goes there, and nothing is kept for it."""
    shape = step.shape
    if step.method == "full" or shape.family == "gpt2" or step.has(*READ_FIRST, "embed_tokens", "input_layernorm"):
        return 0
    attention, norms = attention_bytes(step), _norms(step)
    if step.has("o_proj"):
        return attention + round(step.T * norms / shape.norms_per_layer)
    return attention + round(step.T * (norms - _kept_around_mlp(step) + _unsaved_of_mlp(step)))


def _kept_around_mlp(step: Step) -> float:
    """Of the norms where the MLP alone adapts: what its first layers read, and the norm behind it."""
    shape, s = step.shape, step.s
    if shape.experts:
        return 0
    read = shape.hidden * s if step.has(*MLP_FIRST) else 0
    behind = shape.norms_per_layer == 4 or shape.family == "olmo2"
    return read + (shape.hidden * (s if step.fused else 4) + 4 if behind and step.has(*MLP_FIRST, "down_proj") else 0)


def _unsaved_of_mlp(step: Step) -> float:
    """Where down_proj alone adapts, nothing is kept of the MLP but what it reads; fused, what that is made from."""
    alone = step.has("mlp.down_proj") and not step.has(*MLP_FIRST) and not step.shape.experts
    return 3 * step.s * step.shape.mlp if alone and not step.fused_mlp else 0


def _norms(step: Step) -> float:
    """Two (or four) RMSNorms. Fused: their input, h s; else a float32 copy, and the output where adapters read it."""
    shape, s = step.shape, step.s
    copy = s if step.fused else 4
    own: float = shape.norms_per_layer * (shape.hidden * copy + 4)
    # The outputs of further norms, which follow attention and MLP, are only added. Experts keep their tokens.
    readers = [step.has(*READ_FIRST), step.has(*MLP_FIRST) and not shape.experts]
    own += shape.hidden * s * (sum(readers) * step.keeps_read + bool(shape.experts))
    if shape.qk_norm:
        own += (shape.queries + shape.keys) * copy + 4 * (shape.heads + shape.kv_heads)
    return own


def _attention(step: Step) -> float:
    """Rotated q and k, v, the output and a float32 log-sum per head."""
    shape, s = step.shape, step.s
    if step.drops_scores:
        # In float32, keys and values repeated, whatever the dtype; and the output.
        return (3 * 4 + s) * shape.queries
    own = s * (2 * shape.queries + 2 * step.kept_keys) + 4 * shape.heads
    if _keeps_v(step):
        own += _kept_by_v(step)
    return own


def _keeps_v(step: Step) -> bool:
    """Whether attention keeps v as its projection gave it, and no repeated copy."""
    return step.own_attention or step.shape.heads == step.shape.kv_heads or (not step.masked and not step.shape.eager)


def _kept_by_v(step: Step) -> int:
    """Out of a fused projection v is a view, which keeps what q and k came out of too."""
    return step.s * (step.shape.queries + step.shape.keys) if step.shape.fused_qkv else 0


def attention_bytes(step: Step) -> int:
    """What a layer's attention holds: q, k, v, the output, its mask as numbers, its scores."""
    return round(step.T * _attention(step) + scores_bytes(step) + _mask(step))


def _mask(step: Step) -> int:
    """Without our attention each layer turns the mask into numbers and keeps them: s for each pair of positions."""
    if step.own_attention or step.scores:
        return 0
    return round(step.masked * step.T * step.row_tokens * step.s)


def scores_bytes(step: Step) -> int:
    """What a layer keeps of its scores; eager: the capped ones, weights in float32 and in the dtype of the step."""
    if not step.scores:
        return 0
    if not step.shape.eager:
        return DROPPED_SCORE_BYTES * step.P
    dropped = 2 * step.s if step.shape.attention_dropout else copied_weight_bytes(step)
    return (4 + dropped + (step.s if step.shape.softcapped else 0)) * step.P


def copied_weight_bytes(step: Step) -> int:
    """Softmax gives float32: of weights in 16 bits there is another copy."""
    return step.s if step.s == 2 else 0


def mlp_bytes(step: Step) -> float:
    """Of a token, by the way of training."""
    if step.shape.family == "gpt2":
        return step.s * step.shape.mlp * 5
    if step.method == "full" and not step.shape.experts:
        return step.s * step.shape.mlp * (3 if step.fused_mlp else 4)
    return _mlp(step)


def _mlp(step: Step) -> float:
    """gate and up; unless fused, also act(gate) and the product."""
    shape, s = step.shape, step.s
    if shape.experts:
        return _experts(step)
    # Fused, the product is made again; over a plain down_proj nothing needs it, since its weight is frozen.
    kept = 2 if step.fused_mlp else 4 if step.has("mlp.down_proj") else 3
    return s * shape.mlp * kept


def _experts(step: Step) -> float:
    """k copies of a token pass k experts: gate and up, act(gate), and the outputs that are weighed; router's scores.

    Where the experts train they compute in float32, and keep inputs and products too: 16 f + 8 h bytes for each of k
    as in dry runs of Mixtral and Qwen3-MoE.
    """
    shape, s, k = step.shape, step.s, step.shape.experts_per_token
    routed: float = s * (3 * k * shape.mlp + max(1, k - 1) * shape.hidden)
    if step.method == "full":
        routed = 8 * k * (2 * shape.mlp + shape.hidden)
    elif step.expert_adapters:
        routed = (1 - step.expert_share) * routed + _adapted_experts(step)
    shared = s * ((2 if step.fused_mlp else 4) * shape.shared_mlp + 2 * shape.hidden) if shape.shared_mlp else 0
    return routed + shared + 8 * shape.experts


def _adapted_experts(step: Step) -> float:
    """gate and up, what they are made from once, the outputs that are weighed, U of both; the order of the rows."""
    shape, s, k = step.shape, step.s, step.shape.experts_per_token
    # An adapter on the expert that sees every token keeps them too.
    tokens = shape.hidden if step.expert_ranks[0] and not step.has("gate_proj", "up_proj") else 0
    own = s * (2 * k * shape.mlp + tokens + max(1, k - 1) * shape.hidden) + 8 * k
    return step.expert_share * own + s * k * sum(step.expert_ranks)


def _low_rank(step: Step) -> float:
    """``U = x A^T``: R s; for DoRA also the outputs that nothing else keeps, or gives back: v, o and down."""
    shape, s = step.shape, step.s
    own = s * step.ranks
    if step.method not in DORA:
        return own
    normed_after = step.fused and (shape.norms_per_layer == 4 or shape.family == "olmo2")
    v_is_kept = _keeps_v(step)
    # Norms keep q and k, or rotary positions give them back, where attention keeps what they made of them, no copy.
    q_is_kept = step.fused and (shape.qk_norm or not step.scores)
    k_is_kept = q_is_kept and (shape.qk_norm or step.kept_keys == shape.keys)
    outputs = (
        ("q_proj", 0 if q_is_kept else shape.queries),
        ("k_proj", 0 if k_is_kept else shape.keys),
        ("v_proj", 0 if v_is_kept else shape.keys),
        ("qkv_proj", 0 if v_is_kept else shape.queries + 2 * shape.keys),
        ("o_proj", 0 if normed_after else shape.hidden),
        ("mlp.down_proj", 0 if normed_after else shape.hidden),
    )
    return own + s * sum(width for name, width in outputs if step.has(name))


def cast_weights_bytes(step: Step) -> float:
    """Autocast keeps a 16-bit copy of every float32 weight that it multiplied with; stacked experts it leaves alone."""
    shape = step.shape
    cast = step.layer_weights - 3 * shape.experts * shape.mlp * shape.hidden
    return cast * step.s if step.method == "full" and step.s == 2 else 0


def _full_per_token(step: Step) -> float:
    """Weights train, so that products keep their inputs: in float32 the outputs of two norms, under autocast a 16-bit
    copy of them for each layer that reads one."""
    shape, s = step.shape, step.s
    norms = shape.norms_per_layer * (8 * shape.hidden + 4)
    if shape.qk_norm:
        norms += 8 * (shape.queries + shape.keys) + 4 * (shape.heads + shape.kv_heads)
    inputs = (5 if s == 2 and not shape.fused_qkv else 2) * shape.hidden * s
    attention = _attention(step) if step.drops_scores else 2 * s * (shape.queries + step.kept_keys) + 4 * shape.heads
    return norms + inputs + attention + _kept_by_v(step) + mlp_bytes(step)


def _gpt2_per_token(step: Step) -> float:
    """LayerNorm's input and output, the fused q, k and v, five steps of gelu_new, masks of two dropouts (a byte each).

    Where a CPU drops attention weights, copies of q, k and v besides.
    """
    shape, s = step.shape, step.s
    h, f = shape.hidden, shape.mlp
    own = s * ((8 if step.own_attention else 9) * h + 5 * f + step.ranks) + 4 * shape.heads + 24
    if step.method == "full":
        own = 2 * (4 + s) * h + s * (5 * h + 5 * f) + 4 * shape.heads + 24
    elif step.method in DORA:
        own += s * 2 * h
    if shape.dropout:
        own += 2 * h
    if step.drops_scores:
        own += GPT2_CPU_COPIES * h
    return own


def outside_layers_bytes(step: Step) -> int:
    """The embedding's output, the last norm's input and output, the gradient that the loss keeps; the mask, a byte for
    each pair of positions; for full fine-tuning autocast's copy of the head, V h s."""
    wide = step.s if step.fused and step.method != "full" else 4
    head = step.shape.vocabulary * step.shape.hidden * step.s if step.method == "full" and step.s == 2 else 0
    return step.T * step.shape.hidden * (2 * step.s + 2 * wide) + masks_bytes(step) + head


def masks_bytes(step: Step) -> int:
    """A byte for each pair of positions; for eager attention two masks of numbers, in the dtype of the weights."""
    eager = 2 * (4 if step.method == "full" else step.s)
    if step.shape.eager:
        return step.T * step.row_tokens * eager
    return step.T * step.row_tokens if step.masked else 0


def loss_bytes(step: Step) -> int:
    """Logits of a chunk of scored tokens; through a head that trains, with their float32 copies: 16 bytes each."""
    V, scored = step.shape.vocabulary, step.workload.trained_tokens
    if not step.workload.fast:
        return plain_loss_bytes(step)
    if step.method == "full" or "lm_head" in step.adapted:
        rows = min(scored, max(SMALLEST_CHUNK, CHUNK_BYTES // (4 * V)))
        return 16 * V * rows
    rows = min(scored, max(SMALLEST_CHUNK, CHUNK_BYTES // (step.s * V)))
    return rows * V * step.s


def plain_loss_bytes(step: Step) -> int:
    """All logits, in float32 too, with the log-probabilities of the loss and of the entropy: s + 20 bytes each.

    accelerate gives an autocast model's back in float32, from which the scored ones are picked: 4 more. A softcap keeps
    what its tanh gives, s more. Offloading takes away what is kept: that, and the loss's log-probabilities.
    """
    each = step.s + 20 + (4 if step.method == "full" and step.s == 2 else 0)
    if step.workload.activation_offloading:
        each -= 4
    elif step.shape.capped_logits:
        each += step.s
    return each * step.shape.vocabulary * step.workload.trained_tokens


def head_bytes(step: Step) -> int:
    return step.shape.vocabulary * step.shape.hidden * step.s


def kept_twice_bytes(step: Step) -> int:
    """Of a layer made again, what lies in its checkpoint: on a card the input of the first norm, where that is ours."""
    return checkpoint_bytes(step) if step.on_card and step.fused and step.method != "full" else 0


def checkpoint_bytes(step: Step) -> int:
    """What checkpointing keeps of a layer: its input, T h s."""
    return step.T * step.shape.hidden * (4 if step.method == "full" else step.s)

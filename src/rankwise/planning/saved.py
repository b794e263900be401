"""Bytes that the forward pass saves for the backward pass: in one layer, and outside of the layers. Imports no torch.

This module and `planning.backward` change when an operator changes; the letters are those of `planning.step_facts`.
tests/planning/test_closed_form.py compares both with the dry run.
"""

from __future__ import annotations

from rankwise.config import DORA
from rankwise.planning.step_facts import StepFacts

# PyTorch's plain kernel saves three float32 numbers for each score: the weight, the weight after dropout, and the mask.
DROPPED_SCORE_BYTES = 12
# Number of copies of width h of q, k and v that GPT-2 saves on a CPU with attention dropout.
GPT2_CPU_COPIES = 5
# The modules that read a layer's first norm, and those that read the norm before the MLP.
READ_FIRST = ("q_proj", "k_proj", "v_proj", "qkv_proj")
MLP_FIRST = ("gate_proj", "up_proj", "gate_up_proj")


def layer_bytes(step: StepFacts) -> int:
    """All that one layer saves: norms, attention, MLP, adapters, and 16-bit copies of trained weights."""
    if step.shape.family == "gpt2":
        per_token = _gpt2_per_token(step)
    elif step.is_full:
        per_token = _full_per_token(step)
    else:
        per_token = _norms(step) + _attention(step) + _mlp(step) + _low_rank(step)
    return round(step.T * per_token + scores_bytes(step) + _mask(step) + cast_weights_bytes(step))


def unsaved_bytes(step: StepFacts) -> int:
    """What the first layer does not save, since no gradient flows to operations before the first adapter."""
    shape = step.shape
    if step.is_full or shape.family == "gpt2" or step.has(*READ_FIRST, "embed_tokens", "input_layernorm"):
        return 0
    attention, norms = attention_bytes(step), _norms(step)
    if step.has("o_proj"):
        return attention + round(step.T * norms / shape.norms_per_layer)
    return attention + round(step.T * (norms - _kept_around_mlp(step) + _unsaved_of_mlp(step)))


def _kept_around_mlp(step: StepFacts) -> float:
    """The norms' part where only the MLP is adapted: the input of its first layers, and the norm after the MLP."""
    shape, s = step.shape, step.s
    if shape.experts:
        return 0
    read = shape.hidden * s if step.has(*MLP_FIRST) else 0
    behind = step.norms_after and step.has(*MLP_FIRST, "down_proj")
    return read + (shape.hidden * (s if step.fused else 4) + 4 if behind else 0)


def _unsaved_of_mlp(step: StepFacts) -> float:
    """What the MLP does not save where only down_proj is adapted: all but down_proj's input, or its fused inputs."""
    alone = step.has("mlp.down_proj") and not step.has(*MLP_FIRST) and not step.shape.experts
    return 3 * step.s * step.shape.mlp if alone and not step.fused_mlp else 0


def _norms(step: StepFacts) -> float:
    """Two or four RMSNorms. A fused norm keeps its input, h s; PyTorch's keeps a float32 copy.

    Where adapters do not share the norm's input, its output is saved for them. Outputs of norms after attention and MLP
    are only added, and not saved. Experts save their input tokens.
    """
    shape, s = step.shape, step.s
    copy = s if step.fused else 4
    own: float = shape.norms_per_layer * (shape.hidden * copy + 4)
    readers = [step.has(*READ_FIRST), step.has(*MLP_FIRST) and not shape.experts]
    own += shape.hidden * s * (sum(readers) * step.keeps_read + bool(shape.experts))
    if shape.qk_norms:
        own += (shape.queries + shape.keys) * copy + 4 * shape.qk_norms
    return own


def _attention(step: StepFacts) -> float:
    """Rotated q and k, v, the output, and a float32 log-sum for each head."""
    shape, s = step.shape, step.s
    if step.drops_scores:
        # q, k and v in float32 whatever the dtype, keys and values repeated; and the output.
        return (3 * 4 + s) * shape.queries
    own = s * (2 * shape.queries + 2 * step.kept_keys) + 4 * shape.heads
    return own + (_kept_by_v(step) if step.keeps_v else 0)


def _kept_by_v(step: StepFacts) -> int:
    """The bytes that v keeps alive: with a fused QKV projection, v is a view of the projection's whole output."""
    return step.s * (step.shape.queries + step.shape.keys) if step.shape.fused_qkv else 0


def attention_bytes(step: StepFacts) -> int:
    """What a layer's attention holds: q, k, v, the output, its additive mask, its scores."""
    return round(step.T * _attention(step) + scores_bytes(step) + _mask(step))


def _mask(step: StepFacts) -> int:
    """PyTorch's attention makes an additive mask in each layer and saves it: s for each pair of positions."""
    if step.own_attention or step.scores:
        return 0
    return round(step.masked * step.T * step.row_tokens * step.s)


def scores_bytes(step: StepFacts) -> int:
    """What a layer keeps of its scores. Eager attention keeps capped scores, and weights in float32 and in the dtype of
    the step."""
    if not step.scores:
        return 0
    if not step.shape.eager:
        return DROPPED_SCORE_BYTES * step.P
    dropped = 2 * step.s if step.shape.attention_dropout else copied_weight_bytes(step)
    return (4 + dropped + (step.s if step.shape.softcapped else 0)) * step.P


def copied_weight_bytes(step: StepFacts) -> int:
    """Softmax gives float32, so a step in 16 bits also keeps a 16-bit copy of the attention weights."""
    return step.s if step.s == 2 else 0


def mlp_bytes(step: StepFacts) -> float:
    """The bytes that the MLP keeps for a token, for any method."""
    if step.shape.family == "gpt2":
        return step.s * step.shape.mlp * 5
    if step.is_full and not step.shape.experts:
        return step.s * step.shape.mlp * (3 if step.fused_mlp else 4)
    return _mlp(step)


def _mlp(step: StepFacts) -> float:
    """gate and up; where the MLP is not fused, also act(gate) and the product.

    A fused MLP computes the product again. Over a frozen down_proj without an adapter nothing needs the product.
    """
    shape, s = step.shape, step.s
    if shape.experts:
        return _experts(step)
    kept = 2 if step.fused_mlp else 4 if step.has("mlp.down_proj") else 3
    return s * shape.mlp * kept


def _experts(step: StepFacts) -> float:
    """Each token is copied to k experts. Saved are gate and up, act(gate), the outputs before they are weighted, and
    the router's scores.

    Fully trained experts compute in float32 and save inputs and products too: 16 f + 8 h bytes for each of the k, as in
    dry runs of Mixtral and Qwen3-MoE.
    """
    shape, s, k = step.shape, step.s, step.shape.experts_per_token
    routed: float = s * (3 * k * shape.mlp + max(1, k - 1) * shape.hidden)
    if step.is_full:
        routed = 8 * k * (2 * shape.mlp + shape.hidden)
    elif step.expert_adapters:
        routed = (1 - step.expert_share) * routed + _adapted_experts(step)
    shared = s * ((2 if step.fused_mlp else 4) * shape.shared_mlp + 2 * shape.hidden) if shape.shared_mlp else 0
    return routed + shared + 8 * shape.experts


def _adapted_experts(step: StepFacts) -> float:
    """gate and up, the tokens once, the outputs before weighting, U of both products, and the order of the rows.

    An adapter on the shared expert, which sees every token, saves the tokens itself.
    """
    shape, s, k = step.shape, step.s, step.shape.experts_per_token
    tokens = shape.hidden if step.expert_ranks[0] and not step.has("gate_proj", "up_proj") else 0
    own = s * (2 * k * shape.mlp + tokens + max(1, k - 1) * shape.hidden) + 8 * k
    return step.expert_share * own + s * k * sum(step.expert_ranks)


def _low_rank(step: StepFacts) -> float:
    """``U = x A^T``: R s. DoRA also saves those outputs that no other operation saves or restores (`ops.handback`).

    Norms save q and k, or rotary positions restore them, where attention saves what was computed from them in place.
    """
    shape, s = step.shape, step.s
    own = s * step.ranks
    if step.method not in DORA:
        return own
    after = 0 if step.fused and step.norms_after else shape.hidden
    q_is_kept = step.fused and (shape.qk_norms or not step.scores)
    k_is_kept = q_is_kept and (shape.qk_norms or step.kept_keys == shape.keys)
    outputs = (
        ("q_proj", 0 if q_is_kept else shape.queries),
        ("k_proj", 0 if k_is_kept else shape.keys),
        ("v_proj", 0 if step.keeps_v else shape.keys),
        ("qkv_proj", 0 if step.keeps_v else shape.queries + 2 * shape.keys),
        ("o_proj", after),
        ("mlp.down_proj", after),
    )
    return own + s * sum(width for name, width in outputs if step.has(name))


def cast_weights_bytes(step: StepFacts) -> float:
    """Autocast keeps a 16-bit copy of every float32 weight in a product, but not of stacked experts."""
    shape = step.shape
    cast = step.layer_weights - 3 * shape.experts * shape.mlp * shape.hidden
    return cast * step.s if step.autocasts else 0


def _full_per_token(step: StepFacts) -> float:
    """Weights are trained, so products save their inputs: the outputs of two norms in float32; under autocast a 16-bit
    copy of them for each layer that reads one."""
    shape, s = step.shape, step.s
    norms = shape.norms_per_layer * (8 * shape.hidden + 4)
    if shape.qk_norms:
        norms += 8 * (shape.queries + shape.keys) + 4 * shape.qk_norms
    inputs = (5 if s == 2 and not shape.fused_qkv else 2) * shape.hidden * s
    attention = _attention(step) if step.drops_scores else 2 * s * (shape.queries + step.kept_keys) + 4 * shape.heads
    return norms + inputs + attention + _kept_by_v(step) + mlp_bytes(step)


def _gpt2_per_token(step: StepFacts) -> float:
    """LayerNorm's input and output, the fused q, k and v, five steps of gelu_new, and the masks of two dropouts, a byte
    each. A CPU that drops attention weights keeps copies of q, k and v besides."""
    shape, s = step.shape, step.s
    h, f = shape.hidden, shape.mlp
    own = s * ((8 if step.own_attention else 9) * h + 5 * f + step.ranks) + 4 * shape.heads
    if step.is_full:
        own = 2 * (4 + s) * h + s * (5 * h + 5 * f) + 4 * shape.heads
    elif step.method in DORA:
        own += s * 2 * h
    if shape.dropout:
        own += 2 * h
    if step.drops_scores:
        own += GPT2_CPU_COPIES * h
    return own


def outside_layers_bytes(step: StepFacts) -> int:
    """The embedding's output, the last norm's input and output, the gradient that the loss keeps, the masks; for full
    fine-tuning autocast's copy of the head, V h s."""
    wide = step.s if step.fused and not step.is_full else 4
    head = step.shape.vocabulary * step.shape.hidden * step.s if step.autocasts else 0
    return step.T * step.shape.hidden * (2 * step.s + 2 * wide) + masks_bytes(step) + head


def masks_bytes(step: StepFacts) -> int:
    """A byte for each pair of positions. Eager attention has two additive masks, in the dtype of the weights."""
    eager = 2 * (4 if step.is_full else step.s)
    if step.shape.eager:
        return step.T * step.row_tokens * eager
    return step.T * step.row_tokens if step.masked else 0


def kept_twice_bytes(step: StepFacts) -> int:
    """What a recomputed layer shares with its checkpoint: on a GPU the input of the first norm, if it is fused."""
    return step.stream_bytes if step.on_card and step.fused and not step.is_full else 0

"""Bytes that a pass holds for a moment besides what was saved: gradients on their way through one layer, a head's
gradient, scores, experts.

The symbols are those of ``planning.activations``. Imports no torch.
"""

from __future__ import annotations

from rankwise.config import DORA
from rankwise.planning.activations import Step, copied_weight_bytes, head_bytes, mlp_bytes


def scores_backward_bytes(step: Step) -> tuple[int, int]:
    """On the way through one layer's scores: (gradients that it holds, what of the layer has gone by then).

    Eager holds two gradients in float32, and has let the weights' copy go; torch's plain kernel holds one, and those of
    two of q, k and v. The MLP and the norms after attention are done.
    """
    shape = step.shape
    norms = (shape.norms_per_layer - 1) * shape.hidden * (4 + step.s)
    gone = round(step.T * (norms + mlp_bytes(step)))
    stream = step.T * shape.hidden * (4 if step.method == "full" else step.s)
    if shape.eager:
        return 8 * step.P + stream, gone + copied_weight_bytes(step) * step.P
    return 4 * step.P + 8 * step.T * shape.queries + stream, gone


def offloaded_scores_bytes(step: Step) -> int:
    """The same where the weights come back alone: they and two gradients in float32, beside three of the stream."""
    return 12 * step.P + 3 * step.T * step.shape.hidden * (4 if step.method == "full" else step.s)


def head_gradient_bytes(step: Step) -> int:
    """A head that trains begins the backward pass with its gradient, V h: that of a chunk, and the sum over chunks
    before and after it. Where full fine-tuning computes in 16 bits, the float32 copy of the sum counts."""
    if step.method == "full" and step.s == 2:
        return kept_head_gradient_bytes(step)
    return 3 * head_bytes(step) if step.method == "full" or step.whole_head else 0


def kept_head_gradient_bytes(step: Step) -> int:
    """Of a head that trains, from the beginning of the backward pass on: V h, of full fine-tuning in float32."""
    if step.method == "full":
        return 4 * step.shape.vocabulary * step.shape.hidden
    return head_bytes(step) if step.whole_head else 0


def backward_bytes(step: Step) -> int:
    """On the way through one layer: gradients of the MLP's parts and of the residual stream, beyond what goes by then.

    Full fine-tuning has them in float32. Of a layer that checkpointing made again more has gone.
    """
    shape, s = step.shape, 4 if step.method == "full" else step.s
    h, f, again = shape.hidden, shape.mlp, step.workload.gradient_checkpointing
    if shape.family == "gpt2":
        kept = 3 if not again else 1 if step.method == "full" else 2
        return step.T * s * (kept * f + 2 * h)
    if step.expert_adapters:
        # The gate's values and gradients: five times its width; gradients of the k outputs and of the stream.
        k = shape.experts_per_token
        return step.T * s * (5 * k * f + (k + 1) * h)
    if step.four_bit_experts:
        return weighing_bytes(step)
    if shape.experts:
        k = shape.experts_per_token
        if step.method == "full":
            # Gradients of gate and up, or before them three times that of the k outputs of each token.
            return step.T * s * max(2 * k * f + 3 * h, 3 * k * h + 2 * h)
        return step.T * s * (k * (2 * f + 2 * h) if again else 2 * k * f + 3 * h)
    if again and step.method == "full":
        return step.T * step.s * (2 * f + h)
    if step.method != "full" and not step.has("mlp.down_proj"):
        return step.T * s * (3 * f + h)
    less = (step.on_card and step.method == "full") or (not step.fused_mlp and (step.on_card or again))
    # Where the product is made again, dropout makes it once more.
    dropped = f if step.fused_mlp and step.method != "full" and step.workload.lora_dropout else 0
    return step.T * s * (2 * f + 2 * h if less else 4 * f + h + dropped)


def offloaded_backward_bytes(step: Step) -> int:
    """The same where what was saved comes back a tensor at a time, for the operation that asks for it.

    Two tensors of the MLP beside three gradients; with DoRA's scaled ones, or the product made again, six in all;
    through GPT-2's gelu seven. Of stacked experts the transposed weight comes too, since it is no parameter itself.
    """
    shape, s = step.shape, step.s
    h, f = shape.hidden, shape.mlp
    if step.expert_adapters:
        k = shape.experts_per_token
        return step.T * s * (8 * k * f + (k + 2) * h)
    if step.four_bit_experts:
        return weighing_bytes(step) + step.T * shape.experts_per_token * h * s
    if shape.experts:
        k = shape.experts_per_token
        with_weight = 2 * shape.experts * f * h + step.T * (k * (2 * f + h) + h)
        return s * max(with_weight, step.T * (5 * k * f + h))
    dora = step.method in DORA
    kept = 7 if shape.family == "gpt2" else 6 if dora or step.fused_mlp else 5
    return step.T * s * (kept * f + (3 if dora else 1) * h)


def weighing_bytes(step: Step) -> int:
    """Where the backward pass enters 4-bit experts: gradients of a token's k weighed outputs, twice in the dtype of
    their weights and once in that of the outputs, and of their sum. What follows is an expert's share."""
    s, wide = step.s, step.routing_bytes
    copies = 2 * wide + (s if wide != s else 0)
    return step.T * step.shape.hidden * (step.shape.experts_per_token * copies + s + wide)


def experts_forward_bytes(step: Step) -> tuple[int, int]:
    """Inside a layer's experts, on the way forward: (what it holds for a moment, what it has not saved yet).

    The k copies of each token, their products and the weighed outputs: k (2 f + 3 h), before gate, up and act(gate) are
    kept. One expert after the other keeps those at once: then there are the outputs, side by side, in order or weighed.
    """
    shape, s, k = step.shape, step.s, step.shape.experts_per_token
    if step.expert_adapters:
        # act(gate) and the product before there are outputs, or the outputs twice, or weighed.
        gated = 2 * k * shape.mlp - (k - 1) * shape.hidden
        return step.T * max(s * gated, max(s, step.routing_bytes) * k * shape.hidden), 0
    if step.four_bit_experts:
        held = step.T * k * shape.hidden * (s + max(s, step.routing_bytes))
        return held, step.T * s * max(1, k - 1) * shape.hidden
    per_token = step.s * k
    return step.T * per_token * (2 * shape.mlp + 3 * shape.hidden), step.T * per_token * 3 * shape.mlp

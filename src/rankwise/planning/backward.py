"""Bytes of temporary tensors in a pass, besides what was saved. Imports no torch.

The letters are those of `planning.step_facts`.
"""

from __future__ import annotations

from rankwise.config import DORA
from rankwise.planning.saved import copied_weight_bytes, mlp_bytes
from rankwise.planning.step_facts import StepFacts


def scores_backward_bytes(step: StepFacts) -> tuple[int, int]:
    """The backward pass of one layer's scores: (gradients that are held, saved tensors that are freed by then).

    =====================  ==========================================  ===================================
    attention              live gradients                              freed
    =====================  ==========================================  ===================================
    eager                  two of P in float32                         MLP, norms behind, 16-bit weights
    PyTorch's plain kernel one of P in float32, two of q, k and v      MLP, norms behind
    =====================  ==========================================  ===================================
    """
    shape = step.shape
    norms = (shape.norms_per_layer - 1) * shape.hidden * (4 + step.s)
    gone = round(step.T * (norms + mlp_bytes(step)))
    if shape.eager:
        return 8 * step.P + step.stream_bytes, gone + copied_weight_bytes(step) * step.P
    return 4 * step.P + 8 * step.T * shape.queries + step.stream_bytes, gone


def offloaded_scores_bytes(step: StepFacts) -> int:
    """Gradients in the scores' backward pass with offloading, where only the attention weights are fetched from the
    host: the weights and two gradients in float32, beside three gradients of the stream.
    """
    return 12 * step.P + 3 * step.stream_bytes


def backward_bytes(step: StepFacts) -> int:
    """The gradients in the backward pass of one layer, of the MLP's parts and of the stream, less what is freed by
    then.

    Full fine-tuning has them in float32. With checkpointing, more of the layer is freed.
    """
    shape, s = step.shape, 4 if step.is_full else step.s
    h, f, again = shape.hidden, shape.mlp, step.workload.gradient_checkpointing
    if shape.family == "gpt2":
        kept = 3 if not again else 1 if step.is_full else 2
        return step.T * s * (kept * f + 2 * h)
    if shape.experts:
        return _through_experts(step)
    if again and step.is_full:
        return step.T * step.s * (2 * f + h)
    if not step.is_full and not step.has("mlp.down_proj"):
        return step.T * s * (3 * f + h)
    less = (step.on_card and step.is_full) or (not step.fused_mlp and (step.on_card or again))
    # With dropout, the product that a fused MLP recomputes exists twice.
    dropped = f if step.fused_mlp and not step.is_full and step.workload.lora_dropout else 0
    return step.T * s * (2 * f + 2 * h if less else 4 * f + h + dropped)


def _through_experts(step: StepFacts) -> int:
    """The k experts of each token. In adapted experts, values and gradients of the gate take five times its width."""
    shape, s, again = step.shape, 4 if step.is_full else step.s, step.workload.gradient_checkpointing
    h, f, k = shape.hidden, shape.mlp, shape.experts_per_token
    if step.expert_adapters:
        return step.T * s * (5 * k * f + (k + 1) * h)
    if step.four_bit_experts:
        return weighing_bytes(step)
    if step.is_full:
        # Gradients of gate and up; or, before them, three times the gradient of a token's k outputs.
        return step.T * s * max(2 * k * f + 3 * h, 3 * k * h + 2 * h)
    return step.T * s * (k * (2 * f + 2 * h) if again else 2 * k * f + 3 * h)


def offloaded_backward_bytes(step: StepFacts) -> int:
    """As `backward_bytes`, with offloading: saved tensors are fetched from the host, one operation at a time.

    Two tensors of the MLP and three gradients are held; six in all with DoRA's scaled gradients or where the product is
    computed again; seven through GPT-2's gelu. The transposed weight of stacked experts comes back too, since it is not
    a parameter. Adapted experts: 8 k f + (2 k + 2.5) h numbers a token, as in dry runs of Mixtral.
    """
    shape, s = step.shape, step.s
    h, f, k = shape.hidden, shape.mlp, shape.experts_per_token
    if step.expert_adapters:
        return round(step.T * s * (8 * k * f + (2 * k + 2.5) * h))
    if step.four_bit_experts:
        return weighing_bytes(step) + step.T * k * h * s
    if shape.experts:
        with_weight = 2 * shape.experts * f * h + step.T * (k * (2 * f + h) + h)
        return s * max(with_weight, step.T * (5 * k * f + h))
    dora = step.method in DORA
    kept = 7 if shape.family == "gpt2" else 6 if dora or step.fused_mlp else 5
    return step.T * s * (kept * f + (3 if dora else 1) * h)


def brought_back_bytes(step: StepFacts) -> int:
    """The MLP's tensors that an operation has fetched from the host: one; for stacked experts gate and up of the k
    experts of a token, and with adapters their product."""
    if step.four_bit_experts:
        return 0
    of_experts = (3 if step.expert_adapters else 2) * step.shape.experts_per_token
    return step.T * step.s * step.shape.mlp * (of_experts if step.shape.experts else 1)


def weighing_bytes(step: StepFacts) -> int:
    """Where the backward pass enters 4-bit experts: gradients of a token's k weighted outputs, two in the dtype of the
    experts' weights and one in that of the outputs, and the gradient of their sum. Later operations hold one expert's.
    """
    s, wide = step.s, step.routing_bytes
    copies = 2 * wide + (s if wide != s else 0)
    return step.T * step.shape.hidden * (step.shape.experts_per_token * copies + s + wide)


def experts_forward_bytes(step: StepFacts) -> tuple[int, int]:
    """In a layer's experts, in the forward pass: (bytes of temporary tensors, bytes not saved yet).

    =============================  ============================================================  ==================
    experts                        held                                                          not saved yet
    =============================  ============================================================  ==================
    that adapt                     act(gate) and the product; or the outputs twice, or weighed   nothing
    in 4 bits, one after another   the outputs side by side, and in order or weighed             outputs
    others                         k copies of each token, products, weighed outputs             gate, up, act(gate)
    =============================  ============================================================  ==================
    """
    shape, s, k = step.shape, step.s, step.shape.experts_per_token
    if step.expert_adapters:
        gated = 2 * k * shape.mlp - (k - 1) * shape.hidden
        return step.T * max(s * gated, max(s, step.routing_bytes) * k * shape.hidden), 0
    if step.four_bit_experts:
        held = step.T * k * shape.hidden * (s + max(s, step.routing_bytes))
        return held, step.T * s * max(1, k - 1) * shape.hidden
    per_token = step.s * k
    return step.T * per_token * (2 * shape.mlp + 3 * shape.hidden), step.T * per_token * 3 * shape.mlp

"""Bytes of the output head: logits in the forward pass, its gradient in the backward pass. Imports no torch.

The letters are those of `planning.step_facts`.
"""

from __future__ import annotations

from rankwise.constants import chunk_rows
from rankwise.planning.step_facts import StepFacts

# Rows and columns of a tile of logits of trl's head (trl.kernels.chunked_logprob).
TRL_TILE = (4096, 32768)


def loss_bytes(step: StepFacts) -> int:
    """Logits of a chunk of scored tokens. If the head is trained, they have float32 copies: 16 bytes each in all."""
    V, scored = step.shape.vocabulary, step.workload.trained_tokens
    if step.trl_head:
        return _tile_bytes(step)
    if not step.workload.fast:
        return _plain_loss_bytes(step)
    trains = step.is_full or "lm_head" in step.adapted
    rows = min(scored, chunk_rows(V, 4 if trains else step.s, on_card=step.on_card and not trains))
    return rows * V * (16 if trains else step.s)


def _plain_loss_bytes(step: StepFacts) -> int:
    """All logits, their float32 copy, and the log-probabilities of the loss and of the entropy: s + 20 bytes each.

    accelerate converts an autocast model's logits to float32, from which the scored ones are selected: 4 bytes more. A
    softcap saves the output of its tanh: s more. Offloading moves away what is saved: that output, and the loss's
    log-probabilities.
    """
    each = step.s + 20 + (4 if step.autocasts else 0)
    if step.workload.activation_offloading:
        each -= 4
    elif step.shape.capped_logits:
        each += step.s
    return each * step.shape.vocabulary * step.workload.trained_tokens


def _tile_bytes(step: StepFacts) -> int:
    """A tile of trl's head, which full fine-tuning computes from 16-bit copies."""
    rows, columns = min(step.workload.trained_tokens, TRL_TILE[0]), TRL_TILE[1]
    copies = (rows + min(columns, step.shape.vocabulary)) * step.shape.hidden if step.autocasts else 0
    return step.s * (rows * columns + copies)


def weight_bytes(step: StepFacts) -> int:
    """The head's weight: V h s."""
    return step.shape.vocabulary * step.shape.hidden * step.s


def first_gradient_bytes(step: StepFacts) -> int:
    """What a trained head holds when the backward pass begins: the gradient of a chunk, and the sum over chunks before
    and after it is added. In full fine-tuning in 16 bits the sum's float32 copy is the largest. trl's head sums the
    hidden states' gradient in float32, beside a tile."""
    if step.trl_head:
        hidden = step.workload.trained_tokens * step.shape.hidden * 4
        return _tile_bytes(step) + hidden + (4 * step.shape.vocabulary * step.shape.hidden if step.is_full else 0)
    if step.autocasts:
        return gradient_bytes(step)
    return 3 * weight_bytes(step) if step.is_full or step.whole_head else 0


def gradient_bytes(step: StepFacts) -> int:
    """The gradient of a trained head, which is held from the beginning of the backward pass: V h."""
    if step.is_full:
        return embedding_gradient_bytes(step)
    return weight_bytes(step) if step.whole_head else 0


def embedding_gradient_bytes(step: StepFacts) -> int:
    """The last gradient of full fine-tuning, as large as the head's. If embedding and head are tied, both gradients
    exist at that moment, beside their sum."""
    return 4 * step.shape.vocabulary * step.shape.hidden if step.is_full else 0

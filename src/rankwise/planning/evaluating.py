"""Bytes that an evaluation's forward pass holds at its three peaks, and generation at its end. Nothing is saved for a
backward pass.

The letters are those of `planning.step_facts`. Imports no torch.
"""

from __future__ import annotations

import dataclasses

from rankwise.constants import CACHE_BYTES
from rankwise.planning import backward, head, saved
from rankwise.planning.step_facts import StepFacts

# Number of boolean masks, a byte for each pair of positions, that exist while transformers combines them into one.
MASKS_AT_ONCE = 3


def forward_bytes(step: StepFacts, unpacked: int) -> dict[str, dict[str, int]]:
    """{phase: {term: bytes}} while masks are made, in a layer, and in the loss of a chunk.

    ``unpacked``: bytes of the 4-bit weight that is dequantized for its product.
    """
    stream, masks, cast = step.stream_bytes, saved.masks_bytes(step), cast_bytes(step)
    made = max(masks, MASKS_AT_ONCE * step.T * step.row_tokens if step.masked else 0)
    return {
        "forward at the masks": {"transient": stream + made},
        "forward": {"transient": stream + masks + cast + layer_bytes(step) + unpacked},
        "forward at the loss": {"transient": 2 * stream + masks + cast, "logits": head.loss_bytes(step)},
    }


def written_bytes(step: StepFacts, unpacked: int) -> dict[str, dict[str, int]]:
    """{phase: {term: bytes}} of generation: while prompts are processed, and when answers have their full length.

    Answers hold keys and values of all layers, and the float32 logits from which one token of each is sampled.
    """
    shape, work = step.shape, step.workload
    tokens = work.max_length * 2 * step.s
    rows = work.written
    if not step.on_card:
        # Batches of answers are sized by the bytes of the weights.
        row = work.max_length * 2 * (4 if step.is_full else step.s) * shape.keys * shape.layers
        rows = min(rows, max(1, CACHE_BYTES // row))
    prompts = min(work.prompts, rows)
    asking = dataclasses.replace(work, batch_size=prompts, max_length=max(2, work.prompt_tokens), sides=1)
    asked = dataclasses.replace(step, workload=asking)
    # The pass over prompts has no loss.
    at_prompts = max(terms["transient"] for terms in forward_bytes(asked, unpacked).values())
    kept_of_prompts = asked.T * 2 * step.s * shape.keys * shape.layers
    return {
        "generation of prompts": {"transient": at_prompts + kept_of_prompts},
        "generation": {
            # Appending to the keys, or values, of a layer copies them.
            "transient": rows * tokens * shape.keys * (2 * shape.layers + 1) // 2 + unpacked,
            "logits": rows * shape.vocabulary * (step.s + 3 * 4),
        },
    }


def layer_bytes(step: StepFacts) -> int:
    """A layer's norm and the larger of attention and MLP. MLP: gate, up, act(gate) and the product; for GPT-2 five
    steps of its gelu; for experts what they keep in training. Eager attention copies its scores for the softmax."""
    shape, s = step.shape, step.s
    attention = saved.attention_bytes(step) + (s * step.P if shape.eager else 0)
    if shape.experts:
        mlp = sum(backward.experts_forward_bytes(step))
    else:
        mlp = step.T * s * shape.mlp * (5 if shape.family == "gpt2" else 4)
    return step.stream_bytes + max(mlp, attention)


def cast_bytes(step: StepFacts) -> int:
    """Autocast's 16-bit copies of full fine-tuning's weights, of all layers and the head, until the pass ends."""
    if not step.autocasts:
        return 0
    return round(step.shape.layers * saved.cast_weights_bytes(step)) + head.weight_bytes(step)

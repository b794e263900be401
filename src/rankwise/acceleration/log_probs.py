"""Log-probabilities of the tokens of given answers, for training on preferences and rewards.

An accelerated model computes them in chunks, without the (tokens x vocabulary) logits; any other one from whole logits.

Legend: B rows, L positions of the longest, P scored positions.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from rankwise.acceleration import attention
from rankwise.acceleration.attention import close, has_window
from rankwise.acceleration.layouts import Answered, Layout, answered
from rankwise.acceleration.loss import LossOptions, fused_head
from rankwise.acceleration.parts import probe
from rankwise.compat.torch import is_fake
from rankwise.compat.transformers import attention_of

# Largest root mean square over tokens of an error relative to 1 + |log p|. In bfloat16 SmolLM2 rounds the unlikely
# tokens of the test by 0.1; a mask that is ignored gives 1.
FLOAT32_ERROR, LOW_PRECISION_ERROR = 1e-3, 0.25


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """The scores of each token except the first, (B, L - 1); 0 outside of answers."""

    log_probs: Tensor
    # The mean entropy over all scored tokens, repeated at each of them; without gradient.
    entropy: Tensor | None
    aux_loss: Tensor | None


def token_scores(
    model: PreTrainedModel,
    answers: Answered,
    *,
    in_chunks: bool,
    temperature: float = 1.0,
    want_stats: bool = False,
    **more: Any,
) -> TokenScores:
    """Scores of logits divided by the temperature; ``want_stats`` adds the entropy.

    ``in_chunks``: by the fused loss of an accelerated model. ``more`` are further inputs of the model.
    """
    inputs = attention.with_mask({**answers.inputs, **more, "use_cache": False})
    if in_chunks:
        options = LossOptions(
            want_stats=want_stats,
            want_log_probs=True,
            temperature=temperature,
            scored=answers.places,
            targets=answers.targets,
        )
        outputs = model(**inputs, loss_options=options)
        (sums,) = options.found
        assert sums.log_probs is not None, "asked for"
        log_probs, entropy = sums.log_probs, sums.entropy
    else:
        outputs = model(**inputs)
        log_p = F.log_softmax(outputs.logits.flatten(0, 1).index_select(0, answers.places).float() / temperature, -1)
        log_probs = log_p.gather(1, answers.targets[:, None]).squeeze(1)
        entropy = -(log_p.exp() * log_p).detach().sum() if want_stats else None

    def spread(values: Tensor) -> Tensor:
        cells = answers.cells.to(values.device)
        return values.new_zeros(answers.mask.numel()).index_copy(0, cells, values).view(answers.mask.shape)[:, :-1]

    mean = None
    if want_stats:
        assert entropy is not None, "asked for"
        count = len(answers.cells)
        mean = spread((entropy / max(1, count)).to(log_probs.dtype).expand(count))
    return TokenScores(spread(log_probs), mean, getattr(outputs, "aux_loss", None))


def config_obstacle_to_sharing(text: PreTrainedConfig) -> str | None:
    """What in a model's configuration keeps common beginnings in each row, or None."""
    if has_window(text):
        return "some layers have a window"
    if hasattr(text, "output_router_logits"):
        return "the balancing loss of its experts counts the tokens of every row"
    return None


def sharing_obstacle(model: PreTrainedModel) -> str | None:
    """Why common beginnings of rows cannot be laid once, or None; tested where no layer has a window."""
    if fused_head(model) is None:
        return "the loss in use is computed from rows with their labels"
    text = model.config.get_text_config()
    if attention_of(model.config) != attention.NAME or next(model.parameters()).device.type != "cpu":
        return "the attention in use takes no ranges of keys"
    if why_not := config_obstacle_to_sharing(text):
        return why_not
    # Without values there is nothing to compare.
    if is_fake(next(model.parameters())):
        return None
    prompt, last = [1, 2, 3, 4] * 2, [*range(5, 13)]
    tried: list[tuple[Layout, list[int]]] = [("padded", [4, 5]), ("shared", [4, 5]), ("shared", [9, 8])]

    def scores() -> list[Tensor]:
        laid = (answered([(prompt, first), (prompt, last)], 0, layout) for layout, first in tried)
        return [token_scores(model, rows, in_chunks=True).log_probs for rows in laid]

    found, why_not = probe(model, scores)
    if found is None:
        return f"the model could not be run with ranges of keys ({why_not})"
    apart, shared, beside_another = found
    if not close(shared[1], beside_another[1]):
        return "a row sees the one before it"
    error = ((shared - apart) / (1 + apart.abs()))[apart != 0].square().mean().sqrt()
    is_near = error <= (FLOAT32_ERROR if model.dtype == torch.float32 else LOW_PRECISION_ERROR)
    return None if is_near else "they get other log-probabilities than separately"

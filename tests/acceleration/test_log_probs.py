"""Log-probabilities of tokens: in every layout and for every head those of the whole logits, and so their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from marks import at_some_level
from rankwise.acceleration import attention
from rankwise.acceleration.layouts import Answered, Layout, answered, padded
from rankwise.acceleration.log_probs import sharing_obstacle, token_scores
from rankwise.acceleration.optimize import optimize_for_training
from rankwise.adapters import adapter_parameters
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

LENGTHS, PROMPTS = (11, 17, 13, 12), (8, 11, 8, 11)


def pairs() -> list[tuple[list[int], list[int]]]:
    """Two pairs of unequal answers behind prompts of 8 and 11 tokens: rows 0 and 2, rows 1 and 3."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (4, max(LENGTHS)), generator=draw)
    for row in (0, 1):
        ids[row + 2, : PROMPTS[row]] = ids[row, : PROMPTS[row]]
        # The first token of the answers agrees in one pair, and is scored in each.
        ids[3, 11] = ids[1, 11]
    rows = [row[:length] for row, length in zip(ids.tolist(), LENGTHS)]
    return [(row[:prompt], row[prompt:]) for row, prompt in zip(rows, PROMPTS)]


def laid(layout: Layout) -> Answered:
    return answered(pairs(), 0, layout)


def adapted(model: Any = None, **options: Any) -> Any:
    """Moved away from its base, and fast; attention is ours in float32 too, by torch's products."""
    model = model or tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False, **options))
    model.train()
    attention.register()
    optimize_for_training(model)
    model.set_attn_implementation(attention.NAME)
    return model


def wanted(model: Any) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the mean entropy of scored tokens."""
    batch = padded([{"input_ids": [*prompt, *answer]} for prompt, answer in pairs()], {"input_ids": 0})
    logits = type(model).forward(model, **batch).logits
    log_p = torch.log_softmax(logits.float(), -1)[:, :-1]
    places = torch.arange(1, max(LENGTHS))
    scored = (places < torch.tensor(LENGTHS)[:, None]) & (places >= torch.tensor(PROMPTS)[:, None])
    chosen = log_p.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return chosen * scored, entropy[scored].mean().detach()


@at_some_level
@pytest.mark.parametrize("layout", ["padded", "flat", "shared"])
@pytest.mark.parametrize("head", ["plain", "adapted", "trained"])
def test_scores_and_gradients_are_those_of_the_logits(layout: Layout, head: str) -> None:
    options = {"plain": {}, "adapted": {"target_modules": ["q_proj", "lm_head"]}, "trained": {}}[head]
    model = adapted(**options, **({"modules_to_save": ["lm_head"]} if head == "trained" else {}))
    assert sharing_obstacle(model) is None
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0])
    parameters = list(adapter_parameters(model).values())
    log_probs, entropy = wanted(model)
    grads = torch.autograd.grad((log_probs.sum(1) * weights).sum(), parameters)
    found = token_scores(model, laid(layout), in_chunks=True, want_stats=True)
    assert torch.allclose(found.log_probs, log_probs, atol=2e-5)
    assert found.entropy is not None
    assert torch.allclose(found.entropy[log_probs != 0], entropy, atol=2e-5)
    for own, theirs in zip(torch.autograd.grad((found.log_probs.sum(1) * weights).sum(), parameters), grads):
        assert torch.allclose(own, theirs, atol=5e-5)


@pytest.mark.parametrize(
    ("make", "lora", "layout"),
    [
        (tiny_llama, None, "padded"),
        (tiny_gpt2, None, "padded"),
        (tiny_llama, {}, "flat"),
        (tiny_llama, {}, "padded"),
        (tiny_llama, {"modules_to_save": ["lm_head"]}, "flat"),
    ],
)
def test_scores_do_not_depend_on_padding(make: Any, lora: dict[str, Any] | None, layout: Layout) -> None:
    """Where positions are learned too; by a model that was made fast, also through a head that trains, and by one that
    was not."""
    model = make()
    if lora is not None:
        rw.add_adapter(model, rw.LoraConfig(r=2, **lora))
        optimize_for_training(model)
    torch.manual_seed(0)
    rows, expected = [], []
    for size, start in ((5, 2), (9, 4), (7, 6)):
        row = torch.randint(3, 97, (size,))
        rows.append((row[:start].tolist(), row[start:].tolist()))
        log_p = torch.log_softmax(model(row[None]).logits[0].float() / 0.7, -1)
        expected.append(log_p[start - 1 : -1].gather(1, row[start:, None]).squeeze(1))
    batch = answered(rows, 0, layout)
    found = token_scores(model, batch, in_chunks=lora is not None, temperature=0.7, want_stats=True)
    scored = batch.mask[:, 1:].bool()
    torch.testing.assert_close(found.log_probs[scored], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert (found.log_probs[~scored] == 0).all()


def test_a_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), []
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    token_scores(model, laid("shared"), in_chunks=True)
    assert seen == [sum(LENGTHS) - sum(PROMPTS[:2]) - 1]


def test_a_model_with_windows_shares_no_prompt() -> None:
    model = adapted()
    model.config.sliding_window = 4
    assert sharing_obstacle(model) == "some layers have a window"


def test_a_model_that_mixes_neighbours_otherwise_shares_no_prompt() -> None:
    """As convolutions and recurrences do, here by a hundredth."""
    model = adapted()
    layer = model.model.layers[0]
    layer.register_forward_hook(lambda module, given, hidden: hidden + 0.01 * hidden.roll(1, dims=1))
    assert sharing_obstacle(model) == "a row sees the one before it"


@pytest.mark.parametrize("layout", ["padded", "flat"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_balancing_loss_is_that_of_the_padded_rows(family: str, layout: Layout) -> None:
    """A prompt that two answers share counts twice, as in trl."""
    model = adapted(tiny_moe(family))
    assert "balancing loss" in str(sharing_obstacle(model))
    batch = laid("padded").inputs
    expected = type(model).forward(model, **batch, output_router_logits=True).aux_loss
    found = token_scores(model, laid(layout), in_chunks=True, output_router_logits=True)
    torch.testing.assert_close(found.aux_loss, expected)
    assert torch.allclose(found.log_probs, wanted(model)[0], atol=2e-5)

"""Log-probabilities of tokens: in every layout and for every head those of the whole logits, and so their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import rankwise as rw
from marks import at_some_level
from rankwise.acceleration import attention
from rankwise.acceleration.loss import Asked, Layout, accept_scores, asked_of, scores_of_logits
from rankwise.acceleration.optimize import optimize_for_training
from rankwise.adapters import adapter_parameters
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

LENGTHS, PROMPTS = (7, 11, 9, 6), (4, 5, 4, 5)


def pairs() -> dict[str, Tensor]:
    """Two pairs of unequal answers behind prompts of 4 and 5 tokens: rows 0 and 2, rows 1 and 3."""
    draw = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 97, (4, max(LENGTHS)), generator=draw)
    for row in (0, 1):
        ids[row + 2, : PROMPTS[row]] = ids[row, : PROMPTS[row]]
        # The first token of the answers agrees in one pair: the prompt ends before it all the same.
        ids[3, 5] = ids[1, 5]
    places = torch.arange(max(LENGTHS))
    mask = (places < torch.tensor(LENGTHS)[:, None]).long()
    answers = mask.bool() & (places >= torch.tensor(PROMPTS)[:, None])
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": (ids * mask).masked_fill(~answers, -100)}


def adapted(model: Any = None, **options: Any) -> Any:
    """Moved away from its base, and fast; attention is ours in float32 too, by torch's products."""
    model = model or tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False, **options))
    model.train()
    attention.register()
    optimize_for_training(model)
    model.set_attn_implementation(attention.NAME)
    return model


def wanted(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Log-probabilities, and the mean entropy of scored tokens."""
    logits = type(model).forward(model, batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    log_p = torch.log_softmax(logits.float(), -1)[:, :-1]
    labels = batch["labels"][:, 1:]
    scored = labels != -100
    chosen = log_p.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    return chosen * scored, entropy[scored].mean().detach()


@at_some_level
@pytest.mark.parametrize("layout", ["padded", "flat", "pairs"])
@pytest.mark.parametrize("head", ["plain", "adapted", "trained"])
def test_scores_and_gradients_are_those_of_the_logits(layout: Layout, head: str) -> None:
    options = {"plain": {}, "adapted": {"target_modules": ["q_proj", "lm_head"]}, "trained": {}}[head]
    model = adapted(**options, **({"modules_to_save": ["lm_head"]} if head == "trained" else {}))
    assert accept_scores(model, layout)
    assert asked_of(model).layout == layout
    batch, weights = pairs(), torch.tensor([1.0, -2.0, 0.5, 3.0])
    parameters = list(adapter_parameters(model).values())
    log_probs, entropy = wanted(model, batch)
    grads = torch.autograd.grad((log_probs.sum(1) * weights).sum(), parameters)
    found = model(**batch, fused_lm_head=True)
    assert torch.allclose(found.log_probs, log_probs, atol=2e-5)
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
    """In front of rows too, where positions are learned too: trl counts them from the padding. By a model that was made
    fast, also through a head that trains, and by one that was not."""
    model = make()
    if lora is not None:
        rw.add_adapter(model, rw.LoraConfig(r=2, **lora))
        optimize_for_training(model)
    torch.manual_seed(0)
    rows, starts = [torch.randint(3, 97, (size,)) for size in (5, 9, 7)], [2, 4, 6]
    before = max(starts)
    ids = torch.zeros(3, before + max(len(row) - start for row, start in zip(rows, starts)), dtype=torch.long)
    mask, labels, expected = torch.zeros_like(ids), torch.full_like(ids, -100), []
    for number, (row, start) in enumerate(zip(rows, starts)):
        end = before - start + len(row)
        ids[number, before - start : end], mask[number, before - start : end] = row, 1
        labels[number, before:end] = row[start:]
        log_p = torch.log_softmax(model(row[None]).logits[0].float() / 0.7, -1)
        expected.append(log_p[start - 1 : -1].gather(1, row[start:, None]).squeeze(1))
    given = {"labels": labels, "input_ids": ids, "attention_mask": mask, "temperature": 0.7, "want_stats": True}
    if accept_scores(model, layout):
        found = model(**given, fused_lm_head=True)
    else:
        assert lora is None
        found = scores_of_logits(model, layout, **given)
    scored = labels[:, 1:] != -100
    torch.testing.assert_close(found.log_probs[scored], torch.cat(expected), rtol=1e-4, atol=1e-5)
    assert (found.log_probs[~scored] == 0).all()


def test_a_prompt_is_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, seen = adapted(), []
    accept_scores(model, "pairs")
    model.model.embed_tokens.register_forward_hook(lambda module, given, out: seen.append(given[0].numel()))
    model(**pairs(), fused_lm_head=True)
    assert seen == [sum(LENGTHS) - sum(PROMPTS[:2])]


def test_a_model_with_windows_shares_no_prompt() -> None:
    model = adapted()
    model.config.sliding_window = 4
    accept_scores(model, "pairs")
    assert asked_of(model) == Asked("flat", "some layers have a window")


@pytest.mark.parametrize("layout", ["padded", "flat", "pairs"])
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_balancing_loss_is_that_of_the_padded_rows(family: str, layout: Layout) -> None:
    """A prompt that two answers share counts twice, as in trl."""
    model, batch = adapted(tiny_moe(family)), pairs()
    assert accept_scores(model, layout)
    assert ("balancing loss" in (asked_of(model).apart or "")) is (layout == "pairs")
    given = {"attention_mask": batch["attention_mask"], "output_router_logits": True}
    expected = type(model).forward(model, batch["input_ids"], **given).aux_loss
    found = model(**batch, output_router_logits=True, fused_lm_head=True)
    torch.testing.assert_close(found.aux_loss, expected)
    assert torch.allclose(found.log_probs, wanted(model, batch)[0], atol=2e-5)

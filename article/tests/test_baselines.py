"""Bottleneck adapters and prefix tuning: what they start as, what trains, what comes back from disk, what PEFT says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from rankwise.errors import ConfigError
from rankwise_article.baselines import ATTRIBUTE, add_baseline, load_baseline, save_baseline
from tiny_models import tiny_gpt2, tiny_llama

IDS = torch.tensor([[5, 9, 13, 40, 7, 22], [3, 8, 60, 61, 4, 11]])
MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


@pytest.fixture(params=sorted(MODELS))
def make(request: pytest.FixtureRequest):
    return MODELS[request.param]


def trained(make, method: str, size: int = 4):
    """A model with a baseline that does something."""
    model = make()
    add_baseline(method, model, size)
    torch.manual_seed(1)
    with torch.no_grad():
        for value in getattr(model, ATTRIBUTE).parameters():
            value.add_(torch.randn_like(value) * 0.5)
    return model.eval()


def test_bottlenecks_start_at_the_base_model(make):
    model = make()
    before = model(IDS).logits
    add_baseline("bottleneck", model, 4)
    assert torch.equal(model(IDS).logits, before)


def test_a_prefix_starts_as_the_models_own_keys_and_values(make):
    """So the text continues the drawn tokens: the same logits as with those tokens in front of it."""
    torch.manual_seed(3)
    model = make()
    torch.manual_seed(3)
    drawn = torch.randint(97, (1, 4))
    whole = model(torch.cat([drawn.expand(2, -1), IDS], 1)).logits[:, 4:]
    torch.manual_seed(3)
    add_baseline("prefix", model, 4)
    torch.testing.assert_close(model(IDS).logits, whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_the_baseline_trains_and_the_base_does_not(make, method):
    model = make()
    count = add_baseline(method, model, 4)
    trainable = [value for value in model.parameters() if value.requires_grad]
    assert sum(value.numel() for value in trainable) == count
    first = model(input_ids=IDS, labels=IDS).loss
    first.backward()
    assert all(value.grad is not None for value in getattr(model, ATTRIBUTE).parameters())
    optimizer = torch.optim.SGD(trainable, lr=0.1)
    for _ in range(3):
        optimizer.step()
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
    assert model(input_ids=IDS, labels=IDS).loss < first


def test_sizes_are_what_the_papers_count(make):
    """2 L (2 d w + d + w) for bottlenecks of width w; 2 L P (heads of keys) (head size) for a prefix of P."""
    assert add_baseline("bottleneck", make(), 3) == 2 * 2 * (2 * 32 * 3 + 32 + 3)
    kv = 16 if make is tiny_llama else 32
    assert add_baseline("prefix", make(), 3) == 2 * 2 * 3 * kv


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_saving_and_loading_is_exact(make, method, tmp_path: Path):
    model = trained(make, method)
    model.name_or_path = "the/base"
    save_baseline(model, tmp_path)
    again = make()
    load_baseline(again, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"] == "the/base"
    assert not any(value.requires_grad for value in again.parameters())


def test_a_prefix_means_the_same_to_peft(make, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="the extra `bench` holds the oracle")
    model = trained(make, "prefix")
    save_baseline(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(make(), str(tmp_path)).eval()
    expected = theirs(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_generation_is_what_the_logits_say(make, method):
    model, ids = trained(make, method), IDS[:1]
    written = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    for _ in range(8):
        ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert written.tolist() == ids.tolist()


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_padding_changes_nothing(make, method):
    model, mask = trained(make, method), torch.ones_like(IDS)
    mask[1, 4:] = 0
    alone = model(IDS[1:, :4]).logits
    torch.testing.assert_close(model(IDS, attention_mask=mask).logits[1:, :4], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_scoring_sees_the_baseline(make, method):
    """The evaluation runs the model without its head, with masks of its own."""
    from rankwise.acceleration.scoring import Scorer, target_of

    model = trained(make, method)
    targets = [target_of([3, 4, 5, 6], [7 + n, 8, 9], 64) for n in range(4)]
    scores = {number: score for batch in Scorer(model, budget=2048).score(targets) for number, score in batch.items()}
    for number, target in enumerate(targets):
        log_p = model(torch.tensor([target.ids])).logits[0].log_softmax(-1)
        expected = sum(log_p[place, token].item() for place, token in zip(target.places, target.wanted))
        assert scores[number].total == pytest.approx(expected, abs=1e-3)


def test_models_and_settings_that_do_not_fit(tmp_path: Path):
    with pytest.raises(ConfigError) as caught:
        add_baseline("bottleneck", torch.nn.Sequential(torch.nn.Linear(2, 2)), 2)
    assert caught.value.code == "RA170"
    model = tiny_llama()
    add_baseline("prefix", model, 2)
    model.gradient_checkpointing_enable()
    with pytest.raises(ConfigError) as caught:
        model.train()(IDS)
    assert caught.value.code == "RA171"
    with pytest.raises(ConfigError) as caught:
        load_baseline(tiny_llama(), tmp_path)
    assert caught.value.code == "RA172"


def test_files_of_another_model_are_refused(tmp_path: Path):
    save_baseline(trained(tiny_llama, "bottleneck"), tmp_path)
    with pytest.raises(ConfigError) as caught:
        load_baseline(tiny_gpt2(), tmp_path)
    assert caught.value.code == "RA172"


def test_dora_through_is_the_printed_layer_with_the_gradient_of_its_norm(tmp_path: Path):
    model = trained(tiny_llama, "dora_through")
    layer = model.model.layers[0].mlp.up_proj
    A, B, m, W = layer.direction.A, layer.direction.B, layer.direction.m, layer.base.weight
    x = torch.randn(3, layer.in_features)
    adapted = W + 2 * B @ A
    printed = x @ (m[:, None] * adapted / adapted.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(layer(x), printed)
    for ours, theirs in zip(
        torch.autograd.grad(layer(x).square().sum(), (A, B, m)),
        torch.autograd.grad(printed.square().sum(), (A, B, m)),
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    save_baseline(model, tmp_path)
    again = tiny_llama()
    load_baseline(again, tmp_path)
    assert torch.equal(again(IDS).logits, model(IDS).logits)

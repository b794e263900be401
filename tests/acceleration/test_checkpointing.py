"""Checkpointed blocks that first run without a graph give what torch's checkpointing gives."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from families import MAKERS, family
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from rankwise import LoraConfig, add_adapter
from rankwise.acceleration import memory, optimize_for_training, restore
from rankwise.adapters.base_layer import put_back
from rankwise.compat.transformers import checkpoints_in_forward
from tables import thinned
from tiny_models import SIZES

pytestmark = pytest.mark.skipif(not checkpoints_in_forward(), reason="needs transformers 5.23")
IDS = torch.randint(5, 90, (2, 12), generator=torch.Generator().manual_seed(0))


def prepared(name: str, method: str = "lora", *, ours=True, dropout: float = 0.1, targets="all-linear", **options):
    model = family(name)
    if method == "lora":
        add_adapter(model, LoraConfig(r=4, lora_dropout=dropout, target_modules=targets))
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                nn.init.normal_(parameter, std=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": False, **options})
    optimize_for_training(model)
    if not ours:
        for module in model.modules():
            if "rankwise_place" in module.__dict__:
                put_back(module)
    return model


def loss_of(model) -> torch.Tensor:
    torch.manual_seed(3)
    return model(input_ids=IDS, labels=IDS).loss


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: item.grad for name, item in model.named_parameters() if item.grad is not None}


def runs_of(monkeypatch) -> list[str]:
    """Grows by an entry for each block that runs our way, and for each that runs again."""
    seen: list[str] = []
    for name in ("forward", "backward"):
        way = getattr(memory._RunAgain, name)

        def noted(*args, _way=way, _name=name):
            seen.append(_name)
            return _way(*args)

        monkeypatch.setattr(memory._RunAgain, name, staticmethod(noted))
    return seen


@thinned({"name": sorted(MAKERS), "method": ["lora", "full"]})
def test_results_are_those_of_torchs_checkpointing(name, method, monkeypatch):
    theirs = prepared(name, method, ours=False)
    wanted = loss_of(theirs)
    wanted.backward()
    runs = runs_of(monkeypatch)
    model = prepared(name, method)
    loss = loss_of(model)
    loss.backward()
    assert runs == ["forward"] * 2 + ["backward"] * 2
    assert torch.equal(loss, wanted)
    assert gradients(model).keys() == gradients(theirs).keys()
    for key, grad in gradients(model).items():
        assert torch.equal(grad, gradients(theirs)[key]), key


def test_gradients_can_be_asked_for_by_name(monkeypatch):
    runs = runs_of(monkeypatch)
    model = prepared("llama", dropout=0.0)
    trained = [item for item in model.parameters() if item.requires_grad]
    asked = torch.autograd.grad(loss_of(model), trained)
    assert runs.count("backward") == 2
    assert not gradients(model)
    loss_of(model).backward()
    assert all(torch.equal(item.grad, grad) for item, grad in zip(trained, asked))


def test_gradients_add_up_over_micro_batches():
    model = prepared("llama")
    loss_of(model).backward()
    once = {key: grad.clone() for key, grad in gradients(model).items()}
    loss_of(model).backward()
    for key, grad in gradients(model).items():
        torch.testing.assert_close(grad, 2 * once[key])


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda model: model.model.layers[0].mlp.register_forward_hook(lambda *_: None), id="hook"),
        pytest.param(lambda model: model.eval(), id="eval"),
        pytest.param(lambda model: model.gradient_checkpointing_disable(), id="off"),
        pytest.param(
            lambda model: model._set_gradient_checkpointing(
                gradient_checkpointing_func=partial(checkpoint, use_reentrant=False, determinism_check="none")
            ),
            id="options",
        ),
        pytest.param(lambda model: model._set_gradient_checkpointing(gradient_checkpointing_func=_own), id="own"),
    ],
)
def test_what_must_see_the_blocks_keeps_torchs_way(spoil, monkeypatch):
    model = prepared("llama", dropout=0.0)
    expected = loss_of(model).item()
    runs = runs_of(monkeypatch)
    spoil(model)
    for layer in model.model.layers[1:]:
        layer.register_forward_hook(lambda *_: None)
        # On the block itself: outside of what runs again.
    loss = loss_of(model)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert all(torch.isfinite(grad).all() for grad in gradients(model).values())
    hooked = any(layer.mlp._forward_hooks for layer in model.model.layers)
    assert runs == (["forward", "backward"] if hooked else [])


def _own(function, *args):
    return checkpoint(function, *args, use_reentrant=False)


def test_a_block_that_gives_more_than_one_tensor(monkeypatch):
    model = prepared("llama")
    wanted = loss_of(model)
    kind = type(model.model.layers[0])
    plain = kind.forward.__wrapped__

    class Two(kind):
        def forward(self, *args, **kwargs):
            return plain(self, *args, **kwargs), None

    for layer in model.model.layers:
        layer.__class__ = Two
        layer.register_forward_hook(lambda _module, _args, out: out[0])
    runs = runs_of(monkeypatch)
    for _ in range(2):
        loss = loss_of(model)
        loss.backward()
        assert torch.equal(loss, wanted)
    assert runs == ["forward"] * 2


def test_routers_that_count_in_the_loss_keep_their_gradients(monkeypatch):
    found = []
    runs = runs_of(monkeypatch)
    for ours in (False, True):
        model = prepared("mixtral", "full", ours=ours)
        torch.manual_seed(3)
        loss = model(input_ids=IDS, labels=IDS, output_router_logits=True).loss
        loss.backward()
        found.append((loss, gradients(model)))
    assert runs == []
    (wanted, theirs), (loss, own) = found
    assert torch.equal(loss, wanted)
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_keys_and_values_of_an_earlier_block_keep_their_gradients(monkeypatch):
    """Gemma 3n's blocks leave them in a container for later blocks."""
    sizes = {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "layer_types": ["full_attention"] * 4, "head_dim": 8}
    narrow = {"laurel_rank": 4, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 97}
    narrow |= {"altup_num_inputs": 2, "intermediate_size": [48] * 4, "activation_sparsity_pattern": [0.0] * 4}
    config = Gemma3nTextConfig(**{**SIZES, **sizes, **narrow})
    monkeypatch.setitem(MAKERS, "gemma3n", lambda: Gemma3nForCausalLM(config))
    found = []
    for ours in (False, True):
        model = prepared("gemma3n", dropout=0.0, targets=["q_proj", "k_proj", "v_proj"], ours=ours)
        # With it, an input of each block needs a gradient, which alone keeps torch's way.
        model.disable_input_require_grads()
        loss_of(model).backward()
        found.append(gradients(model))
    theirs, own = found
    assert all(torch.equal(own[key], theirs[key]) for key in theirs)


def test_restore_gives_torchs_checkpointing_back(monkeypatch):
    model = prepared("llama")
    restore(model)
    runs = runs_of(monkeypatch)
    loss_of(model).backward()
    assert runs == []
    assert not any("rankwise_place" in module.__dict__ for module in model.modules())


def test_rows_of_other_lengths_take_other_places():
    model = prepared("llama", dropout=0.0)
    for length in (12, 5, 9):
        ids = IDS[:, :length]
        plain = prepared("llama", ours=False, dropout=0.0)
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, plain(input_ids=ids, labels=ids).loss)

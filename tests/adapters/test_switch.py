"""Several adapters side by side in one model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapted_models import logits
from torch import nn

import rankwise as rw
from rankwise.adapters import switch
from rankwise.adapters.state import adapter_state
from rankwise.errors import AdapterError
from tables import long
from tiny_models import tiny_llama, tiny_moe

KINDS: dict[str, dict[str, Any]] = {
    "embedding": {"target_modules": ["embed_tokens"], "use_dora": True},
    "head": {"target_modules": ["lm_head"]},
    "rows": {"target_modules": ["v_proj"], "trainable_token_indices": [5, 9]},
    "stacks": {"target_modules": (), "target_parameters": ["experts.down_proj", "experts.gate_up_proj"]},
    "whole head": {"target_modules": ["v_proj"], "modules_to_save": ["lm_head"]},
    "whole embedding": {"target_modules": ["v_proj"], "modules_to_save": ["embed_tokens"]},
    "whole attention": {"target_modules": ["lm_head"], "modules_to_save": ["layers.0.self_attn"]},
    "whole experts": {"target_modules": ["v_proj"], "modules_to_save": ["experts"]},
}
# What one adapter trains whole, and the kinds that adapt it or a part of it.
CLASHES = {
    "whole head": {"head", "rows", "whole attention"},
    "whole embedding": {"embedding", "rows"},
    "whole attention": {"rows", "whole head", "whole embedding", "whole experts"},
    "whole experts": {"stacks", "whole attention"},
}


def tied_mixture() -> nn.Module:
    return tiny_moe("mixtral", tie_word_embeddings=True)


def add(model: nn.Module, kind: str, name: str) -> None:
    rw.add_adapter(model, rw.LoraConfig(r=3, lora_alpha=8, **KINDS[kind]), name=name)
    torch.manual_seed(len(name))
    with torch.no_grad():
        for parameter in rw.adapter_parameters(model).values():
            parameter.add_(0.05 * torch.randn_like(parameter))


def everything(model: Any) -> tuple[Any, ...]:
    """What a refusal and an undone merge must leave as it was."""
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    tied = model.config.tie_word_embeddings, model.get_output_embeddings().weight is model.get_input_embeddings().weight
    state = copy.deepcopy(model.state_dict())
    return kinds, tied, list(state), [*state.values(), logits(model)]


def assert_same(one: tuple[Any, ...], other: tuple[Any, ...]) -> None:
    assert one[:-1] == other[:-1]
    assert all(map(torch.equal, one[-1], other[-1]))


# Of two orders one; the other is long.
@pytest.mark.parametrize(
    ("one", "two"),
    [*itertools.combinations_with_replacement(KINDS, 2), *long(list(itertools.combinations(reversed(KINDS), 2)))],
)
def test_every_pair_works_or_is_refused(one: str, two: str, tmp_path: Path) -> None:
    model = tied_mixture()
    add(model, one, "one")
    before = everything(model)
    if two in CLASHES.get(one, ()) or one in CLASHES.get(two, ()):
        with pytest.raises(AdapterError, match=r"RW406.*whole"):
            add(model, two, "two")
        assert_same(everything(model), before)
        return
    add(model, two, "two")
    for name in ("one", "two"):
        rw.set_adapter(model, name)
        expected, unmerged = logits(model), everything(model)
        rw.save_adapter(model, tmp_path / name)
        ours = tied_mixture()
        rw.load_adapter(ours, tmp_path / name)
        assert torch.equal(logits(ours), expected)
        rw.merge_adapter(model)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=2e-5)
        rw.unmerge_adapter(model)
        assert_same(everything(model), unmerged)
    theirs = peft.PeftModel.from_pretrained(tied_mixture(), tmp_path / "two").eval()
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("disabled", [False, True])
def test_a_merge_that_fails_leaves_the_model_as_it_was(disabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tied_mixture()
    add(model, "rows", "one")
    if disabled:
        rw.adapters.disable_adapter(model)
    before, calls = everything(model), itertools.count()

    def fails_in_the_second_layer(_: nn.Module, W: torch.Tensor) -> nn.Module:
        if next(calls):
            raise MemoryError
        return nn.Linear(W.shape[1], W.shape[0])

    monkeypatch.setattr(switch, "with_weight", fails_in_the_second_layer)
    with pytest.raises(MemoryError):
        rw.merge_adapter(model)
    assert_same(everything(model), before)
    monkeypatch.undo()
    rw.merge_adapter(model)


@pytest.mark.parametrize("disabled", [False, True])
def test_the_active_adapter_stays_when_another_one_goes(disabled: bool) -> None:
    model = tiny_llama()
    for name in ("a", "b", "c"):
        rw.add_adapter(model, rw.LoraConfig(r=2), name=name)
    if disabled:
        rw.disable_adapter(model)
    rw.remove_adapter(model, "b")
    assert (adapter_state(model).active, adapter_state(model).disabled) == ("c", disabled)
    rw.remove_adapter(model, "c")
    assert adapter_state(model).active == "a"


def test_an_unmerged_model_trains_as_it_is_set() -> None:
    model = tiny_llama().eval()
    rw.add_adapter(model, rw.LoraConfig(r=2, lora_dropout=0.5))
    rw.merge_adapter(model)
    rw.unmerge_adapter(model.train())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("name", ["", "a.b", "eval", "keys"])
def test_a_name_that_modules_cannot_have_is_refused(name: str) -> None:
    model = tiny_llama()
    with pytest.raises(AdapterError, match="RW405"):
        rw.add_adapter(model, rw.LoraConfig(r=2), name=name)
    rw.add_adapter(model, rw.LoraConfig(r=2))


def test_four_bit_weights_cannot_train_whole() -> None:
    model = tiny_llama(hidden_size=64, intermediate_size=64)
    rw.quantize(model, rw.Nf4Config())
    with pytest.raises(AdapterError, match="RW402.*quantized weights cannot train whole"):
        rw.add_adapter(model, rw.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["mlp"]))
    rw.add_adapter(model, rw.LoraConfig(r=2))

"""Several adapters at once: mixed in one batch by name, put into one another's tensors, and side by side in a model."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch._dynamo
from adapted_models import IDS, logits
from peft.utils.hotswap import hotswap_adapter as peft_hotswap_adapter
from torch import nn

import rankwise as rw
from rankwise.adapters import merge
from rankwise.errors import AdapterError
from tables import long
from tiny_models import tiny_gpt2, tiny_llama, tiny_moe

BASE = "__base__"
ROWS = torch.cat([IDS, IDS.flip(1)])
NAMES = ["a", "b", BASE, "a"]


def four_bit_llama():
    model = tiny_llama()
    rw.quantize(model, rw.Nf4Config(block_size=32))
    return model


def biased_llama():
    return tiny_llama(attention_bias=True)


CASES = {
    "lora": (biased_llama, {}, {"r": 5, "use_rslora": True}),
    "dora": (biased_llama, {"use_dora": True}, {"target_modules": ["q_proj", "down_proj"]}),
    "four_bit": (four_bit_llama, {"use_dora": True}, {}),
    "ends": (
        tiny_llama,
        {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True},
        {"target_modules": ["lm_head"]},
    ),
    "fused": (tiny_gpt2, {"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}}, {}),
}


def adapted(case: str):
    make, one, other = CASES[case]
    model = make()
    for name, settings in (("a", one), ("b", other)):
        rw.add_adapter(model, rw.LoraConfig(**{"r": 3, "init_lora_weights": False, **settings}), name=name)
    return model


def alone(model, name, run):
    if name == BASE:
        with rw.adapter_disabled(model):
            return run()
    rw.set_adapter(model, name)
    return run()


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_each_row_is_computed_by_its_own_adapter(case, optimized):
    model = adapted(case)
    if optimized:
        rw.optimize_for_training(model)
    run = torch.no_grad()(lambda: model(input_ids=ROWS).logits)
    expected = torch.stack([alone(model, name, run)[row] for row, name in enumerate(NAMES)])
    active = run()
    with rw.mixed_adapters(model, NAMES):
        torch.testing.assert_close(run(), expected, rtol=1e-5, atol=2e-5)
    assert not torch.allclose(expected, active, atol=1e-3)
    torch.testing.assert_close(run(), active, rtol=0, atol=0)


def test_rows_are_those_of_pefts_adapter_names(tmp_path):
    model = adapted("lora")
    for name in ("a", "b"):
        rw.save_adapter(model, tmp_path / name, name=name)
    theirs = peft.PeftModel.from_pretrained(biased_llama(), tmp_path / "a", adapter_name="a")
    theirs.load_adapter(tmp_path / "b", adapter_name="b")
    with torch.no_grad(), rw.mixed_adapters(model, NAMES):
        expected = theirs.eval()(input_ids=ROWS, adapter_names=NAMES).logits
        torch.testing.assert_close(model(input_ids=ROWS).logits, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}])
def test_generate_keeps_each_prompts_adapter(options):
    model, given = adapted("dora"), {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, **options}
    expected = [
        alone(model, name, lambda row=row: model.generate(ROWS[row : row + 1], **given))
        for row, name in enumerate(NAMES)
    ]
    with rw.mixed_adapters(model, NAMES):
        assert torch.equal(model.generate(ROWS, **given), torch.cat(expected))
    # The active adapter is a.
    assert not torch.equal(expected[1], model.generate(ROWS[1:2], **given))


@pytest.mark.parametrize(
    ("make", "settings"),
    [
        (biased_llama, {"bias": "all"}),
        (tiny_llama, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
        (tiny_llama, {"target_modules": ["q_proj"], "trainable_token_indices": [5]}),
        (lambda: tiny_moe("qwen3_moe"), {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}),
    ],
)
def test_what_a_batch_cannot_mix_is_refused(make, settings):
    model = make()
    rw.add_adapter(model, rw.LoraConfig(r=2, **settings))
    with pytest.raises(AdapterError, match="RW624"), rw.mixed_adapters(model, ["default"]):
        pass


def test_names_that_are_not_there_or_too_few_are_refused():
    model = adapted("lora")
    with pytest.raises(AdapterError, match="RW407"), rw.mixed_adapters(model, ["a", "c"]):
        pass
    for names in (["a", "b", "a"], []):
        with pytest.raises(AdapterError, match="RW625"), rw.mixed_adapters(model, names):
            model(input_ids=ROWS)
    q_proj = model.model.layers[0].self_attn.q_proj
    with pytest.raises(AdapterError, match="RW625"), rw.mixed_adapters(model, ["a", "b"]):
        q_proj(torch.zeros(4, 32))


SWAPS = {
    "lora": (tiny_llama, {}, {"lora_alpha": 7}),
    "rslora": (tiny_llama, {}, {"use_rslora": True}),
    "dora": (tiny_llama, {"use_dora": True}, {"use_dora": True, "lora_alpha": 5}),
    "whole": (tiny_llama, *[{"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}] * 2),
    "rows": (tiny_llama, *[{"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]}] * 2),
    "fused": (
        tiny_gpt2,
        *[{"target_modules": ["c_attn"], "enable_lora": {"c_attn": [True, False, True]}, "use_dora": True}] * 2,
    ),
    "experts": (
        lambda: tiny_moe("qwen3_moe"),
        *[{"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}] * 2,
    ),
}


def one_and_a_folder(tmp_path, case: str):
    """A model with an adapter, and a folder with another of the same shape, whose model comes too."""
    make, own, others = SWAPS[case]
    model, source = make(), make()
    for index, (to, settings) in enumerate(((model, own), (source, others))):
        torch.manual_seed(index)
        rw.add_adapter(to, rw.LoraConfig(**{"r": 3, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for parameter in rw.adapter_parameters(source).values():
            parameter.add_(0.05 * torch.randn_like(parameter))
    rw.save_adapter(source, tmp_path / "other")
    return model, source, tmp_path / "other"


@pytest.mark.parametrize("case", SWAPS)
def test_a_swapped_adapter_computes_as_the_loaded_one_in_the_same_tensors(tmp_path, case):
    model, source, folder = one_and_a_folder(tmp_path, case)
    before = logits(model)
    places = [parameter.data_ptr() for parameter in rw.adapter_parameters(model).values()]
    rw.hotswap_adapter(model, folder)
    torch.testing.assert_close(logits(model), logits(source), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(before, logits(source), atol=1e-3)
    assert places == [parameter.data_ptr() for parameter in rw.adapter_parameters(model).values()]
    # What is saved afterwards is the other adapter.
    rw.save_adapter(model, tmp_path / "again")
    loaded = SWAPS[case][0]()
    rw.load_adapter(loaded, tmp_path / "again")
    torch.testing.assert_close(logits(loaded), logits(source), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["lora", "dora"])
def test_a_compiled_model_is_not_compiled_anew(tmp_path, case):
    model, source, folder = one_and_a_folder(tmp_path, case)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        compiled = torch.compile(model, backend="eager")
        compiled(input_ids=IDS)
        rw.hotswap_adapter(compiled, folder)
        torch.testing.assert_close(compiled(input_ids=IDS).logits, logits(source), rtol=1e-4, atol=1e-5)


def test_a_swap_is_pefts(tmp_path):
    model, _, folder = one_and_a_folder(tmp_path, "lora")
    rw.save_adapter(model, tmp_path / "one")
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "one")
    peft_hotswap_adapter(theirs, folder, "default", torch_device="cpu")
    rw.hotswap_adapter(model, folder)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "settings", [{"r": 4}, {"use_dora": True}, {"target_modules": ["q_proj"]}, {"bias": "lora_only"}]
)
def test_another_shape_is_refused_and_nothing_changes(tmp_path, settings):
    model, other = biased_llama(), biased_llama()
    rw.add_adapter(model, rw.LoraConfig(r=3, init_lora_weights=False))
    rw.add_adapter(other, rw.LoraConfig(**{"r": 3, "init_lora_weights": False, **settings}))
    rw.save_adapter(other, tmp_path / "other")
    before, state = logits(model), copy.deepcopy(model.state_dict())
    with pytest.raises(AdapterError, match="RW623|RW406"):
        rw.hotswap_adapter(model, tmp_path / "other")
    assert torch.equal(logits(model), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


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

    monkeypatch.setattr(merge, "with_weight", fails_in_the_second_layer)
    with pytest.raises(MemoryError):
        rw.merge_adapter(model)
    assert_same(everything(model), before)
    monkeypatch.undo()
    rw.merge_adapter(model)

"""PiSSA and LoftQ: what PEFT makes of them, and what becomes of a base that they change."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from adapted_models import IDS, logits, step
from torch import nn

import rankwise as rw
from rankwise.adapters import adapter_tensors, load_tensors
from rankwise.adapters.base_layer import dense_weight
from rankwise.errors import AdapterError, ConfigError, RankwiseWarning
from rankwise.export.merged import merge_to_folder
from rankwise.records import RunRecord
from tables import thinned
from tiny_models import tiny_gpt2, tiny_llama

peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")

FAMILIES = {"llama": lambda: tiny_llama(attention_bias=True), "gpt2": tiny_gpt2}
TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "c_fc"]}
MORE = {"plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "ranks": {}}


def settings(family: str, more: str, init: Any) -> dict[str, Any]:
    ranks = {"rank_pattern": {TARGETS[family][0]: 2}, "alpha_pattern": {TARGETS[family][0]: 12}}
    given = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS[family], "init_lora_weights": init}
    return {**given, **MORE[more], **(ranks if more == "ranks" else {})}


def peft_of(base: nn.Module, **given: Any) -> Any:
    torch.manual_seed(3)
    return peft.get_peft_model(base, peft.LoraConfig(**given, task_type="CAUSAL_LM")).eval()


def ours(base: nn.Module, **given: Any) -> nn.Module:
    torch.manual_seed(3)
    rw.add_adapter(base, rw.LoraConfig(**given))
    return base


def layers_of(model: nn.Module, theirs: Any) -> list[tuple[Any, Any]]:
    """(our layer, PEFT's layer) of every adapted module."""
    found = [
        (model.get_submodule(path), module)
        for path, module in theirs.base_model.model.named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    ]
    assert len(found) == sum(1 for _ in rw.adapter_parameters(model)) // 2 or found
    return found


def losses(model: nn.Module, count: int = 10) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    found = []
    for _ in range(count):
        loss = model(input_ids=IDS, labels=IDS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(loss.detach()))
    return found


# --- as PEFT has them ---


@thinned({"family": list(FAMILIES), "init": ["pissa", "pissa_niter_4"], "more": list(MORE)})
def test_pissa_is_peft_s(family, init, more, monkeypatch):
    def seeded(*given, **options):
        torch.manual_seed(4)
        return draw(*given, **options)

    # The randomised SVD of both then draws the same numbers.
    draw = torch.svd_lowrank
    monkeypatch.setattr(torch, "svd_lowrank", seeded)
    monkeypatch.setattr("peft.tuners.lora.layer.svd_lowrank", seeded)
    given = settings(family, more, init)
    theirs, model = peft_of(FAMILIES[family](), **given), ours(FAMILIES[family](), **given)
    close = {"rtol": 0, "atol": 1e-4}
    for mine, other in layers_of(model, theirs):
        A, B = other.lora_A["default"].weight, other.lora_B["default"].weight
        adapter = mine.adapters["default"]
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, B @ A, **close)
        torch.testing.assert_close(mine.base_layer.weight, other.base_layer.weight, **close)
        torch.testing.assert_close(adapter.scaling, other.scaling["default"])
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(model), losses(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_loftq_is_peft_s_decomposition(family):
    from peft.utils.loftq_utils import _low_rank_decomposition

    dense, model = FAMILIES[family](), FAMILIES[family]()
    rw.quantize(model, rw.Nf4Config())
    given = settings(family, "plain", "loftq") | {"lora_alpha": 4}
    rw.add_adapter(model, rw.LoraConfig(**given), originals=dense)
    base = FAMILIES[family]()
    for name, layer in model.named_modules():
        if isinstance(layer, rw.Linear4bit):
            module, Q = base.get_submodule(name.replace(".base_layer", "")), layer.dequantize()
            module.weight.data = Q if isinstance(module, nn.Linear) else Q.T.contiguous()
    theirs = peft_of(base, **{**given, "init_lora_weights": True})
    for item in rw.adapters.report(model).modules:
        mine, other = model.get_submodule(item.name), theirs.base_model.model.get_submodule(item.name)
        W, Q, adapter = dense_weight(dense.get_submodule(item.name)), mine.base_layer.dequantize(), mine.at_work
        pair = _low_rank_decomposition(W - Q, reduced_rank=adapter.r)
        torch.testing.assert_close(adapter.lora_B @ adapter.lora_A, pair["L"] @ pair["R"], rtol=0, atol=1e-5)
        other.lora_A["default"].weight.data, other.lora_B["default"].weight.data = pair["R"], pair["L"]
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(losses(model), losses(theirs), rtol=1e-4, atol=1e-5)


def test_loftq_comes_nearer_at_any_scale():
    """PEFT leaves the scale out, so that its pair would be applied twice where lora_alpha = 2 r."""
    dense, model = tiny_llama(), tiny_llama()
    rw.quantize(model, rw.Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(r=12, lora_alpha=24, init_lora_weights="loftq"), originals=dense)
    for item in rw.adapters.report(model).modules:
        layer = model.get_submodule(item.name)
        W, Q = dense.get_submodule(item.name).weight, layer.base_layer.dequantize()
        assert (W - layer.at_work.merge(layer.base_layer)).norm() < 0.8 * (W - Q).norm()


@pytest.mark.parametrize("init", ["eva", "orthogonal"])
def test_an_adapter_that_peft_started_otherwise_loads(init, tmp_path):
    theirs = peft_of(tiny_llama(), **settings("llama", "plain", init))
    theirs.peft_config["default"].init_lora_weights = init
    theirs.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] == init
    model = tiny_llama()
    rw.load_adapter(model, tmp_path)
    torch.testing.assert_close(logits(model), logits(theirs), rtol=1e-4, atol=1e-5)


# --- a base that changes ---


@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_pissa_is_plain_lora_on_the_original(family, more, tmp_path):
    model = ours(FAMILIES[family](), **settings(family, more, "pissa"))
    step(model, 0.01)
    trained = logits(model)
    rw.save_adapter(model, tmp_path)
    document = json.loads((tmp_path / "adapter_config.json").read_text())
    assert document["init_lora_weights"] is True
    assert document["r"] == 8
    theirs = peft.PeftModel.from_pretrained(FAMILIES[family](), tmp_path)
    torch.testing.assert_close(logits(theirs), trained, rtol=1e-4, atol=2e-5)
    again = FAMILIES[family]()
    rw.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=2e-5)
    rw.merge_adapter(again)
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("more", ["plain", "dora"])
def test_a_trained_pissa_steps_aside_and_leaves(more):
    plain = logits(tiny_llama())
    model = ours(tiny_llama(), **settings("llama", more, "pissa"))
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    step(model, 0.01)
    trained = logits(model)
    assert (trained - plain).abs().max() > 1e-2
    with rw.adapter_disabled(model):
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(model), trained)
    assert not any("origin" in name for name in model.state_dict())
    rw.merge_adapter(model)
    torch.testing.assert_close(logits(model), trained, rtol=1e-4, atol=1e-5)
    rw.unmerge_adapter(model)
    assert torch.equal(logits(model), trained)
    rw.remove_adapter(model)
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    assert not any("adapters" in name for name, _ in model.named_modules())


def test_a_trained_pissa_goes_on_from_its_tensors():
    model, fresh = (ours(tiny_llama(), **settings("llama", "plain", "pissa")) for _ in range(2))
    step(model, 0.01)
    load_tensors(fresh, adapter_tensors(model))
    assert torch.equal(logits(fresh), logits(model))
    other = ours(tiny_llama(seed=9), **settings("llama", "plain", "pissa"))
    with pytest.raises(AdapterError, match="RW428"):
        load_tensors(other, adapter_tensors(model))


def test_pissa_over_four_bits_quantizes_the_rest(tmp_path):
    dense, model = tiny_llama(), tiny_llama()
    rw.quantize(model, rw.Nf4Config())
    four_bit = logits(model)
    rw.add_adapter(model, rw.LoraConfig(r=16, init_lora_weights="pissa"), originals=dense)
    for item in rw.adapters.report(model).modules:
        layer, W = model.get_submodule(item.name), dense.get_submodule(item.name).weight
        rest = W - layer.at_work.scaling * layer.at_work.lora_B @ layer.at_work.lora_A
        assert torch.equal(layer.base_layer.dequantize(), rw.Linear4bit.from_weight(rest.detach()).dequantize())
    started = logits(model)
    # The largest part of each weight is exact now.
    assert (started - logits(dense)).norm() < 0.7 * (four_bit - logits(dense)).norm()
    with rw.adapter_disabled(model):
        torch.testing.assert_close(logits(model), started, rtol=1e-4, atol=1e-5)
    rw.save_adapter(model, tmp_path)
    rw.load_adapter(dense, tmp_path)
    torch.testing.assert_close(logits(dense), logits(tiny_llama()), rtol=1e-4, atol=1e-5)
    with pytest.raises(AdapterError, match="RW424"):
        rw.remove_adapter(model)


def test_the_originals_are_found_where_the_model_came_from(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    model, _ = rw.load_model(str(tmp_path), quantization=rw.Nf4Config())
    given = copy.deepcopy(model)
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights="loftq"))
    rw.add_adapter(given, rw.LoraConfig(r=4, init_lora_weights="loftq"), originals=tiny_llama())
    assert torch.equal(logits(model), logits(given))


def test_pissa_in_sixteen_bits_stays_near(tmp_path):
    plain = tiny_llama().to(torch.bfloat16)
    model = tiny_llama().to(torch.bfloat16)
    before = logits(plain)
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights="pissa"))
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0.05 * float(before.abs().max()))
    assert model.get_submodule("model.layers.0.self_attn.q_proj").origin.A.dtype is torch.float32


def test_a_head_that_shares_the_embedding_leaves_the_embedding_alone(tmp_path):
    model = tiny_llama(tie_word_embeddings=True)
    before = model.get_input_embeddings().weight.clone()
    plain = logits(model)
    rw.add_adapter(model, rw.LoraConfig(r=4, target_modules=["lm_head", "embed_tokens"], init_lora_weights="pissa"))
    assert torch.equal(model.get_input_embeddings().weight, before)
    torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-5)
    step(model, 0.01)
    trained = logits(model)
    rw.save_adapter(model, tmp_path)
    again = tiny_llama(tie_word_embeddings=True)
    rw.load_adapter(again, tmp_path)
    torch.testing.assert_close(logits(again), trained, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("more", MORE)
def test_a_live_start_is_exported_for_the_original(more, tmp_path):
    model = ours(tiny_llama(), **settings("llama", more, "pissa"))
    step(model, 0.003)
    rw.export_adapter(model, tmp_path / "served", target="peft", **({"rank": 32} if more == "dora" else {}))
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "served")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-3, atol=1e-4)
    with pytest.raises(AdapterError, match="RW433"):
        rw.export_adapter(model, tmp_path / "judged", target="peft", rank=2, held_out=[torch.arange(9)])


def test_a_live_start_of_lower_rank_is_converted(tmp_path):
    model = ours(tiny_llama(), r=4, lora_alpha=8, init_lora_weights="pissa")
    step(model, 0.003)
    report = rw.export_adapter(model, tmp_path / "served", target="peft", rank=6)
    assert report.conversion is not None
    theirs = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "served")
    lost = (logits(theirs) - logits(model)).norm()
    assert lost < 0.5 * (logits(model) - logits(tiny_llama())).norm()


def test_loftq_belongs_on_its_four_bits(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "base")
    model, _ = rw.load_model(str(tmp_path / "base"), quantization=rw.Nf4Config())
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights="loftq"))
    rw.save_adapter(model, tmp_path / "adapter")
    again, _ = rw.load_model(str(tmp_path / "base"), quantization=rw.Nf4Config())
    rw.load_adapter(again, tmp_path / "adapter")
    assert torch.equal(logits(again), logits(model))
    rw.save_adapter(again, tmp_path / "again")
    for folder in ("adapter", "again"):
        with pytest.warns(RankwiseWarning, match="RW433"):
            rw.load_adapter(tiny_llama(), tmp_path / folder)
        with pytest.raises(AdapterError, match=r"RW433.*--onto quantized"):
            merge_to_folder(tmp_path / folder, tmp_path / "merged", model=str(tmp_path / "base"))
    with pytest.raises(AdapterError, match="RW433"):
        rw.export_adapter(model, tmp_path / "served", target="vllm")
    # Without a run's record nothing says how the base was quantized.
    with pytest.raises(AdapterError, match="RW414"):
        merge_to_folder(tmp_path / "adapter", tmp_path / "merged", model=str(tmp_path / "base"), onto="quantized")
    facts = {"quantization": rw.Nf4Config().to_loading_dict()}
    RunRecord(method="qlora", seed=0, settings={"dtype": "float32"}, base_model=facts).save(tmp_path / "adapter")
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged", model=str(tmp_path / "base"), onto="quantized")
    merged, _ = rw.load_model(str(tmp_path / "merged"))
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-5)


# --- what cannot be ---


def test_what_cannot_start_so_is_refused(tmp_path: Path):
    four_bit = tiny_llama()
    rw.quantize(four_bit, rw.Nf4Config())
    unchanged = logits(four_bit)
    cases = (
        (tiny_llama(), rw.LoraConfig(r=33, init_lora_weights="pissa")),
        (four_bit, rw.LoraConfig(r=4, init_lora_weights="loftq")),
        (tiny_llama(), rw.LoraConfig(r=4, init_lora_weights="loftq")),
    )
    for model, config in cases:
        with pytest.raises(AdapterError, match="RW426"):
            rw.add_adapter(model, config)
        assert not rw.adapters.has_adapter(model)
    assert torch.equal(logits(four_bit), unchanged)
    model = ours(tiny_llama(), **settings("llama", "plain", "pissa"))
    with pytest.raises(AdapterError, match="RW406"):
        rw.add_adapter(model, rw.LoraConfig(r=4), name="second")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"init_lora_weights": "pisa"}, "'pisa'"),
        ({"init_lora_weights": "pissa_niter_x"}, "pissa_niter_N"),
        ({"init_lora_weights": "loftq_niter_2"}, "loftq_niter_2"),
        ({"init_lora_weights": "eva"}, "'eva'"),
        ({"init_lora_weights": "pissa", "enable_lora": {"c_attn": [True, False, True]}}, "enable_lora"),
        ({"init_lora_weights": "pissa", "target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters"),
    ],
)
def test_values_that_do_not_go_together(given, said):
    with pytest.raises(ConfigError, match="RW101") as error:
        rw.LoraConfig(**given)
    assert said in str(error.value)

"""What a model or its user does in a way of their own stays so under ``optimize_for_training``."""

from __future__ import annotations

import copy
import gc
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import rankwise as rw
from marks import at_every_level
from precision import assert_as_exact
from rankwise.acceleration import parts, restore
from tiny_models import tiny_llama

SMALL = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2}
BART = {"vocab_size": 97, "d_model": 32, "dropout": 0.0, "decoder_layers": 2, "decoder_attention_heads": 4}
BART |= {"decoder_ffn_dim": 48, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def inputs(length: int = 10) -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (2, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def adapted(model: Any = None, **options: Any) -> Any:
    model = tiny_llama() if model is None else model
    rw.add_adapter(model, rw.LoraConfig(**{"r": 2, "init_lora_weights": False, **options}))
    return model.train()


def assert_same_loss(model: Any, **asked: Any) -> None:
    own = model(**inputs(), **asked).loss.item()
    rw.optimize_for_training(model)
    assert model(**inputs(), **asked).loss.item() == pytest.approx(own, rel=1e-5)


def test_a_loss_that_shifts_no_labels() -> None:
    model = adapted(transformers.BartForCausalLM(transformers.BartConfig(**BART)))
    assert_same_loss(model)
    assert not rw.optimize_for_training(model).fused_loss


@pytest.mark.parametrize("asked", [{}, {"output_router_logits": True}])
@pytest.mark.parametrize("family", ["mixtral", "jetmoe"])
def test_the_loss_that_balances_experts(family: str, asked: dict[str, bool]) -> None:
    if family == "mixtral":
        config: Any = transformers.MixtralConfig(
            **SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, router_aux_loss_coef=0.5
        )
        model = adapted(transformers.MixtralForCausalLM(config), target_modules=["q_proj"])
    else:
        config = transformers.JetMoeConfig(
            **SMALL, num_key_value_heads=2, kv_channels=16, intermediate_size=48, num_local_experts=4, aux_loss_coef=0.5
        )
        model = adapted(transformers.JetMoeForCausalLM(config))
    assert_same_loss(model, **asked)
    assert model(**inputs(), **asked).logits is None, "the fused loss was at work"


def test_a_loss_function_of_the_users() -> None:
    model = adapted()
    rw.optimize_for_training(model)
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.float().square().mean()
    found = model(**inputs())
    assert found.loss.item() == pytest.approx(found.logits.square().mean().item())


def test_another_ignored_label() -> None:
    given = inputs()
    given["labels"] = given["labels"].masked_fill(given["labels"] % 2 == 0, 50)
    model = adapted()
    own = model(**given, ignore_index=50).loss.item()
    rw.optimize_for_training(model)
    assert model(**given, ignore_index=50).loss.item() == pytest.approx(own, rel=1e-5)


@pytest.mark.parametrize("change", ["merge", "remove", "second adapter", "resize"])
def test_a_head_that_changes_later(change: str) -> None:
    model = adapted(target_modules=["q_proj"] if change == "resize" else ["q_proj", "lm_head"])
    rw.optimize_for_training(model)
    model(**inputs()).loss.backward()
    if change == "merge":
        rw.merge_adapter(model)
    elif change == "remove":
        rw.remove_adapter(model)
    elif change == "second adapter":
        rw.add_adapter(model, rw.LoraConfig(r=4, target_modules=["lm_head"]), name="second")
    else:
        model.resize_token_embeddings(110)
    fused = model(**inputs())
    restore(model)
    assert fused.loss.item() == pytest.approx(model(**inputs()).loss.item(), rel=1e-5)
    assert fused.logits is None


def test_hooks_below_an_adapter_are_called() -> None:
    model, calls = tiny_llama(), []
    model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append("base"))
    adapted(model)(**inputs())
    assert calls == ["base"]
    rw.optimize_for_training(model)
    calls.clear()
    model(**inputs())
    assert calls == ["base"]


def test_hooks_on_the_end_of_a_gated_mlp_are_called() -> None:
    model, calls = adapted(), []
    rw.optimize_for_training(model)
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *_: calls.append("down"))
    model(**inputs())
    assert calls == ["down"]


def test_inputs_that_all_blocks_read_are_shared_within_a_block() -> None:
    """Keys and values of every decoder layer read the encoder's states; each block is computed again by itself."""
    model = adapted(transformers.BartForConditionalGeneration(transformers.BartConfig(**BART)).double())
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    model(**inputs()).loss.backward()
    own = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    assert rw.optimize_for_training(model).shared_inputs >= 2
    model(**inputs()).loss.backward()
    for name, grad in own.items():
        torch.testing.assert_close(model.get_parameter(name).grad, grad, rtol=1e-4, atol=1e-6)


def test_an_error_on_the_way_leaves_the_model_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted()

    def fail(*_: Any) -> bool:
        raise MemoryError

    monkeypatch.setattr("rankwise.acceleration.optimize.use_attention", fail)
    with pytest.raises(MemoryError):
        rw.optimize_for_training(model)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_a_copy_is_made_plain_and_fast_by_itself() -> None:
    model = adapted()
    own = model(**inputs()).loss.item()
    done = rw.optimize_for_training(model)
    copied = copy.deepcopy(model)
    restore(copied)
    assert not any("forward" in module.__dict__ for module in copied.modules())
    assert copied(**inputs()).logits is not None
    again = rw.optimize_for_training(copied)
    assert (again.norms, again.mlps, again.shared_inputs) == (done.norms, done.mlps, done.shared_inputs)
    for each in (model, copied):
        assert each(**inputs()).loss.item() == pytest.approx(own, rel=1e-5)


def test_a_rotary_function_that_a_lost_model_left_behind_serves_every_other() -> None:
    """Neither between a step and its recomputation nor under ``torch.func`` may it become another."""
    config = transformers.ArceeConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48)
    other = transformers.ArceeForCausalLM(config)
    other.gradient_checkpointing_enable({"use_reentrant": False})
    own = other.train()(**inputs()).loss
    fast: Any = adapted(transformers.ArceeForCausalLM(config))
    rw.optimize_for_training(fast)
    loss = other(**inputs()).loss
    del fast
    gc.collect()
    loss.backward()
    torch.testing.assert_close(loss, own)
    third = transformers.ArceeForCausalLM(config)
    third(**inputs()).loss.backward()

    def loss_of(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(third, parameters, kwargs=inputs()).loss
        return found

    name = "model.layers.0.self_attn.q_proj.weight"
    grads = torch.func.grad(loss_of)(dict(third.named_parameters()))
    torch.testing.assert_close(grads[name], third.get_parameter(name).grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_transforms_of_functions(use_dora: bool, fast: bool) -> None:
    model = adapted(use_dora=use_dora)
    model(**inputs()).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if fast:
        rw.optimize_for_training(model)

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.functional_call(model, parameters, kwargs=inputs()).loss
        return found

    for name, grad in torch.func.grad(loss)(trained).items():
        torch.testing.assert_close(grad, trained[name].grad, rtol=1e-3, atol=1e-5)


def test_threads_get_their_own_answers() -> None:
    model = adapted()
    rw.optimize_for_training(model)
    rows = [torch.randint(3, 97, (2, 10), generator=torch.Generator().manual_seed(seed)) for seed in range(8)]

    @torch.no_grad()
    def ask(ids: Tensor) -> tuple[Tensor, Tensor]:
        return model(ids).logits, model(input_ids=ids, labels=ids).loss

    expected = [ask(ids) for ids in rows]
    with ThreadPoolExecutor(4) as pool:
        for found, wanted in zip(pool.map(ask, rows * 10), expected * 10):
            torch.testing.assert_close(found, wanted)


class OfAnOlderForm(LlamaForCausalLM):
    """As modelling code that comes with a model may call what its loss is given."""

    def forward(self, input_ids=None, labels=None, logits_to_keep=0, use_cache=None, **loss_kwargs):
        given = {"input_ids": input_ids, "labels": labels, "logits_to_keep": logits_to_keep, "use_cache": use_cache}
        return super().forward(**given, **loss_kwargs)


def test_what_the_loss_is_given_goes_by_any_name() -> None:
    assert_same_loss(adapted(OfAnOlderForm(tiny_llama().config)), num_items_in_batch=77)


@pytest.mark.parametrize("part", ["lm_head", "model.layers.0.mlp.act_fn"])
def test_hooks_that_come_later_are_called(part: str) -> None:
    model = adapted()
    rw.optimize_for_training(model)
    model.get_submodule(part).register_forward_hook(lambda module, args, output: 1.5 * output)
    found = model(**inputs()).loss.item()
    restore(model)
    assert found == pytest.approx(model(**inputs()).loss.item(), rel=1e-5)


def test_a_model_over_several_devices_keeps_its_forwards() -> None:
    """accelerate's hooks are on every module and move its inputs; one device plays several here."""
    from accelerate import dispatch_model

    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    places |= {f"model.layers.{index}": "cpu" for index in range(2)}
    results = []
    for hooked in (False, True):
        torch.manual_seed(0)
        model = adapted(dispatch_model(tiny_llama(), places, force_hooks=True) if hooked else tiny_llama())
        done = rw.optimize_for_training(model)
        loss = model(**inputs()).loss
        loss.backward()
        grads = [parameter.grad for parameter in rw.adapter_parameters(model).values()]
        assert bool(done.norms) != hooked
        results.append([loss.detach(), *grads])
    torch.testing.assert_close(*results)


@at_every_level
@pytest.mark.parametrize("way", ["optimized", "dispatched"])
def test_a_merged_layer_computes_with_its_own_weight(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And not with that of the layer whose forward, replaced or accelerate's, it copied."""
    monkeypatch.setattr(parts, "is_slow_in_torch", lambda dtype: True)
    model, ids = tiny_llama().to(torch.bfloat16), torch.arange(3, 27).view(2, 12)
    if way == "dispatched":
        for module in model.modules():
            if type(module) is nn.Linear:
                add_hook_to_module(module, AlignDevicesHook("cpu"))
    rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False))
    exact, plain = copy.deepcopy(model).double()(ids).logits, model(ids).logits
    if way == "optimized":
        assert rw.optimize_for_training(model).linears
    rw.merge_adapter(model)
    # The merged weight is rounded, as are the numbers between layers: twice an error is the most of two.
    assert_as_exact([model(ids).logits], [plain], [exact], slack=2)
    # Else the family keeps the fast rotary positions until the model is collected.
    restore(model)

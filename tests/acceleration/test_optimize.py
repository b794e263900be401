"""``optimize_for_training`` changes the speed of a model and not what it computes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from families import MAKERS, family
from torch import Tensor
from transformers import LlamaForCausalLM

import rankwise as rw
from marks import at_every_level, at_some_level, needs_avx2
from rankwise.acceleration import flattening_obstacle, fused_head, restore, use_native_products
from rankwise.acceleration.attention import attention as own_attention
from rankwise.acceleration.attention import kernel, mask_ranges
from rankwise.planning.tracker import StorageTracker
from tiny_models import tiny_llama


def adapted(name: str, dtype: torch.dtype = torch.float32, **config: Any) -> Any:
    model = family(name, dtype)
    # Dropout of GPT-2 and Phi would draw other numbers in another order.
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.config.attention_dropout = 0.0
    rw.add_adapter(model, rw.LoraConfig(**{"r": 4, "init_lora_weights": False, **config}))
    return model


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 97, (3, 12), generator=torch.Generator().manual_seed(1))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[:, :3] = -100
    labels[1, 8:], mask[1, 8:] = -100, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def loss_and_grads(model: Any, inputs: dict[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = model(**inputs).loss
    loss.backward()
    trained = rw.adapter_parameters(model).items()
    return loss.item(), {key: p.grad.clone() for key, p in trained if p.grad is not None}


def assert_same(found: tuple[float, dict[str, Tensor]], expected: tuple[float, dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for key, grad in expected[1].items():
        torch.testing.assert_close(found[1][key], grad, rtol=2e-3, atol=2e-5, msg=key)


def error(found: tuple[float, dict[str, Tensor]], exact: tuple[float, dict[str, Tensor]]) -> float:
    """Of all gradients together, relative."""
    pairs = [(found[1][key].float() - grad, grad) for key, grad in exact[1].items()]
    return float(sum(d.norm() ** 2 for d, _ in pairs) / sum(g.norm() ** 2 for _, g in pairs)) ** 0.5


@at_some_level
@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("use_dora", [False, True])
def test_loss_and_gradients_stay(name: str, use_dora: bool) -> None:
    model, inputs = adapted(name, use_dora=use_dora), batch()
    expected = loss_and_grads(model, inputs)
    done = rw.optimize_for_training(model)
    assert done.fused_loss, str(done)
    assert_same(loss_and_grads(model, inputs), expected)
    restore(model)
    assert_same(loss_and_grads(model, inputs), expected)


@pytest.mark.parametrize("changes", [{"attention_dropout": 0.1}, {"attn_logit_softcapping": 30.0}, {"head_dim": 24}])
def test_attention_stays_where_the_kernel_does_not_cover_it(changes: dict[str, Any]) -> None:
    model = adapted("llama", torch.bfloat16)
    for name, value in changes.items():
        setattr(model.config, name, value)
    done = rw.optimize_for_training(model)
    assert not done.attention
    assert any("attention stays torch's" in reason for reason in done.left_alone)


def test_two_models_of_a_family_share_the_rotary_function() -> None:
    first, second = adapted("llama"), adapted("llama")
    assert rw.optimize_for_training(first).ropes == rw.optimize_for_training(second).ropes == 1
    ids = torch.arange(3, 13)[None]
    expected = second(input_ids=ids, labels=ids).loss
    restore(first)
    torch.testing.assert_close(second(input_ids=ids, labels=ids).loss, expected)


def test_autocast_to_the_models_own_dtype_leaves_the_operators_on() -> None:
    model = adapted("llama", torch.bfloat16)
    rw.optimize_for_training(model)
    saved: list[int] = []
    for enabled in (False, True):
        kept: list[Tensor] = []
        with (
            torch.autograd.graph.saved_tensors_hooks(
                lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda x: x
            ),
            torch.autocast("cpu", torch.bfloat16, enabled=enabled),
        ):
            model(**batch()).loss.backward()
        saved.append(len(kept))
    assert saved[0] == saved[1]


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_parts_are_found_where_they_are(name: str) -> None:
    done = rw.optimize_for_training(adapted(name))
    # q, k, v and gate, up in both layers.
    assert done.shared_inputs == 4
    assert done.mlps == 2
    assert done.norms >= 5
    assert done.ropes == 1


@pytest.mark.parametrize("config", [{"target_modules": ["lm_head", "q_proj"]}, {"modules_to_save": ["lm_head"]}])
def test_heads_that_adapt_or_train(config: dict[str, Any]) -> None:
    model, inputs = adapted("llama", **config), batch()
    expected = loss_and_grads(model, inputs)
    rw.optimize_for_training(model)
    assert_same(loss_and_grads(model, inputs), expected)


def test_full_fine_tuning() -> None:
    model, inputs = tiny_llama().train(), batch()
    expected = [g.clone() for g in torch.autograd.grad(model(**inputs).loss, list(model.parameters()))]
    rw.optimize_for_training(model)
    found = torch.autograd.grad(model(**inputs).loss, list(model.parameters()))
    for grad, grad0 in zip(found, expected):
        torch.testing.assert_close(grad, grad0, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
def test_four_bit_base(targets: str | list[str], use_dora: bool) -> None:
    model, inputs = tiny_llama().train(), batch()
    rw.quantize(model, rw.Nf4Config(block_size=32, double_quant=True))
    rw.add_adapter(model, rw.LoraConfig(r=4, target_modules=targets, use_dora=use_dora, init_lora_weights=False))
    expected = loss_and_grads(model, inputs)
    # Also where all of an MLP is 4-bit, so that none of its parameters is a floating number.
    assert rw.optimize_for_training(model).mlps == 2
    assert_same(loss_and_grads(model, inputs), expected)


def test_gradient_checkpointing_with_dropout_repeats_its_masks() -> None:
    model, inputs = adapted("llama", lora_dropout=0.3), batch()
    rw.optimize_for_training(model)
    torch.manual_seed(5)
    expected = loss_and_grads(model, inputs)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    torch.manual_seed(5)
    assert_same(loss_and_grads(model, inputs), expected)


def test_20_steps_stay_within_1e_5_of_the_plain_ones() -> None:
    # B starts at zero, as it does in training: a random B makes AdamW's first steps hang on rounding.
    plain = adapted("llama", use_dora=True, init_lora_weights=True)
    fast = copy.deepcopy(plain)
    rw.optimize_for_training(fast)
    losses = []
    for model in (plain, fast):
        optimizer = torch.optim.AdamW(rw.adapter_parameters(model).values(), lr=1e-3)
        torch.manual_seed(0)
        run = []
        for _ in range(20):
            ids = torch.randint(3, 97, (2, 10))
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_logits_are_never_whole() -> None:
    model = adapted("llama")
    rw.optimize_for_training(model)
    output = model(**batch())
    assert output.logits is None
    # Without labels a model answers as ever.
    assert model(input_ids=batch()["input_ids"]).logits.shape == (3, 12, 97)
    with torch.no_grad():
        measured = model(**batch())
    assert measured.logits.shape == (3, 12, 97)
    torch.testing.assert_close(measured.loss, output.loss)


def test_a_batch_without_labels_has_loss_zero_and_gradients() -> None:
    model, inputs = adapted("llama"), batch()
    rw.optimize_for_training(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    loss, grads = loss_and_grads(model, inputs)
    assert loss == 0
    assert not any(grad.any() for grad in grads.values())


def test_the_model_stays_what_it_was(tmp_path: Any) -> None:
    model = adapted("llama")
    keys = set(model.state_dict())
    rw.optimize_for_training(model)
    assert type(model) is LlamaForCausalLM
    assert set(model.state_dict()) == keys
    rw.merge_adapter(model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert again.config._attn_implementation == "sdpa"
    ids = batch()["input_ids"]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def test_switching_and_disabling_adapters() -> None:
    model, inputs = adapted("llama"), batch()
    rw.optimize_for_training(model)
    first = model(**inputs).loss.item()
    rw.add_adapter(model, rw.LoraConfig(r=2, use_dora=True, init_lora_weights=False), name="other")
    other = model(**inputs).loss.item()
    restore(model)
    assert model(**inputs).loss.item() == pytest.approx(other, rel=1e-5)
    rw.optimize_for_training(model)
    rw.set_adapter(model, "default")
    assert model(**inputs).loss.item() == pytest.approx(first, rel=1e-5)
    rw.disable_adapter(model)
    assert model(**inputs).loss.item() == pytest.approx(tiny_llama()(**inputs).loss.item(), rel=1e-5)


def test_rows_laid_end_to_end_compute_as_apart() -> None:
    model = adapted("llama")
    assert flattening_obstacle(model) is None
    rw.optimize_for_training(model)
    first, second = torch.arange(3, 10)[None], torch.arange(20, 25)[None]
    together = {
        "input_ids": torch.cat([first, second], 1),
        "position_ids": torch.cat([torch.arange(7), torch.arange(5)])[None],
    }
    labels = together["input_ids"].clone()
    labels[together["position_ids"] == 0] = -100
    found = model(**together, labels=labels).loss.item()
    apart = [model(input_ids=ids, labels=ids).loss.item() * (ids.shape[1] - 1) for ids in (first, second)]
    assert found == pytest.approx(sum(apart) / 10, rel=1e-5)


@needs_avx2
def test_full_fine_tuning_under_autocast_takes_our_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rotary positions leave q and k in float32 beside a bfloat16 v; sdpa would need the mask of all rows together."""
    calls = []
    monkeypatch.setattr(kernel, "attention", lambda q, k, v, *_, **__: calls.append((q.dtype, k.dtype, v.dtype)) or q)
    q, k, v = (torch.randn(1, 2, 5, 16, dtype=dtype) for dtype in (torch.float32, torch.float32, torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        own_attention(torch.nn.Module(), q, k, v, None)
    assert calls == [(torch.bfloat16,) * 3]


def test_masks_become_ranges_only_where_they_are() -> None:
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    packed = torch.block_diag(causal, causal).bool()[None, None]
    ranges = mask_ranges(packed)
    assert ranges is not None
    assert ranges.start.tolist() == [[0, 0, 0, 0, 4, 4, 4, 4]]
    assert ranges.end.tolist() == [[1, 2, 3, 4, 5, 6, 7, 8]]
    torn = packed.clone()
    torn[0, 0, 3, 1] = False
    assert mask_ranges(torn) is None
    nothing = torch.zeros(1, 1, 2, 2, dtype=torch.bool)
    ranges = mask_ranges(nothing)
    assert ranges is not None
    assert ranges.start.tolist() == ranges.end.tolist()


def test_looking_for_ranges_takes_no_more_than_the_mask() -> None:
    causal = torch.ones(1, 1, 4100, 4100, dtype=torch.bool).tril_()
    with StorageTracker() as tracker:
        tracker.enter("forward")
        ranges = mask_ranges(causal)
    assert ranges is not None
    assert ranges.start.eq(0).all()
    assert torch.equal(ranges.end, torch.arange(1, 4101)[None])
    # The mask itself among it.
    assert sum(tracker.peaks()["forward", -1, 0].values()) < 2 * causal.nbytes


@at_every_level
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_bfloat16_is_as_close_to_float32_as_before(name: str) -> None:
    model, inputs = adapted(name, torch.bfloat16, init_lora_weights=True), batch()
    exact = loss_and_grads(copy.deepcopy(model).float(), inputs)
    plain = loss_and_grads(model, inputs)
    rw.optimize_for_training(model)
    fast = loss_and_grads(model, inputs)

    assert error(fast, exact) <= 1.2 * error(plain, exact)
    assert abs(fast[0] - exact[0]) <= abs(plain[0] - exact[0]) + torch.finfo(torch.bfloat16).eps / 4 * exact[0]


@needs_avx2
@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize(("name", "target", "frozen"), [("llama", "q_proj", 13), ("gpt2", "c_attn", 7)])
def test_frozen_layers_without_an_adapter_are_as_close_to_float32(name: str, target: str, frozen: int) -> None:
    model, inputs = adapted(name, torch.bfloat16, target_modules=[target]), batch()
    exact, plain = loss_and_grads(copy.deepcopy(model).float(), inputs), loss_and_grads(model, inputs)
    done = rw.optimize_for_training(model)
    assert done.linears >= frozen
    assert error(loss_and_grads(model, inputs), exact) <= 1.2 * error(plain, exact)
    restore(model)
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert loss_and_grads(model, inputs)[0] == pytest.approx(plain[0], rel=1e-4)


@needs_avx2
@pytest.mark.usefixtures("avx2")
@pytest.mark.parametrize(("name", "found"), [("llama", 15), ("gpt2", 9)])
def test_frozen_models_take_native_products(name: str, found: int) -> None:
    """All linear layers and the head, for one token and for many."""
    model = family(name, torch.bfloat16).eval()
    ids = batch()["input_ids"]
    with torch.no_grad():
        exact = copy.deepcopy(model).float()(ids).logits
        plain = model(ids).logits
        assert use_native_products(model) == 0, "its weights are not frozen"
        assert use_native_products(model.requires_grad_(False)) == found
        errors = [float((logits.float() - exact).norm()) for logits in (model(ids).logits, plain)]
        assert errors[0] <= 1.2 * errors[1]
        one = model(ids[:1, :1]).logits
        assert (one.float() - exact[:1, :1]).norm() <= 1.2 * errors[1]


def test_the_head_is_found_and_forgotten() -> None:
    model = adapted("llama")
    assert fused_head(model) is None
    rw.optimize_for_training(model)
    assert fused_head(model) is not None
    restore(model)
    assert fused_head(model) is None


@pytest.mark.parametrize(("name", "given_back"), [("llama", {"q_proj", "k_proj"}), ("qwen3", set())])
def test_dora_keeps_no_output_that_rotary_positions_give_back(name: str, given_back: set[str]) -> None:
    """Between Qwen 3's projections and its rotary positions are norms, which keep the outputs themselves."""
    model = adapted(name, use_dora=True)

    def coming_back(model: Any) -> set[str]:
        modules = {path: module for path, module in model.named_modules() if getattr(module, "comes_back", False)}
        return {path.split(".adapters.")[0].rpartition(".")[2] for path in modules}

    rw.optimize_for_training(model)
    assert coming_back(model) == given_back
    copied = copy.deepcopy(model)
    for one in (copied, model):
        restore(one)
        assert coming_back(one) == set()


def test_rotary_positions_are_not_said_to_be_fused_where_no_kernel_runs() -> None:
    rw.ops.set_implementation("reference")
    try:
        done = rw.optimize_for_training(adapted("llama"))
    finally:
        rw.ops.set_implementation("auto")
    assert (done.norms, done.mlps, done.ropes) == (0, 0, 0)

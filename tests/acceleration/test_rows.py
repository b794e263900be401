"""Rows laid end to end by their bounds, and right padding without a mask, compute what the model's own masks give."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from families import MAKERS, family
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen
from torch.utils._python_dispatch import TorchDispatchMode

import rankwise as rw
from marks import at_some_level, needs_avx2
from rankwise.acceleration import attention, restore
from rankwise.acceleration.attention import probe_batch, replace_masks
from rankwise.acceleration.parts import Undo
from rankwise.ops import selection
from tables import thinned

# Longer than the sliding window of any of these models.
LENGTHS = (13, 1, 20)
WITH_BOUNDS = sorted(set(MAKERS) - {"gpt2"})


class LargestMask(TorchDispatchMode):
    """The most elements of a boolean tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype == torch.bool:
            self.elements = max(self.elements, result.numel())
        return result


def ours(model: Any, *, bounds: bool = True) -> bool:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return replace_masks(model, Undo(), bounds=bounds)


def by_segments(q: Tensor, k: Tensor, v: Tensor, cu: Tensor, _: Tensor, most: int, __: int, **options: Any) -> Tensor:
    """What torch's variable-length attention computes on a card, row by row: (T, H, D)."""
    (left, right), repeat = options["window_size"], q.shape[1] // k.shape[1]
    assert right == 0
    assert most == max(cu.diff().tolist())
    assert options["enable_gqa"] == (repeat > 1)
    parts = []
    for start, end in zip(cu.tolist(), cu.tolist()[1:]):
        seen = torch.ones(end - start, end - start, dtype=torch.bool).tril()
        seen = seen if left < 0 else seen.triu(-left)
        one, keys, values = (x[start:end].transpose(0, 1) for x in (q, k, v))
        keys, values = (x.repeat_interleave(repeat, 0) for x in (keys, values))
        parts.append(F.scaled_dot_product_attention(one, keys, values, seen, scale=options["scale"]).transpose(0, 1))
    return torch.cat(parts)


@at_some_level
@pytest.mark.parametrize("name", WITH_BOUNDS)
def test_bounds_mean_what_masks_mean(name: str) -> None:
    given = probe_batch(LENGTHS, torch.device("cpu"))
    wanted = family(name).eval()(**given).logits
    model = family(name).eval()
    assert ours(model)
    with attention.noting() as calls:
        assert torch.allclose(model(**given).logits, wanted, atol=1e-5)
    assert [call.by_bounds for call in calls] == [True, True]


@pytest.mark.parametrize("name", WITH_BOUNDS)
def test_a_card_gets_bounds_in_its_flash_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = probe_batch(LENGTHS, torch.device("cpu"))
    wanted = family(name).eval()(**given).logits
    model = family(name).eval()
    assert ours(model)
    called = []
    monkeypatch.setattr(attention, "takes_flash", lambda *_: True)
    monkeypatch.setattr(varlen, "varlen_attn", lambda *args, **kw: called.append(kw) or by_segments(*args, **kw))
    assert torch.allclose(model(**given).logits, wanted, atol=1e-5)
    assert len(called) == 2


def gradients(model: Any, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Of the loss over real tokens."""
    model.zero_grad()
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
    F.cross_entropy(logits.transpose(1, 2), ids[:, 1:].masked_fill(mask[:, 1:] == 0, -100)).backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("name", sorted(MAKERS))
def test_right_padding_needs_no_mask_on_a_card(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(3, 3 + 2 * 20).view(2, 20)
    mask = (torch.arange(20) < torch.tensor([20, 11])[:, None]).long()
    plain = family(name).eval()
    wanted, wanted_grads = plain(input_ids=ids, attention_mask=mask).logits, gradients(plain, ids, mask)
    model = family(name).eval()
    monkeypatch.setattr(attention, "is_on_card", lambda _: True)
    assert replace_masks(model, Undo(), bounds=False) == (name != "gpt2" or model._supports_flash_attn)
    with LargestMask() as seen:
        found = model(input_ids=ids, attention_mask=mask).logits
    assert seen.elements < 2 * 20 * 20 or name == "gemma2"
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-5)
    grads = gradients(model, ids, mask)
    assert grads.keys() == wanted_grads.keys()
    assert all(torch.allclose(grads[key], wanted_grads[key], atol=1e-5) for key in grads)
    # Padding on the left, and inference, keep the mask.
    with LargestMask() as seen:
        model(input_ids=ids, attention_mask=mask.flip(1))
    assert seen.elements >= 2 * 20 * 20
    with torch.no_grad(), LargestMask() as seen:
        model(input_ids=ids, attention_mask=mask)
    assert seen.elements >= 2 * 20 * 20


@needs_avx2
def test_no_mask_of_all_pairs_is_made() -> None:
    given = probe_batch(LENGTHS, torch.device("cpu"))
    model = family("qwen3", torch.bfloat16)
    with LargestMask() as seen:
        model(**given)
    assert seen.elements >= sum(LENGTHS) ** 2
    assert rw.optimize_for_training(model).attention
    with LargestMask() as seen:
        model(**given)
    assert seen.elements < sum(LENGTHS) ** 2


def test_layers_that_do_not_name_their_window_keep_the_masks() -> None:
    model = family("gemma2").eval()
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    assert not ours(model)


def test_models_without_the_promise_keep_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama").eval()
    monkeypatch.setattr(type(model), "_supports_flash_attn", False)
    assert not ours(model)
    assert "forward" not in model.model.__dict__


def test_each_family_keeps_its_own_signature() -> None:
    first, second = family("llama"), family("mixtral")
    assert ours(first)
    assert ours(second)
    for model in (first, second):
        assert inspect.signature(model.model.forward) == inspect.signature(type(model.model)(model.config).forward)


def test_restore_takes_the_bounds_out() -> None:
    model = family("llama", torch.bfloat16)
    rw.optimize_for_training(model)
    restore(model)
    assert "forward" not in model.model.__dict__


@pytest.mark.parametrize(
    ("dtype", "capability", "width", "said"),
    [
        (torch.float32, (9, 0), 64, "16-bit"),
        (torch.bfloat16, (7, 5), 64, "compute capability 8.0, and this GPU has 7.5"),
        (torch.bfloat16, (9, 0), 320, "have 320"),
        (torch.float16, (9, 0), 60, "have 60"),
    ],
)
def test_what_flash_attention_does_not_take(dtype: torch.dtype, capability: Any, width: int, said: str) -> None:
    found = attention._card_obstacle(dtype, capability, width)
    assert found is not None
    assert said in found
    assert attention._card_obstacle(torch.bfloat16, (8, 0), 128) is None


def test_fake_tensors_stand_on_a_card_only_inside() -> None:
    plain = torch.zeros(2)
    with selection.fakes_as("cuda"):
        assert not selection.is_on_card(plain)


@thinned({"name": WITH_BOUNDS, "flash": [True, False]})
def test_a_padded_batch_on_a_card_is_rows_of_one_length(
    name: str, flash: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(3, 3 + 2 * 20).view(2, 20)
    mask = (torch.arange(20) < torch.tensor([20, 11])[:, None]).long()
    wanted = family(name).eval()(input_ids=ids, attention_mask=mask).logits
    model = family(name).eval()
    assert ours(model)
    monkeypatch.setattr(attention, "is_on_card", lambda _: True)
    monkeypatch.setattr(attention, "takes_flash", lambda *_: flash)
    monkeypatch.setattr(varlen, "varlen_attn", by_segments)
    with attention.noting() as calls:
        found = model(input_ids=ids, attention_mask=mask).logits
    assert all(call.by_bounds for call in calls)
    assert torch.allclose(found[mask.bool()], wanted[mask.bool()], atol=1e-5)
    grads, wanted_grads = gradients(model, ids, mask), gradients(family(name).eval(), ids, mask)
    assert all(torch.allclose(grads[key], wanted_grads[key], atol=1e-5) for key in wanted_grads)

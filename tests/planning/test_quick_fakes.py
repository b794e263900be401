"""What fake tensors are given without the fake mode's bookkeeping is what it would give."""

from __future__ import annotations

import pytest
import torch
from planning_models import skeleton
from torch._subclasses.fake_tensor import FakeTensorMode

from rankwise.planning import Workload
from rankwise.planning.dry_run import trace
from rankwise.planning.quick_fakes import QuickFakes

SMALL = {"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2}


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize(
    ("family", "method"),
    [("llama", "qdora"), ("qwen3", "dora"), ("gpt2", "full"), ("mixtral", "qlora"), ("phi3", "lora")],
)
def test_steps_hold_the_same(family, method, device, monkeypatch):
    workload = Workload(batch_size=2, max_length=300, device_type=device, lora_dropout=0.1, gradient_checkpointing=True)
    quick = trace(skeleton(family, **SMALL), method, workload)
    monkeypatch.setattr(QuickFakes, "__call__", lambda *_: NotImplemented)
    plain = trace(skeleton(family, **SMALL), method, workload)
    assert quick.breakdown == plain.breakdown


# On a card AdamW copies nothing; RMSprop does.
@pytest.mark.parametrize(
    ("family", "method", "optimizer"),
    [("llama", "full", "adamw_torch"), ("gpt2", "full", "rmsprop"), ("llama", "dora", "rmsprop")],
)
def test_so_they_are_where_the_optimizer_holds_most(family, method, optimizer, monkeypatch):
    workload = Workload(batch_size=1, max_length=16, device_type="cuda", r=256, optimizer=optimizer)
    quick = trace(skeleton(family, **SMALL), method, workload)
    monkeypatch.setattr(QuickFakes, "__call__", lambda *_: NotImplemented)
    plain = trace(skeleton(family, **SMALL), method, workload)
    assert quick.phase == "optimizer"
    assert (quick.phase, quick.breakdown) == (plain.phase, plain.breakdown)


def test_results_are_remembered_with_their_numbers_kinds():
    """1 and 1.0 are equal; added to whole numbers they make int64 and float32."""
    quick, add = QuickFakes(), torch.ops.aten.add.Tensor
    with FakeTensorMode():
        whole = torch.ones(3, dtype=torch.int64)
        for _ in range(2):
            assert [quick(add, (whole, number), {}).dtype for number in (1, 1.0)] == [torch.int64, torch.float32]


def test_storages_are_shared_where_views_are():
    quick, aten = QuickFakes(), torch.ops.aten
    with FakeTensorMode():
        x = torch.ones(4, 6)
        for func, *others in [(aten.view.default, [24]), (aten._unsafe_view.default, [6, 4]), (aten.mul_.Tensor, x)]:
            made = quick(func, (x, *others), {})
            assert made.untyped_storage()._cdata == x.untyped_storage()._cdata
        for _ in range(2):
            made = quick(aten.mul.Tensor, (x, x), {})
            assert made.shape == x.shape
            assert made.untyped_storage()._cdata != x.untyped_storage()._cdata


def test_what_has_values_or_another_device_is_left_to_the_mode():
    quick, aten = QuickFakes(), torch.ops.aten
    real = torch.ones(2)
    assert quick(aten.mul.Tensor, (real, real), {}) is NotImplemented
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake = torch.ones(2)
        assert quick(aten.mul.Tensor, (fake, real), {}) is NotImplemented
        assert quick(aten.softmax.int, (fake, 0), {}) is NotImplemented

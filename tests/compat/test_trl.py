"""Canaries of ``compat.trl``."""

from __future__ import annotations

import inspect

import pytest
import torch
from trl.models.activation_offloading import get_act_offloading_ctx_manager
from trl.trainer import dpo_trainer, kto_trainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.sft_trainer import SFTTrainer

import rankwise as rw
from rankwise.acceleration import fused_head
from rankwise.compat.torch import hooks_around
from rankwise.compat.trl import heads_by, metrics_of
from rankwise.compat.trl_hooks import bars_offloading
from tiny_models import tiny_llama


def test_metrics_of_both_modes_are_lists_that_are_logged(tiny_trainer):
    metrics_of(tiny_trainer, "train")["entropy"].append(1.0)
    metrics_of(tiny_trainer, "train")["entropy"].append(3.0)
    assert metrics_of(tiny_trainer, "eval")["mean_token_accuracy"] == []
    tiny_trainer.model.train()
    tiny_trainer.log(logs := {"loss": 1.0})
    assert logs.get("entropy", tiny_trainer.state.log_history[-1].get("entropy")) == 2.0
    assert not metrics_of(tiny_trainer, "train")


def test_the_loss_of_SFTTrainer_takes_what_ours_hands_on():
    names = list(inspect.signature(SFTTrainer.compute_loss).parameters)
    assert names == ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]


@pytest.mark.parametrize(("kind", "module"), [(DPOTrainer, dpo_trainer), (KTOTrainer, kto_trainer)])
def test_trainers_of_preferences_give_heads_by_a_function_that_can_be_replaced(kind, module):
    before, given = module.add_fused_lm_head, []
    with heads_by(kind, given.append):
        module.add_fused_lm_head("a model")
    assert given == ["a model"]
    assert module.add_fused_lm_head is before
    # They read both models' answers from these, and the reference's from the batch where it was computed before.
    source = inspect.getsource(kind)
    assert "fused_lm_head=True" in source
    assert 'inputs["ref_chosen_logps"]' in source or 'batch["ref_logps"]' in source


@pytest.mark.usefixtures("cpu_as_accelerator")
def test_offloading_puts_hooks_on_the_head_that_our_loss_lives_with():
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(r=4))
    rw.optimize_for_training(model)
    ids = torch.arange(12).view(2, 6)
    before = model(input_ids=ids, labels=ids).loss
    offloading = get_act_offloading_ctx_manager(model, use_pin_memory=False)
    hooks = [hook for kind in hooks_around(model.lm_head) for hook in kind.values()]
    assert len(hooks) == 2
    assert all(map(bars_offloading, hooks))
    assert fused_head(model) is not None
    with offloading:
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
    assert output.logits is None
    assert torch.equal(output.loss, before)
    model.lm_head.register_forward_hook(lambda *_: None)
    assert fused_head(model) is None

"""Canaries of ``compat.trl``."""

from __future__ import annotations

import inspect

from trl.trainer.sft_trainer import SFTTrainer

from rankwise.compat.trl import metrics_of


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

"""The last 6 steps from a checkpoint, and after a stop: the same bits as 12 straight steps, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training_rows import StopAfter, fit

from marks import at_some_level
from rankwise.adapters import adapter_parameters, has_adapter
from rankwise.lora_config import LoraConfig
from rankwise.records import read_metrics
from rankwise.training.checkpoints import list_checkpoints

pytestmark = at_some_level

# Four rows a step: of 19 rows an epoch has five steps, so that the checkpoint lies in the second one.
SHORT = {"max_steps": 12, "save_steps": 6, "rows": 19}
PLAIN = "mid-epoch, dropout, accumulation, warm-up, linear"
CASES: dict[str, dict[str, Any]] = {
    PLAIN: {},
    "dora": {"lora": LoraConfig(r=4, use_dora=True, lora_dropout=0.1)},
    "at the end of an epoch": {"rows": 24},
    "adafactor, constant": {"optimizer": "adafactor", "lr_scheduler_type": "constant", "warmup_steps": 0},
    "patterns, biases, trained whole": {
        "lora": LoraConfig(r=4, rank_pattern={"q_proj": 2}, modules_to_save=["lm_head"], lora_dropout=0.1)
    },
    "evaluations between": {"eval_rows": 5, "eval_steps": 4},
    "packing": {"packing": True, "rows": 72},
    "for a merged file, checkpointed": {"lora": LoraConfig(r=4, for_merge="nf4"), "gradient_checkpointing": True},
    "full, bf16": {"lora": None, "learning_rate": 1e-3, "autocast": torch.bfloat16},
}


def weights(model: Any) -> dict[str, torch.Tensor]:
    named = adapter_parameters(model) if has_adapter(model) else dict(model.named_parameters())
    return {name: value.detach().clone() for name, value in named.items()}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_resumed_run_is_bit_identical(case: str, tmp_path: Path, loop_of: Any) -> None:
    given = SHORT | CASES[case]
    straight = loop_of(tmp_path / "straight", **given)
    before = weights(straight.model)
    fit(straight)
    stopped = tmp_path / "straight"
    if case == PLAIN or "eval_rows" in given:
        stopped = tmp_path / "stopped"
        first = loop_of(stopped, **given)
        fit(first, interrupt=StopAfter(first.progress, 6))
    checkpoint = next(found for found in list_checkpoints(stopped) if found.step == 6)
    second = fit(loop_of(tmp_path / "resumed", **given, resumed=checkpoint), checkpoint)

    expected, found = weights(straight.model), weights(second.model)
    assert second.progress.steps == 12
    assert any(not torch.equal(expected[name], before[name]) for name in expected)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_evaluations_do_not_change_the_training(tmp_path: Path, loop_of: Any) -> None:
    plain = fit(loop_of(tmp_path / "plain"))
    watched = fit(loop_of(tmp_path / "watched", eval_rows=5, eval_steps=3))
    expected, found = weights(plain.model), weights(watched.model)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_resuming_the_last_step_trains_no_further(tmp_path: Path, loop_of: Any) -> None:
    fit(loop_of(tmp_path / "run"))
    last = list_checkpoints(tmp_path / "run")[-1]
    assert fit(loop_of(tmp_path / "run", resumed=last), last).progress.steps == 20


def test_resumed_cadence_is_that_of_the_new_settings(tmp_path: Path, loop_of: Any) -> None:
    folder, given = tmp_path / "run", {"lr_scheduler_type": "constant", "warmup_steps": 0}
    folder.mkdir()
    fit(loop_of(folder, max_steps=10, **given), folder=folder)
    last = list_checkpoints(folder)[-1]
    again = loop_of(folder, max_steps=16, save_steps=3, logging_steps=2, resumed=last, **given)
    fit(again, last, folder=folder)
    assert [item.step for item in list_checkpoints(folder)] == [15, 16]
    assert [line["step"] for line in read_metrics(folder)] == [1, 5, 10, 12, 14, 16]

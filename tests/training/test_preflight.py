"""Each check fails on what it is there for, with a remedy, and passes on what is sound."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rankwise.adapters import adapter_parameters, add_adapter
from rankwise.adapters.lora import KEY as TOKENS
from rankwise.errors import DataError, RankwiseWarning, RunError
from rankwise.lora_config import LoraConfig
from rankwise.training.checkpoints import check_space
from rankwise.training.setup import check_labels
from rankwise.training.watch import GradientCheck
from tiny_models import tiny_llama, tiny_moe


def checked(kind: str = "prompt", **changed: int) -> None:
    report = SimpleNamespace(**{"tokens": 100, "trained_tokens": 40, "stop_token_rows": 8, **changed})
    data: Any = SimpleNamespace(
        train=SimpleNamespace(report=report),
        texts=SimpleNamespace(rows=SimpleNamespace(kind=kind, source="rows.jsonl")),
    )
    check_labels(data)


def test_sound_labels_pass() -> None:
    checked()


def test_masked_labels_and_missing_stop_tokens_are_refused() -> None:
    with pytest.raises(RunError, match=r"none of the 100 label tokens in rows.jsonl.*--max-length") as caught:
        checked(trained_tokens=0)
    assert caught.value.code == "RW521"
    with pytest.raises(DataError, match="stop token") as caught:
        checked(stop_token_rows=0)
    assert caught.value.code == "RW213"
    with pytest.warns(RankwiseWarning, match="stop token"):
        checked("text", stop_token_rows=0)


def test_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check_space(tmp_path / "not" / "there", 1000)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(RunError, match="--save-total-limit") as caught:
        check_space(tmp_path, 1000)
    assert caught.value.code == "RW513"


def backward(model: Any) -> None:
    model.zero_grad()
    ids = torch.tensor([[1, 5, 6, 7, 8, 2]])
    model(input_ids=ids, labels=ids).loss.backward()


@pytest.mark.parametrize("use_dora", [False, True])
def test_gradient_check_waits_for_a_until_b_has_moved(use_dora: bool) -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=4, use_dora=use_dora))
    check = GradientCheck(model)
    backward(model)
    check.look(1)
    assert {key.rpartition(".lora_")[2] for key in check.waiting} == {"A.weight"}
    # Warm-up: the first learning rate is 0, so B is still zero at step 2.
    backward(model)
    check.look(2)
    assert check.waiting
    optimizer = torch.optim.AdamW([value for value in model.parameters() if value.requires_grad], lr=1e-2)
    optimizer.step()
    backward(model)
    check.look(3)
    assert not check.waiting


def test_adapter_without_gradient_is_named() -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=4))
    check = GradientCheck(model)
    backward(model)
    lost = next(key for key in check.parameters if "layers.1.mlp.up_proj.lora_B" in key)
    check.parameters[lost].grad = None
    with pytest.raises(RunError, match=r"1 of 28 adapter tensors.*layers\.1\.mlp\.up_proj\.lora_B") as caught:
        check.look(1)
    assert caught.value.code == "RW523"


def test_a_without_gradient_after_b_moved_is_named() -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=4, init_lora_weights=False))
    check = GradientCheck(model)
    backward(model)
    lost = next(key for key in check.parameters if "layers.0.self_attn.q_proj.lora_A" in key)
    check.parameters[lost].grad = torch.zeros_like(check.parameters[lost])
    with pytest.raises(RunError, match=r"q_proj\.lora_A"):
        check.look(1)


@pytest.mark.parametrize(
    ("make", "settings", "part"),
    [
        (tiny_llama, {"trainable_token_indices": [90]}, TOKENS),
        (tiny_llama, {"target_modules": ["embed_tokens"]}, "lora_embedding_B"),
        (lambda: tiny_moe("mixtral"), {"target_parameters": ["mlp.experts.down_proj"]}, ".experts."),
    ],
    ids=["tokens", "embedding", "experts"],
)
def test_what_a_batch_need_not_reach_may_wait(make: Any, settings: dict[str, Any], part: str) -> None:
    model = make()
    add_adapter(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj"], "init_lora_weights": False, **settings}))
    check = GradientCheck(model)
    backward(model)
    unreached = [key for key in check.parameters if part in key]
    for key in unreached:
        check.parameters[key].grad = torch.zeros_like(check.parameters[key])
    check.look(1)
    assert list(check.waiting) == unreached != []


def test_overflow_waits_only_with_loss_scaling() -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=4))
    backward(model)
    next(iter(adapter_parameters(model).values())).grad[0, 0] = float("inf")  # type: ignore[index]
    scaled = GradientCheck(model, overflow_is_normal=True)
    scaled.look(1)
    assert scaled.waiting
    with pytest.raises(RunError, match="not finite"):
        GradientCheck(model).look(1)

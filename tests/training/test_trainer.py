"""The loss is right for every head and every batching; nothing is sent, printed or pickled."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_rows import encoded_rows

from rankwise.acceleration import optimize_for_training, restore
from rankwise.adapters import add_adapter
from rankwise.errors import RankwiseWarning, RunError
from rankwise.lora_config import LoraConfig
from rankwise.training.loss import fused_head_is_right, keeps_positions, loss_from_logits
from rankwise.training.state import random_states
from rankwise.training.trainer import RankwiseTrainer
from tiny_models import tiny_llama, tiny_moe

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def stirred(model: Any) -> Any:
    """Adapters away from their zero start, so that leaving one out changes the loss."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def mean_loss(model: Any, rows: Any, smoothing: float = 0.0) -> float:
    """Mean over all trained tokens of all rows, one row at a time: no padding, no batches."""
    model.eval()
    total, count = 0.0, 0
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model(ids).logits[0, :-1]
        total += F.cross_entropy(
            logits, labels[1:], ignore_index=-100, reduction="sum", label_smoothing=smoothing
        ).item()
        count += int((labels[1:] != -100).sum())
    return total / count


HEADS = {
    "untouched": LoraConfig(r=4),
    "adapted": LoraConfig(r=4, target_modules=["q_proj", "lm_head"]),
    "adapted, dora": LoraConfig(r=4, target_modules=["q_proj", "lm_head"], use_dora=True),
    "trained whole": LoraConfig(r=4, modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
def test_evaluation_loss_is_the_mean_over_tokens(head: str, make_trainer: Any) -> None:
    trainer = make_trainer(lora=HEADS[head], eval_rows=7, batch_size=3)
    stirred(trainer.model)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(mean_loss(trainer.model, encoded_rows(7, seed=9)), rel=1e-6)


def test_batches_are_scored_as_their_rows_are(make_trainer: Any) -> None:
    """Of unequal lengths, after steps on the same rows, so that some tokens are hit."""
    given = {"rows": 7, "batch_size": 3, "gradient_accumulation": 1, "max_steps": 12, "learning_rate": 0.1}
    trainer = make_trainer(**given)
    trainer.train()
    rows = trainer.evaluate(encoded_rows(7))
    trainer.evaluates_batches = True
    batches = trainer.evaluate(encoded_rows(7))
    for name in ("eval_loss", "eval_mean_token_accuracy"):
        assert batches[name] == pytest.approx(rows[name], rel=1e-5)
    assert 0 < rows["eval_mean_token_accuracy"] < 1


# Rows per batch and batches per step, of the same eight rows.
BATCHINGS = ((8, 1), (2, 4))
ONE_STEP = {
    "max_steps": 1,
    "max_grad_norm": 0.0,
    "warmup_steps": 0,
    "optimizer": "sgd",
    "learning_rate": 1.0,
    "rows": 8,
}


def step_of(trainer: Any) -> dict[str, torch.Tensor]:
    """The gradients of its only step, which SGD takes at a learning rate of 1."""
    model = stirred(trainer.model)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    trainer.train()
    return {name: value - model.get_parameter(name) for name, value in before.items()}


def assert_same_step(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
def test_accumulated_step_has_the_gradients_of_one_big_batch(
    head: str, fast: bool, make_trainer: Any, tmp_path: Path
) -> None:
    grads = []
    for batch_size, accumulation in BATCHINGS:
        model = tiny_llama()
        add_adapter(model, HEADS[head])
        if fast:
            optimize_for_training(model)
        given = {"model": model, "lora": None, "batch_size": batch_size, "gradient_accumulation": accumulation}
        trainer = make_trainer(tmp_path / str(batch_size), **given, **ONE_STEP)
        assert trainer.own_loss == fast
        grads.append(step_of(trainer))
    assert any(".lm_head" in f".{name}" for name in grads[0]) == (head != "untouched")
    assert_same_step(*grads)


@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_of_the_routers_is_a_mean_over_accumulated_batches(
    fast: bool, make_trainer: Any, tmp_path: Path
) -> None:
    """Eight equal rows: each batch has the routers' loss of all."""
    grads = []
    for batch_size, accumulation in BATCHINGS:
        # So large that four times its gradient is another step.
        model = tiny_moe("mixtral", router_aux_loss_coef=50.0)
        add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        if fast:
            optimize_for_training(model)
        given = {"model": model, "lora": None, "batch_size": batch_size, "gradient_accumulation": accumulation}
        trainer = make_trainer(tmp_path / str(batch_size), **given, **ONE_STEP)
        assert (trainer.own_loss, trainer.aux_loss_enabled) == (fast, True)
        trainer.train_dataset = trainer.train_dataset.select([0] * 8)
        grads.append(step_of(trainer))
    assert_same_step(*grads)


@pytest.mark.parametrize("head", ["untouched", "adapted", "adapted, dora"])
def test_fused_head_forced_on_reads_the_adapted_weight(head: str, make_trainer: Any) -> None:
    """trl's own loss without dropout is right for every head; in training only a plain layer is sure to be."""
    trainer = make_trainer(lora=HEADS[head], eval_rows=7)
    model = stirred(trainer.model)
    trainer.fused_head = True
    assert trainer.evaluate()["eval_loss"] == pytest.approx(mean_loss(model, encoded_rows(7, seed=9)), rel=1e-6)
    assert fused_head_is_right(model) == (head == "untouched")


def test_fused_head_is_refused_for_a_trained_copy() -> None:
    model = tiny_llama()
    add_adapter(model, HEADS["trained whole"])
    assert not fused_head_is_right(model)


def test_refusal_of_the_fused_head_is_said(make_trainer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.device", torch.device("cuda"))
    model = tiny_llama()
    monkeypatch.setattr(type(model), "to", lambda self, *_, **__: self)
    with pytest.warns(RankwiseWarning, match="bypass"):
        assert not make_trainer(model=model, lora=HEADS["adapted"]).fused_head


def test_a_hook_put_on_the_head_between_steps_is_said_and_seen(make_trainer: Any) -> None:
    model = tiny_llama()
    add_adapter(model, LoraConfig(r=4))
    optimize_for_training(model)
    trainer = make_trainer(model=model, lora=None)
    inputs = next(iter(trainer.get_train_dataloader()))
    expected = trainer.compute_loss(model, dict(inputs))
    seen: list[Any] = []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(RankwiseWarning, match="RW520"):
        loss = trainer.compute_loss(model, dict(inputs))
    assert seen
    torch.testing.assert_close(loss, expected)
    restore(model)


def test_fused_head_and_own_logits_agree() -> None:
    model = tiny_llama()
    rows = encoded_rows(3)
    ids = torch.tensor([[1, 5, 6, 7, 2]])
    labels = torch.tensor([[-100, -100, 6, 7, 2]])
    parts = loss_from_logits(model, {"input_ids": ids, "labels": labels}, None)
    assert fused_head_is_right(model)
    torch.testing.assert_close(parts.loss, model(input_ids=ids, labels=labels).loss)
    assert keeps_positions(model)
    head = []
    model.lm_head.register_forward_hook(lambda _, inputs, __: head.append(inputs[0].shape[1]))
    loss_from_logits(model, {"input_ids": ids, "labels": labels}, None)
    assert head == [3]
    assert 0 < parts.entropy <= math.log(97)
    assert len(rows) == 3


def test_label_smoothing_is_that_of_torch_in_one_forward(make_trainer: Any) -> None:
    trainer = make_trainer(trainer={"label_smoothing": 0.1}, rows=4, batch_size=4, gradient_accumulation=1)
    model = trainer.model
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(4)])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    for layer in (layer for layer in model.modules() if hasattr(layer, "dropout")):
        layer.dropout = 0.0
    loss = trainer.compute_loss(model, dict(batch)).item()
    assert len(calls) == 1
    assert loss == pytest.approx(mean_loss(model, encoded_rows(4), smoothing=0.1), rel=1e-5)


def test_label_smoothing_is_not_in_the_loss_of_an_evaluation(make_trainer: Any) -> None:
    trainer = make_trainer(trainer={"label_smoothing": 0.3}, eval_rows=4, lora=LoraConfig(r=4))
    model = stirred(trainer.model)
    expected = mean_loss(model, encoded_rows(4, seed=9))
    assert mean_loss(model, encoded_rows(4, seed=9), smoothing=0.3) > expected * 1.001
    assert trainer.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-6)
    batch = trainer.data_collator([trainer.eval_dataset[index] for index in range(4)])
    model.eval()
    assert trainer.compute_loss(model, dict(batch)).item() == pytest.approx(expected, rel=1e-6)


def test_packed_examples_do_not_see_each_other(make_trainer: Any) -> None:
    trainer = make_trainer(lora=LoraConfig(r=4), packing=True, rows=12, batch_size=1)
    stirred(trainer.model)
    rows = trainer.train_dataset
    assert len(rows) < 12
    trainer.model.eval()
    total = count = 0.0
    for row in rows:
        batch = trainer.data_collator([row])
        tokens = int((batch["labels"][:, 1:] != -100).sum())
        total += trainer.compute_loss(trainer.model, dict(batch)).item() * tokens
        count += tokens
    assert total / count == pytest.approx(mean_loss(trainer.model, encoded_rows(12)), rel=1e-5)


def test_tokens_and_examples_are_counted_without_padding(make_trainer: Any, tmp_path: Path) -> None:
    rows = encoded_rows(8)
    for packing in (False, True):
        trainer = make_trainer(
            tmp_path / str(packing), rows=8, packing=packing, max_steps=None, epochs=1.0, batch_size=2
        )
        trainer.train()
        assert trainer.progress.examples == 8
        assert trainer.progress.tokens == sum(len(row["input_ids"]) for row in rows)


def test_nothing_is_printed_sent_or_pickled(
    make_trainer: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickled or sent")

    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", refuse)
    make_trainer(tmp_path / "run", max_steps=2, save_steps=1, logging_steps=1).train()
    assert capfd.readouterr().out == ""
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "README.md" not in files
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}


def test_a_schedule_that_follows_evaluations_gets_each_of_them(make_trainer: Any) -> None:
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0}
    trainer = make_trainer(eval_rows=5, eval_steps=2, max_steps=6, **schedule)
    trainer.train()
    assert trainer.lr_scheduler.last_epoch == 3


def test_best_evaluation_is_saved_even_between_checkpoints(make_trainer: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", eval_rows=5, eval_steps=3, save_steps=100, max_steps=12)
    trainer.train()
    assert trainer.state.best_global_step is not None
    assert (tmp_path / "run" / "checkpoints" / f"step-{trainer.state.best_global_step}").is_dir()


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("inf")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_harms(broken: str, make_trainer: Any, tmp_path: Path) -> None:
    trainer: RankwiseTrainer = make_trainer(tmp_path / "run", max_steps=2)
    real = trainer.model.model.norm.forward

    def norm(x: torch.Tensor) -> torch.Tensor:
        return real(x) * float("nan") if broken == "loss" else InfiniteGradient.apply(real(x))

    trainer.model.model.norm.forward = norm
    with pytest.raises(RunError, match=r"at step 1.*--learning-rate") as caught:
        trainer.train()
    assert caught.value.code == {"loss": "RW530", "gradient": "RW531"}[broken]
    assert all(value.isfinite().all() for value in trainer.model.parameters())


def test_scaler_state_is_json_and_comes_back(make_trainer: Any, tmp_path: Path) -> None:
    """The Trainer scales losses on CUDA only, so a CPU scaler is put in its place."""
    trainer = make_trainer(tmp_path / "run", max_steps=1)
    trainer.train()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer._write_checkpoint(tmp_path, [random_states()], weights=None, optimizer=trainer.optimizer.state_dict())
    assert (tmp_path / "scaler.json").exists()
    trainer.accelerator.scaler = torch.amp.GradScaler("cpu")
    trainer._load_scaler(str(tmp_path))
    assert trainer.accelerator.scaler.get_scale() == 1024.0


def test_adapter_alone_is_in_a_checkpoint(make_trainer: Any, tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", max_steps=1).train()
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.json",
        "optimizer.safetensors",
        "progress.json",
        "random.json",
        "random.safetensors",
        "scheduler.json",
        "trainer_state.json",
    ]

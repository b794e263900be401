"""The loss is right for every head and every batching; nothing is sent, printed or pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from training_rows import encoded_rows, evaluate, fit

from rankwise.acceleration import optimize_for_training
from rankwise.adapters import add_adapter
from rankwise.errors import RunError
from rankwise.lora_config import LoraConfig
from rankwise.training.batches import KEY
from rankwise.training.checkpoints import list_checkpoints
from rankwise.training.loop import Loop
from rankwise.training.watch import MemoryMeter, Watch
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
def test_evaluation_loss_is_the_mean_over_tokens(head: str, loop_of: Any) -> None:
    loop = loop_of(lora=HEADS[head], eval_rows=7, batch_size=3)
    stirred(loop.model)
    found = evaluate(loop)["eval_loss"]
    assert found == pytest.approx(mean_loss(loop.model, encoded_rows(7, seed=9)), rel=1e-6)


def test_batches_are_scored_as_their_rows_are(loop_of: Any) -> None:
    """Of unequal lengths, after steps on the same rows, so that some tokens are hit."""
    given = {"rows": 7, "batch_size": 3, "gradient_accumulation": 1, "max_steps": 12, "learning_rate": 0.1}
    loop = fit(loop_of(**given))
    found = evaluate(loop, encoded_rows(7))
    batch = loop.objective.collate([*encoded_rows(7)])
    loss = loop.objective.loss(loop.model, batch)
    assert found["eval_loss"] == pytest.approx(loss.sum.item() / batch[KEY].targets, rel=1e-5)
    hits, tokens = loss.figures["token_accuracy"]
    assert found["eval_token_accuracy"] == pytest.approx(float(hits / tokens), rel=1e-5)
    assert 0 < found["eval_token_accuracy"] < 1


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


def step_of(loop: Loop) -> dict[str, torch.Tensor]:
    """The gradients of its only step, which SGD takes at a learning rate of 1."""
    model = stirred(loop.model)
    before = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
    fit(loop)
    return {name: value - model.get_parameter(name) for name, value in before.items()}


def assert_same_step(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    for name, value in one.items():
        assert value.abs().max() > 0, name
        torch.testing.assert_close(value, other[name], rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")
def test_accumulated_step_has_the_gradients_of_one_big_batch(
    head: str, fast: bool, loop_of: Any, tmp_path: Path
) -> None:
    grads = []
    for batch_size, accumulation in BATCHINGS:
        model = tiny_llama()
        add_adapter(model, HEADS[head])
        if fast:
            optimize_for_training(model)
        given = {"model": model, "lora": None, "batch_size": batch_size, "gradient_accumulation": accumulation}
        loop = loop_of(tmp_path / str(batch_size), **given, **ONE_STEP)
        assert loop.objective.own_loss == fast
        grads.append(step_of(loop))
    assert any(".lm_head" in f".{name}" for name in grads[0]) == (head != "untouched")
    assert_same_step(*grads)


@pytest.mark.parametrize("fast", [False, True])
def test_the_loss_of_the_routers_is_a_mean_over_accumulated_batches(fast: bool, loop_of: Any, tmp_path: Path) -> None:
    """Eight equal rows: each batch has the routers' loss of all."""
    grads = []
    for batch_size, accumulation in BATCHINGS:
        # So large that four times its gradient is another step.
        model = tiny_moe("mixtral", router_aux_loss_coef=50.0)
        add_adapter(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        if fast:
            optimize_for_training(model)
        given = {"model": model, "lora": None, "batch_size": batch_size, "gradient_accumulation": accumulation}
        loop = loop_of(tmp_path / str(batch_size), **given, **{**ONE_STEP, "rows": encoded_rows(1).select([0] * 8)})
        assert loop.objective.own_loss == fast
        grads.append(step_of(loop))
    assert_same_step(*grads)


def test_label_smoothing_is_that_of_torch_in_one_forward(loop_of: Any) -> None:
    loop = loop_of(label_smoothing=0.1)
    model = loop.model
    batch = loop.objective.collate([*encoded_rows(4)])
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    for layer in (layer for layer in model.modules() if hasattr(layer, "dropout")):
        layer.dropout = 0.0
    loss = loop.objective.loss(model, batch).sum.item() / batch[KEY].targets
    assert len(calls) == 1
    assert loss == pytest.approx(mean_loss(model, encoded_rows(4), smoothing=0.1), rel=1e-5)


def test_label_smoothing_is_not_in_the_loss_of_an_evaluation(loop_of: Any) -> None:
    loop = loop_of(label_smoothing=0.3, eval_rows=4, lora=LoraConfig(r=4))
    model = stirred(loop.model)
    expected = mean_loss(model, encoded_rows(4, seed=9))
    assert mean_loss(model, encoded_rows(4, seed=9), smoothing=0.3) > expected * 1.001
    assert evaluate(loop)["eval_loss"] == pytest.approx(expected, rel=1e-6)


def test_packed_examples_do_not_see_each_other(loop_of: Any) -> None:
    loop = loop_of(lora=LoraConfig(r=4), packing=True, rows=12, batch_size=1)
    stirred(loop.model)
    rows = loop.objective.rows
    assert len(rows) < 12
    loop.model.eval()
    batches = [loop.objective.collate([row]) for row in rows]
    total = sum(loop.objective.loss(loop.model, batch).sum.item() for batch in batches)
    count = sum(batch[KEY].targets for batch in batches)
    assert total / count == pytest.approx(mean_loss(loop.model, encoded_rows(12)), rel=1e-5)


def test_tokens_and_examples_are_counted_without_padding(loop_of: Any, tmp_path: Path) -> None:
    rows = encoded_rows(8)
    for packing in (False, True):
        given = {"rows": 8, "packing": packing, "max_steps": None, "epochs": 1.0, "batch_size": 2}
        loop = fit(loop_of(tmp_path / str(packing), **given))
        assert loop.progress.examples == 8
        assert loop.progress.tokens == sum(len(row["input_ids"]) for row in rows)


def test_nothing_is_printed_sent_or_pickled(
    loop_of: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickled or sent")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr("socket.socket.connect", refuse)
    fit(loop_of(tmp_path / "run", max_steps=2, save_steps=1, logging_steps=1))
    assert capfd.readouterr().out == ""
    files = {path.name for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert "README.md" not in files
    assert {Path(name).suffix for name in files} == {".json", ".safetensors"}


def test_best_evaluation_is_saved_even_between_checkpoints(loop_of: Any, tmp_path: Path) -> None:
    best = fit(loop_of(tmp_path / "run", eval_rows=5, eval_steps=3, save_steps=100, max_steps=12)).progress.best_step
    assert best is not None
    assert (tmp_path / "run" / "checkpoints" / f"step-{best}").is_dir()


class InfiniteGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return grad * float("inf")


@pytest.mark.parametrize("broken", ["loss", "gradient"])
def test_what_is_not_finite_stops_the_run_before_it_harms(broken: str, loop_of: Any, tmp_path: Path) -> None:
    loop = loop_of(tmp_path / "run", max_steps=2)
    real = loop.model.model.norm.forward

    def norm(x: torch.Tensor) -> torch.Tensor:
        return real(x) * float("nan") if broken == "loss" else InfiniteGradient.apply(real(x))

    loop.model.model.norm.forward = norm
    with pytest.raises(RunError, match=r"at step 1.*--learning-rate") as caught:
        fit(loop)
    assert caught.value.code == "RW530"
    assert broken in caught.value.message
    assert all(value.isfinite().all() for value in loop.model.parameters())


def test_scaler_state_is_json_and_comes_back(loop_of: Any, tmp_path: Path) -> None:
    """Losses are scaled on CUDA only, so a CPU scaler is put in its place."""
    loop = fit(loop_of(tmp_path / "run", max_steps=1))
    loop.scaler, loop.saved = torch.amp.GradScaler("cpu", init_scale=1024.0), None
    loop.save(Watch(model=loop.model, progress=loop.progress, memory=MemoryMeter("cpu")))
    (checkpoint,) = list_checkpoints(tmp_path / "run")
    assert (checkpoint.path / "scaler.json").exists()
    loop.scaler = torch.amp.GradScaler("cpu")
    loop._load(checkpoint)
    assert loop.scaler.get_scale() == 1024.0


def test_adapter_alone_is_in_a_checkpoint(loop_of: Any, tmp_path: Path) -> None:
    fit(loop_of(tmp_path / "run", max_steps=1))
    folder = tmp_path / "run" / "checkpoints" / "step-1"
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "manifest.json",
        "optimizer.json",
        "optimizer.safetensors",
        "progress.json",
        "random-0.json",
        "random-0.safetensors",
    ]

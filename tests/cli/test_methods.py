"""A method is one row and one class: a made-up one is planned, trained, resumed, merged, exported and compared."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import rankwise as rw
from in_process import steps_in_this_process
from rankwise.adapters.base_layer import dense_weight
from rankwise.adapters.lora import KINDS, LowRankPair
from rankwise.adapters.low_rank import init_low_rank_
from rankwise.errors import AdapterError, ConfigError
from rankwise.methods import METHODS, Method, kinds, method_of
from rankwise.models import load_model
from tiny_models import tiny_gpt2, tiny_llama

VECTOR = "lora_scale_vector"


class Scaled(LowRankPair):
    """y = W x + b + s diag(v) B A drop(x), with v (out,) from 1."""

    vectors: ClassVar = {"v": VECTOR}

    def __init__(self, base: nn.Module, r: int, scaling: float, **options) -> None:
        super().__init__(base, r, scaling, **options)
        self.v = nn.Parameter(torch.empty(len(self.lora_B), device=self.lora_B.device))

    def reset_parameters(self, base: nn.Module, *, zero_b: bool = True) -> None:
        init_low_rank_(self.lora_A, self.lora_B, zero_b=zero_b)
        nn.init.ones_(self.v) if zero_b else nn.init.normal_(self.v)

    def forward(self, base: nn.Module, x: Tensor) -> Tensor:
        return torch.addcmul(base(x), self.low_rank(x), (self.scaling * self.v).to(x.dtype))

    def branch(self, base: nn.Module, x: Tensor) -> None:
        """PyTorch computes it."""

    def effective_weight(self, base: nn.Module) -> Tensor:
        W = dense_weight(base)
        return W + (self.scaling * self.v[:, None] * (self.lora_B @ self.lora_A)).to(W.dtype)

    def sum(self, base: nn.Module, W: Tensor) -> Tensor:
        return W + (self.scaling * self.v[:, None] * (self.lora_B @ self.lora_A)).detach().to(W.dtype)

    def fixed_gain(self, base: nn.Module) -> None: ...


@pytest.fixture(autouse=True, scope="module")
def _made_up() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS, "scaled", Method(name="scaled", words="Scaled LoRA", kind="scaled"))
        patch.setitem(KINDS, "scaled", Scaled)
        yield


@pytest.fixture
def train(rankwise: Callable, model_folder: Path, rows_file: Path) -> Callable[..., Path]:
    def call(folder: Path, steps: int, *more: object) -> Path:
        options = ["--method", "scaled", "--r", 2, "--max-steps", steps, "--batch-size", 2, "--learning-rate", 0.02]
        data = ["--data", rows_file, "--eval-data", rows_file, "--lr-scheduler-type", "constant", "--dtype", "float32"]
        done = rankwise("train", "--model", model_folder, *data, *options, "--output", folder, *more)
        assert done.code == 0, done.stderr
        return folder

    return call


@torch.no_grad()
def logits(folder: Path, adapter: Path | None = None) -> Tensor:
    model, _ = load_model(str(folder))
    if adapter is not None:
        rw.load_adapter(model, adapter)
    return model.eval()(input_ids=torch.arange(40, 60)[None]).logits


def test_rows_and_classes_belong_together() -> None:
    assert set(kinds()) == KINDS.keys()
    assert all(row.kind in kinds() for row in METHODS.values() if row.has_adapter)
    assert {row.lighter for row in METHODS.values()} <= {None, *METHODS}
    assert method_of("of_others").is_guest


def test_it_is_planned_with_a_little_more_than_lora(plan: Callable) -> None:
    found = plan("--method", "lora,scaled", "--json").document["methods"]
    rows = {name: found[name]["trainable_parameters"] for name in ("lora", "scaled")}
    assert rows["lora"] < rows["scaled"] < 2 * rows["lora"]


def test_a_resumed_run_ends_as_one_that_was_not_interrupted(train: Callable, tmp_path: Path) -> None:
    whole = load_file(train(tmp_path / "whole", 4) / "adapter_model.safetensors")
    train(tmp_path / "parts", 2)
    parts = load_file(train(tmp_path / "parts", 4, "--resume") / "adapter_model.safetensors")
    assert whole.keys() == parts.keys()
    assert all(torch.equal(parts[key], whole[key]) for key in whole)
    assert any(not torch.equal(value, torch.ones_like(value)) for key, value in whole.items() if VECTOR in key)


def test_it_is_merged_exported_and_described(rankwise, train, model_folder, tmp_path: Path) -> None:
    run = train(tmp_path / "run", 4)
    trained = logits(model_folder, run)
    assert rankwise("merge", "--adapter", run, "--output", tmp_path / "merged").code == 0
    torch.testing.assert_close(logits(tmp_path / "merged"), trained, rtol=1e-3, atol=1e-4)
    given = ["export", "--adapter", run, "--for", "vllm", "--output", tmp_path / "served", "--max-error", 0.001]
    assert rankwise(*given).code == 0
    torch.testing.assert_close(logits(model_folder, tmp_path / "served"), trained, rtol=1e-3, atol=1e-3)
    assert rankwise("inspect", run, "--json").document["method"] == "scaled"
    train(tmp_path / "on", 2, "--adapter", run)
    card = (run / "README.md").read_text()
    assert "Scaled LoRA adapter" in card
    assert "PeftModel" not in card


def test_it_is_compared(rankwise, model_folder, rows_file, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps_in_this_process(monkeypatch)
    command = ["compare", "--model", model_folder, "--data", rows_file, "--eval-data", rows_file, "--r", 2]
    command += ["--methods", "lora,scaled", "--seeds", 2, "--learning-rates", 0.02, "--max-steps", 2]
    done = rankwise(*command, "--output", tmp_path / "out", "--device", "cpu")
    assert done.code == 0, done.stderr
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [run["error"] for run in found["runs"]] == [None] * 4
    assert "Scaled LoRA" in (tmp_path / "out" / "report.html").read_text()


def test_what_it_does_not_have_is_refused() -> None:
    for idle in ({"use_dora": True}, {"for_merge": "nf4"}, {"init_lora_weights": "pissa"}):
        with pytest.raises(ConfigError, match="RW101"):
            rw.LoraConfig(other_kind="scaled", **idle)
    with pytest.raises(ConfigError, match="give one of: scaled"):
        rw.LoraConfig(other_kind="unknown")
    with pytest.raises(AdapterError, match="LoRA and DoRA only"):
        rw.add_adapter(tiny_gpt2(), rw.LoraConfig(other_kind="scaled", target_modules=["wte"]))


def test_peft_and_a_rankwise_without_the_row_do_not_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    rw.add_adapter(model, rw.LoraConfig(other_kind="scaled", r=2))
    rw.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "SCALED"
    with pytest.raises(KeyError, match="SCALED"):
        pytest.importorskip("peft").PeftModel.from_pretrained(tiny_llama(), tmp_path)
    monkeypatch.delitem(METHODS, "scaled")
    with pytest.raises(AdapterError, match="RW410"):
        rw.load_adapter(tiny_llama(), tmp_path)

"""Inits, LoRA+ and NEFTune through ``train``: what the run leaves, and what its record says."""

from __future__ import annotations

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from training_rows import Recorder
from transformers import AutoModelForCausalLM

import rankwise as rw
from rankwise.adapters.folder import quantization_of
from rankwise.conflicts import check_conflicts
from rankwise.errors import ConfigError, Interrupted, RankwiseWarning
from rankwise.evaluation.engine import LoadOptions, load_as_trained
from rankwise.records import load_record, read_metrics
from rankwise.training.optimizers import EMBEDDING_RATE, loraplus_groups
from rankwise.training.run import train
from tiny_models import tiny_llama

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")
IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 90, 2]])
STARTS = [
    ("lora", "pissa"),
    ("dora", "pissa:4"),
    ("qlora", "loftq"),
]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(("method", "init"), STARTS)
def test_a_stopped_run_goes_on_to_the_bit(method: str, init: str, settings: Any, tmp_path: Path) -> None:
    given = settings(method=method, init=init)
    straight = train(given.model_copy(update={"output": tmp_path / "straight"}))
    with pytest.raises(Interrupted):
        train(given, Recorder(stop_at=4))
    resumed = train(given.model_copy(update={"resume": True}))
    assert straight.eval_loss == resumed.eval_loss
    assert straight.eval_loss < straight.initial_eval_loss
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    document = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
    assert document["init_lora_weights"] is True
    assert document["r"] == (8 if init.startswith("pissa") else 4)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_peft_reads_the_run_on_the_original_base(method: str, settings: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")
    record = train(settings(method=method, init="pissa"))
    base, _ = rw.load_model(str(tmp_path / "base"))
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "run")
    model, _ = rw.load_model(str(tmp_path / "base"))
    rw.load_adapter(model, tmp_path / "run")
    torch.testing.assert_close(logits(theirs), logits(model), rtol=1e-4, atol=2e-5)
    assert (logits(model) - logits(tiny_llama())).abs().max() > 0.05
    assert record.trainable_parameters < sum(value.numel() for value in weights(tmp_path / "run").values()) * 1.01


def test_a_pissa_over_four_bits_belongs_on_the_original_weights(settings: Any, tmp_path: Path) -> None:
    plain = train(settings(method="qlora", output=tmp_path / "plain"))
    pissa = train(settings(method="qlora", init="pissa", r=16))
    assert quantization_of(tmp_path / "plain") is not None
    assert quantization_of(tmp_path / "run") is None
    dense = train(settings(method="lora", output=tmp_path / "dense"))
    # At the start the largest part of each weight is exact.
    off = [abs(record.initial_eval_loss - dense.initial_eval_loss) for record in (pissa, plain)]
    assert off[0] < off[1]


def test_a_warm_up_needs_a_schedule_that_has_one(settings: Any) -> None:
    given = settings(lr_scheduler_type="constant", warmup_steps=0)
    check_conflicts(given, 1)
    with pytest.raises(ConfigError, match=r"RW112: --warmup-steps .* constant_with_warmup"):
        check_conflicts(given.model_copy(update={"warmup_steps": 2}), 1)


def test_loftq_needs_four_bits(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"RW112.*qlora"):
        train(settings(method="lora", init="loftq"))


@pytest.mark.parametrize("use_dora", [False, True])
def test_the_groups_of_lora_plus_are_peft_s(use_dora: bool) -> None:
    peft = pytest.importorskip("peft", reason="PEFT is the oracle here; install the extra `bench`")
    from peft.optimizers import create_loraplus_optimizer

    given = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "use_dora": use_dora, "bias": "lora_only"}
    given["modules_to_save"] = ["model.norm"]
    theirs = peft.get_peft_model(tiny_llama(attention_bias=True), peft.LoraConfig(**given, task_type="CAUSAL_LM"))
    optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    model = tiny_llama(attention_bias=True)
    rw.add_adapter(model, rw.LoraConfig(**given))
    groups = loraplus_groups(model, rate=1e-3, ratio=16, weight_decay=0.1)

    def sizes(groups: Any) -> dict[float, list[int]]:
        by_rate = itertools.groupby(sorted(groups, key=lambda group: group["lr"]), key=lambda group: group["lr"])
        return {lr: sorted(p.numel() for group in found for p in group["params"]) for lr, found in by_rate}

    assert sizes(groups) == {lr: found for lr, found in sizes(optimizer.param_groups).items() if found}
    trained = {id(p) for p in model.parameters() if p.requires_grad}
    assert {id(p) for group in groups for p in group["params"]} == trained
    assert all(group["lr"] == EMBEDDING_RATE for group in groups if group["group"] == "embedding")
    assert groups[0]["group"] == "lora_A"
    # As without LoRA+, biases and norms do not decay.
    decaying = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    kept = {id(p) for name, p in model.named_parameters() if "bias" in name or "norm" in name}
    assert decaying
    assert not decaying & kept


def test_lora_plus_in_the_record_and_in_the_steps(settings: Any, tmp_path: Path) -> None:
    given = {
        "max_steps": 2,
        "eval_steps": 2,
        "loraplus_ratio": 8,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
    }
    record = train(settings(**given))
    assert record.learning_rates == {"lora_A": 1e-3, "lora_B": 8e-3}
    assert load_record(tmp_path / "run").learning_rates == record.learning_rates
    plain = train(settings(**{**given, "loraplus_ratio": None}, output=tmp_path / "plain"))
    assert plain.learning_rates is None
    one, two = weights(tmp_path / "run"), weights(tmp_path / "plain")
    moved = [max(float(value.abs().max()) for key, value in found.items() if "lora_B" in key) for found in (one, two)]
    # AdamW's first steps are about the rate.
    assert 6 < moved[0] / moved[1] < 10
    assert next(line["learning_rate"] for line in read_metrics(tmp_path / "run") if "learning_rate" in line) == 1e-3


def test_options_of_adapters_do_not_change_a_full_fine_tuning(settings: Any, tmp_path: Path) -> None:
    given = {"method": "full", "learning_rate": None, "max_steps": 4}
    idle = {"loraplus_ratio": 16, "init": "pissa:2", "use_rslora": True, "output": tmp_path / "idle"}
    rates = [train(settings(**given, **more)).settings["learning_rate"] for more in ({}, idle)]
    assert rates[0] == rates[1]
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "idle"))
    assert all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("optimizer", ["adamw_torch", "sgd"])
def test_lora_plus_goes_with_other_optimizers_and_resumes(optimizer: str, settings: Any, tmp_path: Path) -> None:
    given = settings(loraplus_ratio=4, optimizer=optimizer, weight_decay=0.1)
    train(given.model_copy(update={"output": tmp_path / "straight"}))
    with pytest.raises(Interrupted):
        train(given, Recorder(stop_at=4))
    train(given.model_copy(update={"resume": True}))
    one, two = weights(tmp_path / "straight"), weights(tmp_path / "run")
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_neftune_is_noise_in_training_alone(settings: Any, tmp_path: Path) -> None:
    given = {"max_steps": 2, "eval_steps": 2, "logging_steps": 1}
    noisy = train(settings(**given, neftune_noise_alpha=30.0))
    plain = train(settings(**given, output=tmp_path / "plain"))
    assert noisy.initial_eval_loss == plain.initial_eval_loss
    losses = [[line["loss"] for line in read_metrics(tmp_path / name) if "loss" in line] for name in ("run", "plain")]
    assert losses[0][0] != losses[1][0]
    assert "NEFTune" in noisy.device["rows"]
    assert "NEFTune" not in plain.device["rows"]


def test_neftune_refuses_packed_rows(settings: Any) -> None:
    with pytest.raises(ConfigError, match=r"RW112: --packing"):
        check_conflicts(settings(neftune_noise_alpha=5.0, packing=True), 1)


def test_an_adapted_embedding_is_a_group_of_its_own(settings: Any) -> None:
    record = train(settings(max_steps=2, eval_steps=2, target_modules="q_proj,embed_tokens", loraplus_ratio=2))
    assert record.learning_rates == {"lora_A": 1e-2, "lora_B": 2e-2, "embedding": EMBEDDING_RATE}


@pytest.mark.parametrize("method", ["lora", "qdora"])
def test_new_tokens_from_the_command_to_the_answer(method: str, settings: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"w{i} ", "completion": f"<yes> w{i + 1}"} for i in range(40)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = str(tmp_path / "new.jsonl")
    (tmp_path / "tokens.txt").write_text("<yes>\n\n<no>\n")
    given = settings(method=method, data=data, eval_data=data, new_tokens=str(tmp_path / "tokens.txt"), max_steps=12)
    with pytest.raises(Interrupted):
        train(given, Recorder(stop_at=4))
    record = train(given.model_copy(update={"resume": True}))
    straight = train(given.model_copy(update={"output": tmp_path / "straight", "new_tokens": "<yes>,<no>"}))
    assert record.eval_loss == straight.eval_loss < record.initial_eval_loss
    stored = weights(tmp_path / "run")
    for end in ("model.embed_tokens", "lm_head"):
        assert stored[f"base_model.model.{end}.token_adapter.trainable_tokens_delta"].shape == (2, 32)
    options = LoadOptions(dtype="float32", device="cpu")
    loaded = load_as_trained(str(tmp_path / "base"), [tmp_path / "run"], options)
    ids = loaded.tokenizer("w3 <yes>", add_special_tokens=False)["input_ids"]
    assert len(ids) == 2
    assert ids[1] == loaded.tokenizer.convert_tokens_to_ids("<yes>") == 94


def test_a_token_that_the_model_was_never_taught_is_warned_of_and_can_be_trained(settings: Any, tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    base.lm_head.weight.data[2] = base.lm_head.weight.data[0]
    base.save_pretrained(tmp_path / "base")
    with pytest.warns(RankwiseWarning, match=r"write </s>, .* the same row for 1 other"):
        train(settings(max_steps=2))
    with warnings.catch_warnings(record=True) as heard:
        train(settings(max_steps=2, new_tokens="</s>", output=tmp_path / "taught"))
    assert not [one for one in heard if "never taught" in str(one.message)]
    stored = weights(tmp_path / "taught")["base_model.model.lm_head.token_adapter.trainable_tokens_delta"]
    assert stored.shape == (1, 32)
    assert not torch.equal(stored[0], base.lm_head.weight[2])


def test_new_tokens_that_are_none_are_refused(settings: Any, tmp_path: Path) -> None:
    for given in ("<new>,<new>", " , "):
        with pytest.raises(ConfigError, match="RW787"):
            train(settings(new_tokens=given))
    assert not (tmp_path / "run").exists()

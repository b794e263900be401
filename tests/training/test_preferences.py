"""DPO and KTO: equal to trl + PEFT, without a second model, resumed to the bit, and bad input said by its row."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
from datasets import Dataset
from peft import PeftModel
from training_rows import WORDS, Recorder, storage_bytes
from transformers import AutoModelForCausalLM
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer

import rankwise as rw
from rankwise.acceleration.generation import Generator
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, DataError, RankwiseError
from rankwise.records import load_record, read_metrics
from rankwise.training import ranks
from rankwise.training.batches import KEY, Counted
from rankwise.training.objectives import Preferences, Scoring
from rankwise.training.parts import Base, part_of
from rankwise.training.run import train
from rankwise.training.setup import make_trainable
from rankwise.verbs.train import summary
from tables import thinned
from tiny_models import tiny_gpt2

# trl's names and ours.
COMPARED = {
    "loss": "loss",
    "grad_norm": "grad_norm",
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
}
SHORT = {"learning_rate": 3e-3, "lr_scheduler_type": "constant", "max_steps": 20, "logging_steps": 1, "batch_size": 4}


def write_pairs(path: Path, count: int, seed: int = 0) -> Path:
    """Prompts of two words. Better answers are of the first eight words, worse ones of the next eight."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        prompt = " ".join(draw.sample(WORDS, 2)) + " "
        better, worse = (draw.sample(part, draw.randrange(1, 4)) for part in (WORDS[:8], WORDS[8:16]))
        lines.append({"prompt": prompt, "chosen": " ".join(better), "rejected": " ".join(worse)})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def write_marks(path: Path, count: int) -> Path:
    pairs = [json.loads(line) for line in write_pairs(path, count).read_text().splitlines()]
    draw = random.Random(1)
    lines = []
    for pair in pairs:
        good = draw.random() < 0.5
        lines.append({"prompt": pair["prompt"], "completion": pair["chosen" if good else "rejected"], "label": good})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def preferring(tmp_path: Path, settings: Any) -> Callable[..., TrainSettings]:
    def make(objective: str = "dpo", **changes: Any) -> TrainSettings:
        write = write_pairs if objective == "dpo" else write_marks
        given = {"objective": objective, "data": str(write(tmp_path / f"{objective}.jsonl", 44)), "eval_data": None}
        return settings(**{"eval_steps": None, **SHORT, **given, **changes})

    return make


def by_trl(given: TrainSettings, tokenizer: Any, folder: Path, **own: Any) -> list[dict[str, float]]:
    """The logged steps of trl + PEFT from the same first adapter, on the same rows."""
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    lora = given.lora_config(given.method)
    base = part_of(Base, given, quantization=None)
    make_trainable(model, base, lora, "", keeps_reference=False, is_resumed=False)
    rw.save_adapter(model, folder)
    base = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32)
    kind, config = (DPOTrainer, DPOConfig) if given.objective == "dpo" else (KTOTrainer, KTOConfig)
    arguments = config(
        output_dir=str(folder / "trl"),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        per_device_train_batch_size=given.batch_size,
        max_steps=given.max_steps,
        learning_rate=given.learning_rate,
        lr_scheduler_type=given.lr_scheduler_type,
        seed=given.seed,
        data_seed=given.seed,
        max_length=given.max_length,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        **own,
    )
    trainer = kind(
        model=PeftModel.from_pretrained(base, folder, is_trainable=True),
        args=arguments,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(
            [json.loads(line) for line in Path(given.data).read_text(encoding="utf-8").splitlines()]
        ),
    )
    trainer.train()
    return [line for line in trainer.state.log_history if "loss" in line]


EVERY_LOSS = [
    ("dpo", {"loss_type": "sigmoid"}),
    ("dpo", {"loss_type": "ipo", "beta": 0.3}),
    ("dpo", {"loss_type": "hinge"}),
    ("dpo", {"loss_type": "robust", "label_smoothing": 0.2}),
    ("dpo", {"loss_type": "apo_zero"}),
    ("kto", {"loss_type": "kto", "desirable_weight": 1.5}),
    ("kto", {"loss_type": "apo_zero_unpaired", "undesirable_weight": 0.5}),
]


@thinned({"objective,options": EVERY_LOSS, "fast": [True, False], "accumulation": [1, 2]})
def test_losses_rewards_and_gradients_equal_trls(
    objective: str,
    options: dict[str, Any],
    fast: bool,
    accumulation: int,
    preferring: Any,
    tokenizer: Any,
    tmp_path: Path,
) -> None:
    given = preferring(objective, fast=fast, gradient_accumulation=accumulation, max_steps=3, **options)
    own = {"gradient_accumulation_steps": accumulation, **options}
    theirs = by_trl(given, tokenizer, tmp_path / "oracle", **own)
    train(given)
    ours = [line for line in read_metrics(given.output) if "loss" in line]
    assert len(ours) == len(theirs) == 3
    for step, (own, wanted) in enumerate(zip(ours, theirs), 1):
        for name, key in COMPARED.items():
            # Of several micro-batches trl logs the mean of their means over good answers, we the mean over all of them.
            if name in wanted and (objective == "dpo" or accumulation == 1 or "/" not in name):
                # The steps after the first magnify what rounding did to the weights.
                tolerance = 1e-6 if step == 1 else 1e-4
                assert own[key] == pytest.approx(wanted[name], rel=tolerance, abs=tolerance), (step, name)
    assert ours[-1]["loss"] != ours[0]["loss"]


class Weighing(Recorder):
    """Notes at every step how much the parameters alive take."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes: list[int] = []

    def step(self, info: Any) -> None:
        super().step(info)
        self.bytes.append(storage_bytes())


def test_the_kl_of_kto_is_a_mean_over_the_rows_of_all_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows here with a mean of 1.5, and one of 4 in another process."""
    scores = SimpleNamespace(log_probs=torch.tensor([[1.0, 0.5], [3.0, 0.5]]))
    scoring: Any = SimpleNamespace(scores=lambda *_: scores, reference=lambda *_: torch.tensor([[0.5], [1.5]]))
    objective = Preferences(
        scoring=scoring,
        rows=Dataset.from_dict({}),
        eval_rows=None,
        pad=0,
        size=2,
        seed=0,
        loss_type="apo_zero_unpaired",
        beta=0.1,
        max_length=16,
    )
    monkeypatch.setattr(ranks, "count", lambda: 2)
    monkeypatch.setattr(ranks, "summed", lambda given: [mine + other for mine, other in zip(given, (4.0, 1.0))])
    assert objective._z({"mismatched": None, KEY: Counted(2, 8, 2)}) == pytest.approx(7 / 3)


def test_a_prompt_with_the_answer_of_another_row_ends_at_the_learned_positions(preferring: Any, tmp_path: Path) -> None:
    """Each row has at most 16 tokens, and the longest prompt with the longest answer has 24."""
    tiny_gpt2(n_positions=16).save_pretrained(tmp_path / "base")
    rows = [("w1 " * 12, "w2"), ("w3 ", "w4 " * 11)] * 4
    lines = [{"prompt": prompt, "completion": answer, "label": True} for prompt, answer in rows]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    given = {"data": str(tmp_path / "rows.jsonl"), "max_length": 64, "max_steps": 2, "target_modules": "all-linear"}
    assert train(preferring("kto", **given)).status == "finished"


@pytest.mark.parametrize("method", ["lora", "qdora"])
def test_there_is_no_second_model(method: str, preferring: Any, settings: Any, tmp_path: Path) -> None:
    weighed = {}
    for name, given in {
        "sft": settings(method=method, max_steps=2, eval_data=None, eval_steps=None, output=tmp_path / "sft"),
        "dpo": preferring(method=method, max_steps=2, output=tmp_path / "dpo"),
        "kto": preferring("kto", method=method, max_steps=2, output=tmp_path / "kto"),
    }.items():
        before, watcher = storage_bytes(), Weighing()
        train(given, watcher)
        weighed[name] = max(watcher.bytes) - before
    assert weighed["sft"] > 0
    assert weighed["dpo"] <= 1.02 * weighed["sft"]
    assert weighed["kto"] <= 1.02 * weighed["sft"]


@pytest.mark.parametrize("objective", ["dpo", "kto", "dpo of an adapter"])
def test_a_stopped_run_resumes_to_the_same_bits(objective: str, preferring: Any, settings: Any, tmp_path: Path) -> None:
    same: dict[str, Any] = {"max_steps": 8, "save_steps": 2, "lora_dropout": 0.2, "gradient_checkpointing": True}
    if objective == "dpo of an adapter":
        # The reference is the adapter as it was, whatever the checkpoint holds.
        train(settings(output=tmp_path / "sft", **same))
        objective, same["adapter"] = "dpo", tmp_path / "sft"
    whole = preferring(objective, **same, output=tmp_path / "whole")
    train(whole)
    parted = preferring(objective, **same, output=tmp_path / "parted")
    with pytest.raises(RankwiseError, match="RW540"):
        train(parted, Recorder(stop_at=5))
    train(preferring(objective, **same, output=tmp_path / "parted", resume=True))
    files = [folder / "adapter_model.safetensors" for folder in (whole.output, parted.output)]
    first, second = map(safetensors.torch.load_file, files)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_the_reference_is_free_of_noise(objective: str, preferring: Any, tmp_path: Path) -> None:
    compute, found = Scoring.reference, []

    def noted(*given: Any) -> torch.Tensor:
        found.append(compute(*given))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Scoring, "reference", noted)
        for name, noise in {"plain": None, "noisy": 30.0}.items():
            patch.setenv("XDG_CACHE_HOME", str(tmp_path / name))
            train(preferring(objective, max_steps=1, overwrite=bool(noise), neftune_noise_alpha=noise))
    plain, noisy = found[: len(found) // 2], found[len(found) // 2 :]
    assert plain
    torch.testing.assert_close(noisy, plain)


def test_held_out_rewards_rise_and_are_recorded(preferring: Any, tmp_path: Path) -> None:
    held_out = str(write_pairs(tmp_path / "held_out.jsonl", 18, seed=5))
    given = preferring(eval_data=held_out, max_steps=40, eval_steps=10, learning_rate=1e-2)
    train(given)
    lines = [line for line in read_metrics(given.output) if "eval_reward_accuracy" in line]
    assert lines[0]["eval_reward_accuracy"] == 0
    assert lines[-1]["eval_reward_accuracy"] > 0.8
    record = load_record(given.output)
    assert record.objective == "dpo"
    assert record.eval_rewards["reward_accuracy"] > 0.8
    assert "DPO" in (given.output / "README.md").read_text()


def test_the_answers_of_the_reference_are_kept_for_later_runs(
    preferring: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    asked, answers = [], Generator.answers
    monkeypatch.setattr(Generator, "answers", lambda self, prompts: asked.append(1) or answers(self, prompts))
    given = preferring(learning_rate=1e-9, max_steps=1, overwrite=True)
    assert train(given).answers == {"asked": 8, "changed": 0}
    assert len(asked) == 2
    assert train(given.model_copy(update={"seed": 1})).answers == {"asked": 8, "changed": 0}
    assert len(asked) == 3
    (kept,) = (tmp_path / "cache" / "rankwise" / "reference").glob("*.json")
    kept.write_text(json.dumps({"answers": [[0]] * 8}))
    assert train(given).answers == {"asked": 8, "changed": 8}


@pytest.mark.parametrize("objective", ["dpo", "kto"])
@pytest.mark.parametrize(("rate", "changes"), [(1e-9, False), (3e-1, True)])
def test_a_run_says_whether_answers_changed(objective: str, rate: float, changes: bool, preferring: Any) -> None:
    record = train(preferring(objective, learning_rate=rate, max_steps=4))
    assert record.answers is not None
    assert record.answers["asked"] == 8
    assert (record.answers["changed"] > 0) == changes
    said = dict(summary(Path(record.settings["output"]), record))["answers"]
    assert ("continue with --adapter" in said) == (record.answers["changed"] <= 4)


BAD_ROWS = {
    "equal sides": ({"chosen": "w1", "rejected": "w1"}, "RW203"),
    "a missing side": ({"chosen": "w1"}, "RW203"),
    "an empty side": ({"chosen": "w1", "rejected": " "}, "RW203"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_bad_pair_is_named_by_its_row(case: str, preferring: Any, tmp_path: Path) -> None:
    sides, code = BAD_ROWS[case]
    given = preferring()
    with Path(given.data).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"prompt": "w2 ", **sides}) + "\n")
    with pytest.raises(DataError, match=r"dpo\.jsonl, line 45") as caught:
        train(given)
    assert caught.value.code == code
    assert not given.output.exists()


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"objective": "sft", "beta": 0.1}, "RW112"),
        ({"objective": "dpo", "desirable_weight": 2.0}, "RW112"),
        ({"objective": "dpo", "packing": True}, "RW112"),
        ({"objective": "dpo", "label_smoothing": 0.1}, "RW112"),
        ({"objective": "dpo", "loss_type": "robust", "label_smoothing": 0.5}, "RW112"),
        ({"objective": "kto", "batch_size": 1}, "RW112"),
        ({"objective": "dpo", "method": "full"}, "RW112"),
        ({"objective": "dpo", "loss_type": "kto"}, "RW763"),
        ({"objective": "dpo", "loss_type": "exo_pair"}, "RW763"),
    ],
)
def test_an_option_has_its_effect_or_is_refused(options: dict[str, Any], code: str, settings: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        train(settings(**options))
    assert caught.value.code == code

"""Several processes that train one model over gloo, against one process."""

from __future__ import annotations

import functools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from device_runs import BATCH, EVAL_ROWS, ROWS, STEPS, Runs, check_alike, differing, lines, record, weights

from several import Nursery
from tiny_models import save_with_tokenizer, tiny_llama, tiny_moe


def test_two_processes_learn_what_one_learns(runs: Runs) -> None:
    check_alike(runs.one, runs.two)
    assert lines(runs.two, "eval_loss")[0] == lines(runs.one, "eval_loss")[0]


# Process 0 comes to the cache after process 1 has prepared the base.
SECOND = """
if rank == 0:
    import time
    from rankwise.models import prepared
    prepare = prepared._prepare
    def wait_and_prepare(folder, *arguments):
        while not folder.is_dir():
            time.sleep(0.05)
        prepare(folder, *arguments)
    prepared._prepare = wait_and_prepare
"""


def test_a_process_of_any_rank_prepares_the_base(several: Nursery, given: list[str], tmp_path: Path):
    for run in ("first", "again"):
        options = ("--method", "qlora", "--cache", tmp_path / "cache", "--max-steps", 1, "--output", tmp_path / run)
        done = several.run(2, [*given, *options], SECOND)
        assert done.codes == [0, 0], done.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert differing(tmp_path / "first", tmp_path / "again") == []


# Name: options, processes.
CASES = {
    "full under fsdp": (("--method", "full", "--strategy", "fsdp"), 2),
    "dora, 4 under ddp": (("--method", "dora", "--strategy", "ddp"), 4),
}
METHODS = ("lora", "dora", "qlora", "qdora", "full")
REST = {
    f"{method}, {count} under {strategy}": (("--method", method, "--strategy", strategy), count)
    for method in METHODS
    for strategy in ("ddp", "fsdp")
    for count in (2, 4)
} | {
    "checkpointing, 4-bit, 2 under fsdp": (
        ("--method", "qlora", "--gradient-checkpointing", "--strategy", "fsdp"),
        2,
    ),
    "packed rows, 2 under ddp": (("--method", "lora", "--packing", "--strategy", "ddp"), 2),
    "packed rows, checkpointing, a trained head, 4 under fsdp": (
        (
            *("--method", "lora", "--packing", "--gradient-checkpointing"),
            *("--modules-to-save", "lm_head", "--strategy", "fsdp"),
        ),
        4,
    ),
    "full, checkpointing, 4 under fsdp": (("--method", "full", "--gradient-checkpointing", "--strategy", "fsdp"), 4),
    "float32 scales, 4 under fsdp": (("--method", "qdora", "--no-double-quant", "--strategy", "fsdp"), 4),
    "rows that are not blocks, 4 under fsdp": (
        ("--method", "qdora", "--block-size", "128", "--strategy", "fsdp"),
        4,
    ),
    "an adapted embedding, 2 under fsdp": (
        ("--method", "dora", "--target-modules", "embed_tokens,q_proj", "--strategy", "fsdp"),
        2,
    ),
    "adapted experts, 4 under fsdp": (
        ("--method", "qlora", "--target-parameters", "down_proj", "--strategy", "fsdp", "--model", "mixtral"),
        4,
    ),
    "adapted experts, 2 under ddp": (
        ("--method", "lora", "--target-parameters", "down_proj", "--strategy", "ddp", "--model", "mixtral"),
        2,
    ),
    # 259 rows, which the head shares.
    "full, a tied head, 2 under fsdp": (("--method", "full", "--strategy", "fsdp", "--model", "tied"), 2),
    "a trained head that was tied, 2 under fsdp": (
        ("--method", "lora", "--modules-to-save", "lm_head", "--strategy", "fsdp", "--model", "tied"),
        2,
    ),
    "plain operators, 2 under fsdp": (("--method", "dora", "--no-fast", "--strategy", "fsdp"), 2),
}


# The models of cases that end with --model.
OTHERS = {
    "mixtral": functools.partial(tiny_moe, "mixtral", vocab_size=259),
    "tied": functools.partial(
        tiny_llama, vocab_size=259, hidden_size=64, intermediate_size=128, tie_word_embeddings=True
    ),
}


def check_case(
    case: tuple[tuple[str, ...], int], several: Nursery, given: list[str], model_folder: Path, folder: Path
) -> None:
    options, count = case
    if options[-2] == "--model":
        other = save_with_tokenizer(OTHERS[options[-1]](), model_folder, folder / "other")
        given = [str(other) if before == "--model" else item for before, item in zip(["", *given], given)]
        options = options[:-2]
    alone = options[: options.index("--strategy")]
    # The head's vectors of a batch lie in one row where rows are packed: as many rows as processes.
    one = several.run(1, [*given, *alone, "--batch-size", BATCH, "--output", folder / "one"])
    assert one.codes == [0], one.stderr
    together = several.run(count, [*given, *options, "--batch-size", BATCH // count, "--output", folder / "several"])
    assert together.codes == [0] * count, together.stderr
    check_alike(folder / "one", folder / "several")
    assert record(folder / "several")["device"]["acceleration"] == record(folder / "one")["device"]["acceleration"]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_what_trains_in_several_processes_learns_what_one_learns(
    case: Any, several: Nursery, given: list[str], model_folder: Path, tmp_path: Path
) -> None:
    check_case(case, several, given, model_folder, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("case", REST.values(), ids=REST)
def test_every_method_learns_in_several_processes_what_one_learns(
    case: Any, several: Nursery, given: list[str], model_folder: Path, tmp_path: Path
) -> None:
    check_case(case, several, given, model_folder, tmp_path)


PREFERENCES = ("loss", "reward_chosen", "reward_rejected", "reward_margin", "reward_accuracy", "log_prob_chosen", "kl")
PREFERRING = {
    "dpo": (("--objective", "dpo", "--method", "dora"), "ddp", 2),
    "kto": (("--objective", "kto", "--method", "qlora", "--desirable-weight", 1.5), "ddp", 4),
}


def check_preferences(case: Any, several: Nursery, given: list[str], folder: Path) -> None:
    (kind, objective, *options), strategy, count = case
    for name, rows in (("train", ROWS), ("eval", EVAL_ROWS)):
        pairs = [
            {"prompt": f"{name} {index}: ", "chosen": "abcdefgh"[: 2 + index % 6], "rejected": "hg"[: 1 + index % 2]}
            for index in range(rows)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    data = [kind, objective, *options, "--data", folder / "train.jsonl", "--eval-data", folder / "eval.jsonl"]
    one = several.run(1, [*given, *data, "--batch-size", BATCH, "--output", folder / "one"])
    assert one.codes == [0], one.stderr
    shared = [*data, "--batch-size", BATCH // count, "--strategy", strategy, "--output", folder / "several"]
    together = several.run(count, [*given, *shared])
    assert together.codes == [0] * count, together.stderr
    for name in PREFERENCES:
        expected, found = lines(folder / "one", name), lines(folder / "several", name)
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6), name
        assert found[:2] == pytest.approx(expected[:2], rel=1e-5, abs=1e-7), name
    assert len(lines(folder / "several", "loss")) == STEPS
    assert lines(folder / "several", "eval_loss") == pytest.approx(lines(folder / "one", "eval_loss"), rel=1e-4)
    assert lines(folder / "several", "tokens") == lines(folder / "one", "tokens")
    learnt = weights(folder / "several")
    for name, value in weights(folder / "one").items():
        torch.testing.assert_close(learnt[name], value, rtol=1e-3, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("case", [PREFERRING["dpo"], pytest.param(PREFERRING["kto"], marks=pytest.mark.long)])
def test_preferences_are_learnt_in_several_processes_as_in_one(
    case: Any, several: Nursery, given: list[str], tmp_path: Path
) -> None:
    check_preferences(case, several, given, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_learnt_from_shards(objective: str, several: Nursery, given: list[str], tmp_path: Path) -> None:
    check_preferences((("--objective", objective, "--method", "qdora"), "fsdp", 2), several, given, tmp_path)


def test_the_record_is_that_of_both(runs: Runs) -> None:
    one, two = record(runs.one), record(runs.two)
    assert (two["devices"], two["strategy"], one["devices"], one["strategy"]) == (2, "ddp", 1, None)
    assert two["frozen_bytes"] == one["frozen_bytes"] > 0
    assert (two["status"], two["kept_step"]) == ("finished", one["kept_step"])
    assert two["tokens_per_second"] > 0
    assert two["peak_memory_bytes"] > 0


def test_one_process_writes_and_speaks(runs: Runs) -> None:
    assert json.loads(runs.done.stdout)["steps"] == STEPS
    assert runs.done.stderr.count("Training ...") == 1
    said = " ".join(runs.done.stderr.split())
    assert "tokens/s of 2 processes together (ddp), peak memory of one process" in said
    assert re.search(r"there are [\d.]+ GB for each process: fits", said)
    assert lines(runs.two, "step") == sorted(lines(runs.two, "step"))
    states = {path.name for path in next((runs.two / "checkpoints").iterdir()).glob("random*.json")}
    assert states == {"random-0.json", "random-1.json"}


# Each process notes how many rows of the embedding it was given while the model was loaded.
WATCHED = """
from rankwise.training import setup
loaded = setup.load_prepared
def load(*args, **more):
    model, tokenizer = loaded(*args, **more)
    weight = model.get_input_embeddings().weight
    assert weight.to_local().shape[0] == (130, 129)[rank], "loaded whole"
    return model, tokenizer
setup.load_prepared = load
"""


def test_a_sharded_run_reads_its_rows_and_is_the_unsharded_one(
    runs: Runs, several: Nursery, given: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "sharded"
    options = ("--method", "qdora", "--batch-size", 2, "--strategy", "fsdp")
    done = several.run(2, [*given, *options, "--output", folder], WATCHED)
    assert done.codes == [0, 0], done.stderr
    whole, sharded = record(runs.two), record(folder)
    assert sharded["strategy"] == "fsdp"
    assert sharded["frozen_bytes"] <= 0.55 * whole["frozen_bytes"]
    alike = ("base_model", "total_parameters", "trainable_parameters")
    assert [sharded[name] for name in alike] == [whole[name] for name in alike]
    assert sharded["device"]["acceleration"] == whole["device"]["acceleration"]
    assert lines(folder, "loss") == lines(runs.two, "loss")
    assert lines(folder, "eval_loss") == lines(runs.two, "eval_loss")
    assert differing(runs.two, folder) == []


# As on a card: losses are scaled by torch's scaler, here that for CPUs. Gradients of process 1 overflow at OVERFLOWS.
FLOAT16 = """
import functools, torch
from rankwise.training import setup
from rankwise.training.objectives import Demonstrations
prepare, compute = Demonstrations.prepare, Demonstrations.loss
def noted(self, batches, step):
    self.step = step
    return prepare(self, batches, step)
def overflowing(self, *given):
    found = compute(self, *given)
    if (rank, self.step) == (1, OVERFLOWS):
        found.sum.register_hook(lambda grad: grad * float("inf"))
    return found
torch.amp.GradScaler = functools.partial(torch.amp.GradScaler, init_scale=1024.0)
setup.mixed_precision = lambda method, dtype, kind: (torch.float32 if method == "full" else dtype, torch.float16)
Demonstrations.prepare, Demonstrations.loss = noted, overflowing
"""


@pytest.mark.long
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["qdora", "full"])
def test_a_step_that_overflows_float16_in_one_process_is_left_out_in_all(
    method: str, strategy: str, several: Nursery, given: list[str], tmp_path: Path
) -> None:
    found = {}
    for name, count, overflows in (("one", 1, -1), ("two", 2, -1), ("overflow", 2, 1)):
        options = ["--method", method, "--dtype", "float16", "--batch-size", BATCH // count]
        options += ["--output", tmp_path / name, *(("--strategy", strategy) if count > 1 else ())]
        # At the end the weights of all processes are compared.
        done = several.run(count, [*given, *options], f"OVERFLOWS = {overflows}\n{FLOAT16}")
        assert done.codes == [0] * count, done.stderr
        found[name] = lines(tmp_path / name, "loss")
    assert found["two"] == pytest.approx(found["one"], rel=1e-4)
    assert found["overflow"][:2] == found["two"][:2]
    # The weights of the second step are those of the third.
    assert found["overflow"][2] != found["two"][2]


# trl's trainer over PEFT's adapter, as `accelerate launch` would run them; a process of its own rows of each batch.
PEFT = """
import json
import os
from pathlib import Path

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import SFTConfig, SFTTrainer

from rankwise import LoraConfig, add_adapter, save_adapter
from rankwise.data import encode_rows, read_rows

base, data, folder = MODEL, DATA, Path(FOLDER)
set_seed(0)
adapted = AutoModelForCausalLM.from_pretrained(base)
add_adapter(adapted, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0))
save_adapter(adapted, folder / str(rank))
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder / str(rank), is_trainable=True)
tokenizer = AutoTokenizer.from_pretrained(base)
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        output_dir=str(folder / "trl"), use_cpu=True, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=3, learning_rate=1e-3, lr_scheduler_type="constant", warmup_steps=0, weight_decay=0.0,
        max_grad_norm=1.0, optim="adamw_torch", seed=0, data_seed=0, logging_steps=1, save_strategy="no",
        report_to="none", max_length=None, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
    ),
    train_dataset=encode_rows(read_rows(data), tokenizer=tokenizer, max_length=48, name="train").dataset,
    processing_class=tokenizer,
)
trainer.train()
losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
(folder / f"{rank}.json").write_text(json.dumps(losses))
os._exit(0)
"""


@pytest.mark.long
def test_trl_and_peft_have_the_same_losses_in_two_processes(
    several: Nursery, given: list[str], model: Path, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip("peft", reason="compares with PEFT: pip install '.[bench]'")
    options = ("--method", "lora", "--lora-alpha", 8, "--lora-dropout", 0, "--weight-decay", 0, "--max-grad-norm", 1)
    # The first epoch's whole batches: at its end accelerate repeats rows.
    length = ("--batch-size", 2, "--max-steps", 3, "--output", tmp_path / "ours")
    ours = several.run(2, [*given, *options, *length])
    assert ours.codes == [0, 0], ours.stderr
    names = {"MODEL": model, "DATA": rows / "train.jsonl", "FOLDER": tmp_path}
    head = "\n".join(f"{name} = {str(path)!r}" for name, path in names.items())
    theirs = several.run(2, [], f"{head}\n{PEFT}")
    assert theirs.codes == [0, 0], theirs.stderr
    expected = json.loads((tmp_path / "0.json").read_text())
    assert len(expected) == 3
    assert lines(tmp_path / "ours", "loss") == pytest.approx(expected, rel=2e-5)

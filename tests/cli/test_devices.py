"""Several processes that train one model over gloo, against one process."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rankwise.records import read_metrics
from several import LAUNCHERS, LONG, Nursery
from tiny_models import save_with_tokenizer, tiny_llama, tiny_moe

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# 29 rows in batches of 4, and 2 of them a step: an epoch, 4 steps, ends in a batch of one row.
ROWS, EVAL_ROWS, STEPS, BATCH = 29, 7, 6, 4
OPTIONS = (
    *("--dtype", "float32", "--device", "cpu", "--r", 4, "--max-length", 48, "--learning-rate", 1e-3),
    *("--gradient-accumulation", 2, "--max-steps", STEPS, "--eval-steps", 3, "--save-steps", 2, "--logging-steps", 1),
    *("--lr-scheduler-type", "constant", "--ignore-plan"),
)
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A two-layer Llama whose 4-bit weights are read by rows, which are whole blocks. 259 rows are no multiple of 2."""
    made = tiny_llama(vocab_size=259, hidden_size=64, intermediate_size=128)
    return save_with_tokenizer(made, model_folder, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", ROWS), ("eval", EVAL_ROWS)):
        rows = [{"prompt": f"{name} {index}: ", "completion": "abcdefgh"[: 2 + index % 6]} for index in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def given(rows: Path, model: Path) -> list[str]:
    data = ("--data", rows / "train.jsonl", "--eval-data", rows / "eval.jsonl")
    return [str(item) for item in ("train", "--model", model, *data, *OPTIONS)]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    files = [safetensors.torch.load_file(path) for path in folder.glob("*.safetensors")]
    return {name: tensor for file in files for name, tensor in file.items()}


def differing(first: Path, second: Path) -> list[str]:
    """Names of the trained tensors that are not equal to the bit."""
    one, other = weights(first), weights(second)
    assert one.keys() == other.keys() != set()
    return [name for name in one if not torch.equal(one[name], other[name])]


def lines(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


class Runs:
    """The runs that several tests look at: one process of batch 4, and two of batch 2."""

    def __init__(self, folder: Path, several: Nursery, given: list[str]) -> None:
        self.one, self.two = folder / "one", folder / "two"
        one = several.run(1, [*given, "--method", "qdora", "--batch-size", BATCH, "--output", self.one])
        assert one.codes == [0], one.stderr
        self.done = several.run(2, [*given, "--method", "qdora", "--batch-size", 2, "--output", self.two, "--json"])
        assert self.done.codes == [0, 0], self.done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, several: Nursery, given: list[str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), several, given)


def check_alike(one: Path, several: Path) -> None:
    """Losses, evaluations and weights of a run in several processes are those of one process."""
    expected, found = lines(one, "loss"), lines(several, "loss")
    assert len(found) == record(one)["steps"]
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-4)
    assert lines(several, "entropy") == pytest.approx(lines(one, "entropy"), rel=1e-4)
    assert lines(several, "tokens") == lines(one, "tokens")
    assert lines(several, "eval_loss") == pytest.approx(lines(one, "eval_loss"), rel=1e-5)
    assert lines(several, "eval_loss")[0] == pytest.approx(lines(one, "eval_loss")[0], rel=1e-7)
    learnt = weights(several)
    for name, value in weights(one).items():
        torch.testing.assert_close(learnt[name], value, rtol=1e-3, atol=2e-5)


def test_two_processes_learn_what_one_learns(runs: Runs) -> None:
    check_alike(runs.one, runs.two)
    assert lines(runs.two, "eval_loss")[0] == lines(runs.one, "eval_loss")[0]


# Name: options, processes.
CASES = {
    "full under fsdp": (("--method", "full", "--strategy", "fsdp"), 2),
    "dropout, 4 under ddp": (("--method", "dora", "--lora-dropout", "0.3", "--strategy", "ddp"), 4),
}
METHODS = ("lora", "dora", "qlora", "qdora", "full")
REST = {
    f"{method}, {count} under {strategy}": (("--method", method, "--strategy", strategy), count)
    for method in METHODS
    for strategy in ("ddp", "fsdp")
    for count in (2, 4)
} | {
    "dropout, checkpointing, 4-bit, 2 under fsdp": (
        ("--method", "qlora", "--lora-dropout", "0.3", "--gradient-checkpointing", "--strategy", "fsdp"),
        2,
    ),
    "dropout, packed rows, 2 under ddp": (
        ("--method", "lora", "--lora-dropout", "0.3", "--packing", "--strategy", "ddp"),
        2,
    ),
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
        ("--method", "qlora", "--target-parameters", "down_proj", "--model", "mixtral", "--strategy", "fsdp"),
        4,
    ),
    "adapted experts, 2 under ddp": (
        ("--method", "lora", "--target-parameters", "down_proj", "--model", "mixtral", "--strategy", "ddp"),
        2,
    ),
    "plain operators, 2 under fsdp": (("--method", "dora", "--no-fast", "--strategy", "fsdp"), 2),
}


def check_case(
    case: tuple[tuple[str, ...], int], several: Nursery, given: list[str], model_folder: Path, folder: Path
) -> None:
    options, count = case
    if "mixtral" in options:
        experts = save_with_tokenizer(tiny_moe("mixtral", vocab_size=259), model_folder, folder / "experts")
        given = [str(experts) if before == "--model" else item for before, item in zip(["", *given], given)]
        options = tuple(item for item in options if item not in ("--model", "mixtral"))
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
    "dpo, 4 under ddp": (("--objective", "dpo", "--method", "dora"), "ddp", 4),
    "kto, 2 under ddp": (("--objective", "kto", "--method", "qlora", "--desirable-weight", 1.5), "ddp", 2),
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
@pytest.mark.parametrize("case", PREFERRING.values(), ids=PREFERRING)
def test_preferences_are_learnt_in_several_processes_as_in_one(
    case: Any, several: Nursery, given: list[str], tmp_path: Path
) -> None:
    check_preferences(case, several, given, tmp_path)


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_preferences_are_learnt_from_shards(objective: str, several: Nursery, given: list[str], tmp_path: Path) -> None:
    check_preferences((("--objective", objective, "--method", "qdora"), "fsdp", 2), several, given, tmp_path)


def test_a_loss_over_a_batch_is_refused_in_several_processes(
    several: Nursery, given: list[str], tmp_path: Path
) -> None:
    options = ["--objective", "dpo", "--loss-type", "aot", "--output", tmp_path / "run"]
    check_failed(several.run(2, [*given, *options]), "RW785: --loss-type aot compares the pairs")


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
    assert lines(runs.two, "step") == sorted(lines(runs.two, "step"))
    states = {path.name for path in next((runs.two / "checkpoints").iterdir()).glob("random*.json")}
    assert states == {"random.json", "random-1.json"}


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
    options = ("--method", "qdora", "--batch-size", 2, "--strategy", "fsdp", "--sample-prompt", "a")
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
    pytest.importorskip("peft", reason="compares with PEFT: pip install 'rankwise[bench]'")
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


# --- faults ---


def check_failed(done: Any, *words: str) -> None:
    """All processes ended, and one of them said why."""
    assert 0 not in done.codes
    assert done.stderr.count("error RW") == 1, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr


@needs_proc
@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.long)])
def test_a_killed_process_ends_all_and_the_run_continues_to_the_bit(
    runs: Runs, several: Nursery, given: list[str], strategy: str, tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    options = ("--method", "qdora", "--batch-size", 2, "--strategy", strategy, "--output", folder)
    launch = several.start(2, [*given, *options])
    launch.wait_for(folder, "checkpoints/step-2")
    os.kill(launch.pids[1], signal.SIGKILL)
    done = launch.ended()
    check_failed(done, "error RW702: process 0 of 2 has lost the others")
    assert done.codes == [2, -signal.SIGKILL]
    assert record(folder)["status"] == "failed"
    again = several.run(2, ["train", "--resume", "--output", folder])
    assert again.codes == [0, 0], again.stderr
    assert differing(runs.two, folder) == []
    assert lines(folder, "loss") == lines(runs.two, "loss")


@needs_proc
@pytest.mark.long
def test_shards_that_train_continue_to_the_bit(several: Nursery, given: list[str], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ("--method", "full", "--batch-size", 2, "--strategy", "fsdp", "--output")
    done = several.run(2, [*given, *options, whole])
    assert done.codes == [0, 0], done.stderr
    launch = several.start(2, [*given, *options, killed])
    launch.wait_for(killed, "checkpoints/step-2")
    os.kill(launch.pids[0], signal.SIGKILL)
    check_failed(launch.ended(), "error RW702: process 1 of 2 has lost the others")
    again = several.run(2, ["train", "--resume", "--output", killed])
    assert again.codes == [0, 0], again.stderr
    assert differing(whole, killed) == []
    assert lines(killed, "loss") == lines(whole, "loss")


FAULTS = {
    "a loss that is not finite in one process": (
        """
from rankwise.training.trainer import RankwiseTrainer
compute = RankwiseTrainer.compute_loss
def broken(self, *args, **more):
    return compute(self, *args, **more) * (float("nan") if rank == 1 and self.state.global_step == 2 else 1)
RankwiseTrainer.compute_loss = broken
""",
        ("RW530: the loss is nan at step 3",),
    ),
    "a full disk where the writer writes": (
        """
import errno
from rankwise.training import spine
def full(*args, **more):
    raise OSError(errno.ENOSPC, "No space left on device")
spine.save_state = full
""",
        ("RW513", "free some space"),
    ),
    "an error in one process": (
        """
from rankwise.training.trainer import RankwiseTrainer
step = RankwiseTrainer.training_step
def broken(self, *args, **more):
    if rank == 1 and self.state.global_step == 2:
        raise MemoryError
    return step(self, *args, **more)
RankwiseTrainer.training_step = broken
""",
        ("RW550",),
    ),
    "a process that cannot write where the others do": (
        """
import os
from rankwise.training import ranks
ranks.FILE_SECONDS = 2
os.chdir(("here", "there")[rank])
""",
        ("RW701: process 1 does not see run",),
    ),
    "other data": (
        """
import os
os.chdir(("here", "there")[rank])
open("train.jsonl", "a").write('{"prompt": "another", "completion": "row"}\\n' * rank)
""",
        ("RW700", "the sha256 of the train data"),
    ),
    "another number of processes": ("", ("RW137: --devices is 4 and the launcher started 2",)),
}


@pytest.mark.parametrize("what", FAULTS)
def test_a_fault_in_one_process_ends_all_with_one_message(
    what: str, several: Nursery, given: list[str], rows: Path, tmp_path: Path
) -> None:
    fault, words = FAULTS[what]
    options: list[Any] = [*given, "--method", "lora", "--batch-size", 2, "--output"]
    options.append("run" if "chdir" in fault else tmp_path / "run")
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text((rows / "train.jsonl").read_text())
    if what == "other data":
        options[options.index(str(rows / "train.jsonl"))] = "train.jsonl"
    if what == "another number of processes":
        options += ["--devices", 4]
    fault = f"import os; os.chdir({str(tmp_path)!r})\n{fault}"
    check_failed(several.run(2, options, fault), *words)


@needs_proc
def test_a_process_that_hangs_ends_all(several: Nursery, given: list[str], tmp_path: Path) -> None:
    folder, patience = tmp_path / "hung", 10
    fault = f"from rankwise.training import ranks; ranks.PATIENCE_SECONDS = {patience}"
    options = ("--method", "lora", "--batch-size", 2, "--output", folder)
    launch = several.start(2, [*given, "--max-steps", 2000, *options], fault, grace_seconds=2)
    launch.wait_for(folder, "checkpoints/step-2")
    os.kill(launch.pids[1], signal.SIGSTOP)
    began = time.monotonic()
    done = launch.ended()
    check_failed(done, "error RW702: process 0 of 2 has lost the others")
    assert done.codes == [2, -signal.SIGKILL]
    assert time.monotonic() - began < patience + 60
    assert record(folder)["status"] == "failed"


def check_saved(folder: Path, stderr: str) -> None:
    """The run was interrupted, and the step that it had come to is saved."""
    assert stderr.count("interrupted RW") == 1, stderr
    assert "interrupted RW540: stopped after step" in stderr
    done = record(folder)
    assert done["status"] == "interrupted"
    assert (folder / "checkpoints" / f"step-{done['steps']}").is_dir()


@needs_proc
def test_a_signal_to_one_process_saves_once_and_ends_all(several: Nursery, given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    launch = several.start(2, [*given, "--max-steps", 2000, "--batch-size", 2, "--output", folder])
    launch.wait_for(folder, "checkpoints/step-2")
    os.kill(launch.pids[1], signal.SIGTERM)
    done = launch.ended()
    assert done.codes == [130, 130]
    check_saved(folder, done.stderr)


# --- torch's launcher ---


def started(command: list[Any]) -> subprocess.Popen[str]:
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-m", *map(str, command)], env=ENVIRONMENT, **pipes)


def children(pid: int) -> list[int]:
    """The processes of a launcher, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == pid:
                environment = folder.joinpath("environ").read_bytes().split(b"\0")
                found |= {int(item[5:]): int(folder.name) for item in environment if item.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@contextlib.contextmanager
def running(command: list[Any], folder: Path, after: str) -> Iterator[subprocess.Popen[str]]:
    """A launched run, once ``after`` (a pattern) exists in its folder."""
    run = started(command)
    try:
        deadline = time.monotonic() + LONG
        while not list(folder.glob(after)) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield run
    finally:
        run.kill()


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and messages; a run that hangs fails the test."""
    stderr = run.communicate(timeout=LONG)[1]
    return run.returncode, stderr


@needs_proc
@pytest.mark.long
def test_a_signal_to_the_command_saves_once_and_ends_all(given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    options = ["--max-steps", 2000, "--batch-size", 2, "--devices", 2, "--output", folder]
    with running(["rankwise", *given, *options], folder, "checkpoints/step-2") as run:
        run.send_signal(signal.SIGTERM)
        code, stderr = ended(run)
    assert code == 130
    check_saved(folder, stderr)


# What stands in the place of Python notes how it was started, and fails.
FAKE = """#!/bin/sh
echo "$RANK of $WORLD_SIZE: $*" >> "$NOTES"
exit 3
"""


def test_devices_start_as_many_processes_and_end_as_they_do(
    rankwise: Any, given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(FAKE)
    fake.chmod(0o755)
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    monkeypatch.setattr("rankwise.cli.launch.sys.executable", str(fake))
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    done = rankwise(*given, "--devices", 2, "--output", tmp_path / "run")
    logging.disable(logging.NOTSET)
    assert (done.code, done.stdout) == (3, "")
    notes = sorted((tmp_path / "notes").read_text().splitlines())
    assert [note.partition(": ")[0] for note in notes] == ["0 of 2", "1 of 2"]
    assert all("-m rankwise train --config" in note for note in notes)


@needs_proc
@pytest.mark.long
def test_torchrun_starts_a_run_again_that_lost_a_process(runs: Runs, given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "restarted"
    # Without -- torchrun would take --r for one of its own options.
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", 2, "--max-restarts", 1, "-m", "--"]
    options = ["--method", "qdora", "--batch-size", 2, "--output", folder]
    with running([*launcher, "rankwise", *given, *options], folder, "checkpoints/step-2") as run:
        os.kill(children(run.pid)[1], signal.SIGKILL)
        code, stderr = ended(run)
    assert code == 0, stderr
    assert record(folder)["status"] == "finished"
    assert differing(runs.two, folder) == []
    assert lines(folder, "loss") == lines(runs.two, "loss")


def test_processes_that_differ_are_refused_with_one_message(several: Nursery, given: list[str], tmp_path: Path) -> None:
    # The settings of each process are its own.
    fault = "import rankwise.training.run as run; train = run.train\n"
    fault += "run.train = lambda given, *more: train(given.model_copy(update={'seed': rank}), *more)"
    done = several.run(2, [*given, "--output", tmp_path / "run"], fault)
    check_failed(done, "RW700: the processes of this run do not do the same: --seed is 1 in process 1 and 0 in")
    assert not (tmp_path / "run").exists()

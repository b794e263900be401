"""``rankwise train`` and its memory plan: said, recorded, refused, overruled, and asked when memory ran out."""

from __future__ import annotations

import dataclasses
import json
import re

import pytest

from rankwise.config import TrainSettings
from rankwise.errors import RunError
from rankwise.models import fetch_model
from rankwise.planning import guard
from rankwise.reports.numbers import byte_size
from toy_memory import toy_estimate


@pytest.fixture
def train(rankwise, model_folder, rows_file, tmp_path):
    def call(*arguments):
        command = ("--model", model_folder, "--data", rows_file, "--output", tmp_path / "run", "--max-steps", 1)
        return rankwise("train", *command, "--batch-size", 4, "--r", 2, "--device", "cpu", *arguments)

    return call


@pytest.fixture
def little_memory(monkeypatch):
    def shrink(memory_bytes):
        real = guard.cpu_hardware
        monkeypatch.setattr(guard, "cpu_hardware", lambda: dataclasses.replace(real(), memory_bytes=memory_bytes))

    return shrink


@pytest.fixture
def toy_memory(monkeypatch):
    """A megabyte a token over a gigabyte of weights: the real model is smaller than what the libraries take."""
    monkeypatch.setattr(guard, "Traces", lambda *arguments, **more: toy_estimate)


def record_of(tmp_path):
    return json.loads((tmp_path / "run" / "run.json").read_text())


def test_the_prediction_is_printed_and_recorded(train, tmp_path):
    done = train()
    assert done.code == 0
    record = record_of(tmp_path)
    before, after = record["predicted_peak_memory_bytes"], record["peak_memory_bytes"]
    assert f"predicted peak {byte_size(before)} (idle process " in done.stdout
    assert f"peak memory {byte_size(after)} (predicted {byte_size(before)})" in done.stdout


def test_a_new_process_stays_inside_the_printed_interval(several, model_folder, rows_file, tmp_path):
    """What the process itself holds decides for a model this small."""
    command = ("train", "--model", model_folder, "--data", rows_file, "--output", tmp_path / "run", "--device", "cpu")
    done = several.start(1, [*command, "--max-steps", 2, "--batch-size", 4]).ended()
    assert done.codes == [0], done.stderr
    record = record_of(tmp_path)
    predicted = record["predicted_peak_memory_bytes"]
    error = int(re.search(r"predicted peak .* ±(\d+) %", done.stdout)[1]) / 100
    assert abs(record["peak_memory_bytes"] - predicted) <= error * (predicted - record["idle_bytes"])


@pytest.mark.parametrize("options", [("--method", "lora"), ("--method", "qdora", "--no-fast")])
def test_a_plan_of_the_same_step_says_the_same_number(rankwise, several, model_folder, tmp_path, options):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(8 * (json.dumps({"text": 4 * "abcdefghij"}) + "\n"))
    own = ("--model", model_folder, "--batch-size", 4, "--r", 2, *options)
    command = ("train", *own, "--data", rows, "--output", tmp_path / "run", "--device", "cpu", "--max-steps", 1)
    done = several.start(1, [*command]).ended()
    assert done.codes == [0], done.stderr
    length = re.search(r"for 4 rows of (\d+) tokens", done.stdout)[1]
    row = rankwise("plan", *own, "--max-length", length, "--json").document["methods"][options[1]]
    record = record_of(tmp_path)
    # A run counts what loading has left, and a plan its median.
    assert record["predicted_peak_memory_bytes"] == pytest.approx(row["peak_bytes"], rel=0.05)
    assert row["peak_bytes"] == row["idle_bytes"] + row["training_bytes"]
    assert record["idle_bytes"] == row["idle_bytes"]


def test_weights_rounded_once_are_in_the_plan_and_change_no_bit(
    rankwise, model_folder, rows_file, tmp_path, monkeypatch
):
    common = ("--model", model_folder, "--data", rows_file, "--max-steps", 2, "--device", "cpu", "--r", 2)
    found = {}
    for length, is_kept in ((128, True), (128, False), (512, False)):
        with monkeypatch.context() as patch:
            if not is_kept and length == 128:
                patch.setattr(guard.MemoryGuard, "keeps_rounded", lambda self, more_bytes: False)
            folder = tmp_path / f"{length}-{is_kept}"
            options = ("--output", folder, "--products", "int8", "--batch-size", 8, "--max-length", length, "--packing")
            done = rankwise("train", *common, *options)
        assert done.code == 0, done.stderr
        assert ("rounded once and kept" in done.stdout) == is_kept
        found[length, is_kept] = (folder / "adapter_model.safetensors").read_bytes()
    assert found[128, True] == found[128, False]


@pytest.mark.parametrize(("pairs", "is_kept"), [(4, True), (8, False)])
def test_a_pair_of_answers_counts_as_two_rows_for_weights_rounded_once(
    pairs, is_kept, rankwise, model_folder, tmp_path
):
    rows = tmp_path / "pairs.jsonl"
    rows.write_text(8 * (json.dumps({"prompt": "a", "chosen": "b" * 80, "rejected": "c" * 80}) + "\n"))
    common = ("--model", model_folder, "--data", rows, "--max-steps", 1, "--device", "cpu", "--r", 2)
    options = ("--objective", "dpo", "--products", "int8", "--batch-size", pairs, "--output", tmp_path / "run")
    done = rankwise("train", *common, *options)
    assert done.code == 0, done.stderr
    assert ("rounded once and kept" in done.stdout) == is_kept


def test_an_evaluation_of_longer_rows_decides(train, tmp_path):
    rows = tmp_path / "long.jsonl"
    rows.write_text(4 * (json.dumps({"prompt": "a ", "completion": "b" * 400}) + "\n"))
    done = train("--eval-data", rows, "--max-length", 512)
    assert done.code == 0
    # The scorer computes what rows share once: four equal ones are one.
    assert re.search(r"for 1 row of 4\d\d tokens without a backward pass, as in an evaluation; there are", done.stdout)
    alone = train("--overwrite")
    assert re.search(r"for 4 rows of \d\d tokens; there are", alone.stdout)


def test_a_run_that_cannot_fit_is_refused_before_anything_is_written(train, little_memory, tmp_path):
    little_memory(10_000)
    done = train()
    assert done.code == 2
    assert "RW562" in done.stderr
    assert "--ignore-plan" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_refusal_names_changes_that_fit(train, little_memory, toy_memory, monkeypatch):
    """Just below what the longest rows need, a smaller batch is enough."""
    seen = []
    real = guard.MemoryGuard.ask
    monkeypatch.setattr(guard.MemoryGuard, "ask", lambda self, workload: seen.append(real(self, workload)) or seen[-1])
    # What loading leaves differs from run to run.
    monkeypatch.setattr(guard.MemoryGuard, "with_loaded", lambda self, predicted, mapped: predicted)
    assert train().code == 0
    smallest, needed = seen[0].peak_bytes, seen[-1].peak_bytes
    assert needed > smallest
    little_memory(needed - 1)
    done = train("--overwrite")
    assert done.code == 2
    assert ") --batch-size 2 --gradient-accumulation 2: " in done.stderr


def test_the_user_may_overrule_the_plan(train, little_memory, tmp_path):
    little_memory(10_000)
    done = train("--ignore-plan")
    assert done.code == 0
    assert "RW563" in done.stderr
    assert record_of(tmp_path)["predicted_peak_memory_bytes"] > 10_000


def test_a_checkpoint_of_4_bits_is_held_against_the_memory_as_such(little_memory, tmp_path):
    """LoRA over its layers is QLoRA: counted in 16 bits the run would be refused where it fits."""
    sizes = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 2048, "intermediate_size": 8192}
    config = {**sizes, "num_hidden_layers": 4, "num_attention_heads": 16, "max_position_embeddings": 2048}
    stored = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}

    def peak(method, double_quant=True, **more):
        folder = tmp_path / method
        folder.mkdir(exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config | more))
        settings = TrainSettings(
            model=str(folder), data="D", output="O", method=method, device="cpu", double_quant=double_quant
        )
        asked = guard.MemoryGuard(settings.model_dump(), print, lambda: 0, ignore=False)
        asked.before_loading(fetch_model(str(folder)))
        return asked.ask(asked._run.workload)

    little_memory(10**15)
    as_it_is, as_qlora = peak("lora", quantization_config=stored), peak("qlora", double_quant=False)
    assert (as_it_is.peak_bytes, as_it_is.method) == (as_qlora.peak_bytes, "lora")
    assert as_it_is.peak_bytes < peak("lora").peak_bytes
    assert peak("qlora", quantization_config=stored).peak_bytes == as_qlora.peak_bytes


def test_a_model_that_cannot_be_predicted_trains_all_the_same(train, monkeypatch, tmp_path):
    from rankwise.errors import ModelError

    def unknown(*arguments, **more):
        raise ModelError("RW325", "no closed form for this one.")

    monkeypatch.setattr(guard.MemoryGuard, "ask", unknown)
    done = train()
    assert done.code == 0
    assert "RW564" in done.stderr
    assert record_of(tmp_path)["predicted_peak_memory_bytes"] is None


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("no room"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA out of memory. Tried to allocate 20.00 MiB."),
    ],
)
def test_when_memory_runs_out_the_error_ends_with_what_would_fit(train, toy_memory, monkeypatch, error):
    from rankwise.training.session import Session

    def carry_out(self, *arguments):
        raise error

    monkeypatch.setattr(Session, "carry_out", carry_out)
    done = train()
    assert done.code == 2
    assert "RW550" in done.stderr
    assert "what would fit, the cheapest first: (1)" in done.stderr


@pytest.mark.parametrize("packing", [(), ("--packing",)])
def test_rows_beyond_learned_positions_stop_before_training(rankwise, gpt2_folder, tmp_path, packing):
    """A table of positions ends; without the check the first step fails in the embedding."""
    rows = [{"prompt": "a ", "completion": "b" * length} for length in (2, 3, 4, 30)]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    order = ("train", "--model", gpt2_folder, "--data", data, "--max-steps", 1, "--r", 2, "--device", "cpu")
    done = rankwise(*order, *packing, "--output", tmp_path / "long", "--max-length", 64)
    assert done.code == 2
    assert "RW533" in done.stderr
    assert "--max-length 12" in done.stderr
    assert not (tmp_path / "long").exists()
    assert rankwise(*order, *packing, "--output", tmp_path / "short", "--max-length", 12).code == 0


def test_a_run_refused_late_leaves_no_folder(train, tmp_path, monkeypatch):
    def refuse(self, batch, evaluation, mapped):
        raise RunError("RW562", "this run cannot fit.")

    monkeypatch.setattr(guard.MemoryGuard, "before_training", refuse)
    assert train().code == 2
    assert not (tmp_path / "run").exists()

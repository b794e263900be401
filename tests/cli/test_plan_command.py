"""``rankwise plan`` on a model small enough to plan in no time."""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from rankwise.cli.main import main
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, DataError
from rankwise.methods import METHODS
from rankwise.options import read_settings
from rankwise.planning import TERMS, hardware

ENOUGH, LITTLE = "8GB", "1MB"


def test_the_document_has_the_promised_shape(plan):
    done = plan("--memory", ENOUGH, "--json")
    assert done.code == 0
    document = done.document
    assert set(document["methods"]) == set(METHODS)
    for entry in document["methods"].values():
        assert entry["peak_bytes"] == sum(entry["breakdown"].values())
        assert set(entry["breakdown"]) == set(TERMS)
        assert entry["fits"] is True
        assert entry["max_batch_size"] >= 4
        assert entry["trainable_parameters"] > 0
    assert document["recommendation"]["method"] == "lora"
    assert document["recommendation"]["reasons"]
    assert document["recommendation"]["tokens_per_second"] > 0
    assert document["command"].startswith("rankwise train --model")


def test_nothing_fits_is_an_answer(plan):
    done = plan("--memory", LITTLE, "--method", "lora,qlora", "--json")
    assert done.code == 0
    assert not any(entry["fits"] for entry in done.document["methods"].values())
    assert {entry["max_batch_size"] for entry in done.document["methods"].values()} == {0}
    assert {entry["tokens_per_second"] for entry in done.document["methods"].values()} == {None}
    advice = done.document["recommendation"]
    assert advice["method"] is None
    assert advice["missing_bytes"] > 0
    assert done.document["command"] is None


def test_what_only_fits_without_its_error_is_recommended_with_a_warning(rankwise, model_folder, tmp_path):
    """In the document and in words: a row that fits and a recommendation of nothing would contradict each other."""
    step = ("--method", "lora", "--batch-size", 1, "--max-length", 16, "--r", 1, "--gradient-checkpointing")

    def plan(memory, *more):
        return rankwise("plan", "--model", model_folder, *step, "--memory", memory, *more)

    peak = plan(ENOUGH, "--json").document["methods"]["lora"]["peak_bytes"]
    document = plan(f"{peak}B", "--json").document
    assert document["methods"]["lora"]["verdict"] == "tight"
    assert (document["recommendation"]["method"], document["recommendation"]["tight"]) == ("lora", True)
    assert document["command"]
    saved = tmp_path / "plan.yaml"
    said = plan(f"{peak}B", "--save", saved).stdout
    assert "with its error the peak may reach" in " ".join(said.split())
    assert "nothing fits" not in " ".join(said.split())
    assert "only without its error margin" in saved.read_text()


def test_the_command_starts_as_many_processes_as_were_planned_for(plan, tmp_path):
    order = ("--method", "lora", "--memory", ENOUGH, "--devices", 4)
    done = plan(*order, "--json")
    assert "--devices 4" in done.document["command"]
    saved = tmp_path / "plan.yaml"
    for strategy in ("ddp", "fsdp"):
        plan(*order, "--strategy", strategy, "--save", saved)
        assert "devices: 4" in saved.read_text()
        assert f"strategy: {strategy}" in saved.read_text()


def test_every_option_of_the_adapter_is_planned_and_saved(plan, tmp_path):
    """They are those of `rankwise train`, which reads the file."""
    saved = tmp_path / "plan.yaml"

    def planned(*options):
        targets = ("--method", "lora", "--target-modules", "q_proj,v_proj")
        document = plan("--memory", ENOUGH, *targets, "--save", saved, "--json", *options).document
        settings = read_settings(TrainSettings, saved, {"data": "D", "output": "O"})
        return document["methods"]["lora"]["trainable_parameters"], settings

    whole, _ = planned()
    first, settings = planned("--layers-to-transform", "0")
    assert 0 < first < whole
    assert settings.layers_to_transform == (0,)
    narrow, settings = planned("--rank-pattern", "q_proj=1")
    assert 0 < narrow < whole
    assert settings.rank_pattern == {"q_proj": 1}


def test_without_our_fused_parts_the_plan_says_so_and_saves_it(plan, tmp_path):
    saved = tmp_path / "plan.yaml"
    done = plan("--memory", ENOUGH, "--method", "lora", "--no-fast", "--save", saved)
    assert "PyTorch's own step" in done.stdout
    assert yaml.safe_load(saved.read_text())["fast"] is False


def test_an_apple_gpu_is_counted_without_our_kernels(plan):
    order = ("--gpu", "m4 max 64gb", "--method")
    said = " ".join(plan(*order, "lora,qlora").stdout.split())
    assert "none of our kernels" in said
    assert "4-bit weights are made dense in every pass (RW608)" in said
    assert "bitsandbytes' optimizers are refused (RW116)" in said
    workload = plan(*order, "lora", "--json").document["workload"]
    assert (workload["fast"], workload["device_type"]) == (False, "cpu")


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "lion_32bit", "rmsprop_bnb"])
def test_a_mac_is_planned_with_no_optimizer_that_train_refuses_there(plan, optimizer):
    done = plan("--gpu", "m4 max 64gb", "--optimizer", optimizer)
    assert done.code == 2
    assert "RW116" in done.stderr
    assert "Apple M4 Max 64GB" in done.stderr
    assert plan("--gpu", "L40S", "--method", "lora", "--optimizer", optimizer).code == 0


def test_a_check_that_cannot_fit_is_not_begun(plan, monkeypatch):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: False)
    monkeypatch.setattr(
        "rankwise.planning.real_steps.measure", lambda *order, **more: pytest.fail("started all the same")
    )
    machine = dataclasses.replace(hardware.this_machine(), memory_bytes=10**6)
    monkeypatch.setattr(hardware, "this_machine", lambda: machine)
    done = plan("--check", "--method", "lora")
    assert done.code == 2
    assert "RW134" in done.stderr


def test_the_largest_batch_fits_and_a_much_larger_does_not(rankwise, model_folder):
    def entry(batch):
        arguments = ("--method", "lora", "--memory", "700MB", "--max-length", 512, "--batch-size", batch)
        return rankwise("plan", "--model", model_folder, *arguments, "--json").document["methods"]["lora"]

    most = entry(1)["max_batch_size"]
    assert most > 1
    assert entry(most)["fits"]
    assert not entry(most + most // 4 + 1)["fits"]


def test_people_read_a_table_advice_and_a_command(plan, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = plan("--memory", ENOUGH, "--why")
    assert done.code == 0
    for method in METHODS:
        assert f"\n{method}" in done.stdout
    for word in ("weights", "activ.", "logits", "idle", "peak", "largest", "take", "because", "run", "serve", "arXiv"):
        assert word in done.stdout
    # The first line holds a path, the command is one line so that it can be copied.
    assert all(len(line) <= 80 for line in done.stdout.splitlines()[1:] if "rankwise train" not in line)


@pytest.mark.parametrize(
    "place", [("--memory", "8GB"), ("--memory", "480MB", "--max-length", 2048, "--batch-size", 64)]
)
@pytest.mark.parametrize("method", ["all", "qdora"])
def test_the_command_comes_after_few_words(plan, monkeypatch, place, method):
    monkeypatch.setenv("COLUMNS", "80")
    words = plan(*place, "--method", method).stdout.split("\n\n", 2)[2]
    assert "because" in words
    assert "arXiv" not in words
    assert len(words.partition("\nrun ")[0].splitlines()) <= 10


def test_of_all_traces_one_line_is_told(plan, monkeypatch):
    def make_plan(settings, say):
        for number in range(9):
            say(f"tracing step {number} ...")
        raise ConfigError("RW130", "the end.")

    monkeypatch.setattr("rankwise.planning.plan.make_plan", make_plan)
    assert plan().stderr.splitlines() == ["tracing step 0 ...", "error RW130: the end."]


@pytest.mark.parametrize("method", ["all", "full", "lora", "qlora", "dora", "qdora"])
@pytest.mark.parametrize(
    ("device", "place"),
    [
        ("cpu", ("--memory", "8GB")),
        ("cpu", ("--memory", "560MB", "--max-length", 2048)),
        ("cpu", ("--memory", "480MB", "--max-length", 2048, "--batch-size", 64)),
        ("cuda", ("--gpu", "RTX 4090")),
        ("cuda", ("--gpu", "RTX 4090", "--memory", "620MB", "--max-length", 2048)),
        ("mps", ("--gpu", "Apple M4 Max 64GB")),
    ],
)
def test_train_takes_what_a_plan_recommends(rankwise, plan, rows_file, tmp_path, monkeypatch, device, place, method):
    """The line under ``run``, up to where data are read; nothing may be recommended where nothing fits."""
    done = plan(*place, "--method", method, "--json")
    assert done.code == 0
    command = done.document["command"]
    assert command is not None or done.document["recommendation"]["missing_bytes"]
    if command is None:
        return

    def read(*_):
        raise DataError("RW201", "all settings are taken.")

    monkeypatch.setattr("rankwise.training.run.choose_device", lambda *_: SimpleNamespace(device=device))
    monkeypatch.setattr("rankwise.training.setup.read_data", read)
    words = command.replace("--data D --output O", f"--data {rows_file} --output {tmp_path / 'run'}")
    assert "RW201: all settings are taken." in rankwise(*shlex.split(words)[1:]).stderr


@pytest.mark.parametrize(("place", "paged"), [((), False), (("--gpu", "RTX 4090"), True)])
def test_only_a_card_is_given_a_paged_optimizer(rankwise, model_folder, place, paged):
    """Where all that is left is that, or shorter rows."""
    step = ("--method", "lora", "--batch-size", 1, "--max-length", 512, "--r", 64, "--gradient-checkpointing")

    def planned(memory):
        return rankwise("plan", "--model", model_folder, *step, *place, "--memory", memory, "--json").document

    row = planned("8GB")["methods"]["lora"]
    most = row["peak_bytes"] + row["error"] * row["training_bytes"]
    command = planned(f"{int(most) - 1000}B")["command"]
    assert ("--optimizer paged_adamw_8bit" in command) == paged
    assert ("--max-length 256" in command) != paged


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--gpu", "RTX 4095"), "RW141", "RTX 4090"),
        (("--gpu", "A100"), "RW141", "A100 80GB SXM"),
        (("--memory", "24 bananas"), "RW140", "24GiB"),
        (("--method", "lora,mora"), "RW130", "mora"),
        (("--batch-size", "0"), "RW103", "--batch-size"),
        (("--max-length", "1"), "RW103", "--max-length"),
        (("--r", "0"), "RW103", "--r"),
        (("--optimizer", "nonsense"), "RW132", "nonsense"),
        (("--save", "/nowhere/at/all/plan.yaml"), "RW105", "--save"),
        (("--gpus", "RTX 4090"), "RW120", "--gpu"),
    ],
)
def test_mistakes_exit_with_2_and_say_what_to_do(plan, arguments, code, words):
    done = plan(*arguments)
    assert done.code == 2
    assert code in done.stderr
    assert words in done.stderr


def test_a_place_that_cannot_be_written_is_refused_before_the_work(plan, monkeypatch, tmp_path):
    monkeypatch.setattr("rankwise.planning.plan.make_plan", lambda *_: pytest.fail("planned all the same"))
    (tmp_path / "plan.yaml").touch()
    (tmp_path / "link").symlink_to("plan.yaml")
    for place in (tmp_path, tmp_path / "missing" / "file", tmp_path / "link"):
        done = plan("--save", place)
        assert done.code == 2
        assert "RW105: --save" in done.stderr


def test_a_length_beyond_the_model_s_is_said(rankwise, model_folder):
    sizes = ("--memory", ENOUGH, "--max-length", 4096, "--batch-size", 1)
    done = rankwise("plan", "--model", model_folder, "--method", "lora", *sizes)
    assert done.code == 0
    assert "512" in done.stdout.partition("note")[2]


@pytest.mark.parametrize(
    ("stored", "words"),
    [
        ({"load_in_4bit": True, "bnb_4bit_use_double_quant": True}, "4-bit weights already (bitsandbytes, with double"),
        ({"quant_method": "fp8", "fmt": "e4m3"}, "hold quantized weights (fp8), which cannot be quantized again"),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, "weights in 4 bits (gptq): lora and dora train over"),
    ],
)
def test_weights_that_are_quantized_already_are_said(rankwise, model_folder, tmp_path, stored, words):
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    done = rankwise("plan", "--model", tmp_path, "--method", "lora,qlora", "--memory", ENOUGH)
    assert done.code == 0
    assert words in " ".join(done.stdout.partition("note")[2].split())


@pytest.mark.parametrize(
    ("stored", "bits", "group"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32}, 4, 32),
        ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, 4, 64),
        ({"quant_method": "hqq", "quant_config": {"weight_quant_params": {"nbits": 8, "group_size": 64}}}, 8, 64),
        (
            {
                "quant_method": "torchao",
                "quant_type": {"default": {"_type": "Int4WeightOnlyConfig", "_data": {"group_size": 32}}},
            },
            4,
            32,
        ),
    ],
)
def test_packed_weights_of_another_library_are_counted(rankwise, model_folder, tmp_path, stored, bits, group):
    """n weights of b bits, and a scale and a zero of 16 bits for each group."""
    config = json.loads((model_folder / "config.json").read_text())

    def terms(place, method):
        options = ("--memory", ENOUGH, "--method", method, "--dtype", "bfloat16", "--json")
        return rankwise("plan", "--model", place, *options).document["methods"][method]["breakdown"]

    dense, four = (terms(model_folder, method)["weights"] for method in ("lora", "qlora"))
    count = (dense - four) // 2
    (tmp_path / "config.json").write_text(json.dumps({**config, "quantization_config": stored}))
    found = terms(tmp_path, "lora")
    assert found["weights"] == four
    assert found["weights_4bit"] == pytest.approx(count * bits / 8 + 4 * count / group, abs=2)


def test_the_saved_plan_trains_unchanged(plan, rows_file, tmp_path):
    saved = tmp_path / "plan.yaml"
    done = plan("--memory", ENOUGH, "--method", "dora", "--r", 4, "--target-modules", "q_proj,v_proj", "--save", saved)
    assert done.code == 0
    assert f"--config {saved}" in done.stdout
    settings = yaml.safe_load(saved.read_text())
    assert settings["method"] == "dora"
    assert settings["target-modules"] == ["q_proj", "v_proj"]
    folder = tmp_path / "run"
    command = ["train", "--config", saved, "--data", rows_file, "--output", folder, "--max-steps", 1]
    assert main([str(part) for part in command]) == 0
    record = json.loads((folder / "run.json").read_text())
    assert (record["settings"]["r"], record["settings"]["batch_size"]) == (4, 4)


def test_a_reader_who_leaves_early_takes_no_file_along(model_folder, tmp_path):
    """``rankwise plan ... | head -1``: the pipe breaks at the first line."""
    saved = tmp_path / "plan.yaml"
    command = [sys.executable, "-m", "rankwise", "plan", "--model", model_folder, "--memory", ENOUGH]
    command += ["--method", "lora"]
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = subprocess.run(
            [*command, "--save", saved],
            stdout=write_end,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(write_end)
    # Besides a line that says what is traced, where that takes a second.
    assert all(line.startswith("tracing") for line in done.stderr.splitlines())
    assert yaml.safe_load(saved.read_text())["method"] == "lora"


def test_a_check_that_fails_leaves_the_files(plan, monkeypatch, tmp_path):
    monkeypatch.setattr(hardware, "may_have_gpu", lambda: False)
    refused = ConfigError("RW133", "no answer.")
    monkeypatch.setattr("rankwise.planning.real_steps.measure", lambda *order, **more: (_ for _ in ()).throw(refused))
    saved = tmp_path / "plan.yaml"
    assert plan("--check", "--method", "lora", "--save", saved).code == 2
    assert saved.exists()


def test_a_plan_that_was_made_before_imports_no_torch(model_folder):
    """Which is what makes it answer at once."""
    code = (
        "import sys; from rankwise.cli.main import main; code = main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers'} & set(sys.modules); sys.exit(f'{code} {heavy}' if code or heavy else 0)"
    )
    arguments = ["plan", "--model", str(model_folder), "--batch-size", "4", "--max-length", "64", "--memory", "24GB"]
    assert main(arguments) == 0
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)


def test_packed_rows_of_a_card_without_flash_attention_take_masks(plan):
    order = ("--packing", "--batch-size", "4", "--max-length", "512", "--method", "lora", "--dtype", "float16")
    found = {}
    for card in ("T4", "L4"):
        done = plan("--gpu", card, *order)
        assert "packed" in done.stdout
        document = plan("--gpu", card, *order, "--json").document
        assert (document["workload"]["packing"], document["workload"]["flash"]) == (True, card == "L4")
        found[card] = document["methods"]["lora"]["breakdown"]["activations"]
    assert found["T4"] - found["L4"] > (4 * 512) ** 2


def rows_of(tmp_path, count, system):
    said = [{"role": "system", "content": system}, {"role": "user", "content": "a b"}]
    rows = [{"messages": [*said, {"role": "assistant", "content": f"{number} c d"}]} for number in range(count)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_rows_of_data_are_counted_as_the_run_lays_them(rankwise, tmp_path):
    """The batch of the plan is the largest of the run, with a common beginning once."""
    data = rows_of(tmp_path, 12, "one two three " * 12)
    step = ("--model", "demo", "--data", data, "--batch-size", 4, "--method", "lora")
    shared, apart = (rankwise("plan", *step, "--json", "--share-prompts", how).document for how in ("auto", "off"))
    length = shared["workload"]["max_length"]
    assert (shared["counted_rows"], shared["run_tokens"]) == (12, 3 * 4 * length)
    assert length < 0.6 * apart["workload"]["max_length"] < 1024
    assert f"--data {data}" in shared["command"]
    run = rankwise("train", *step, "--max-steps", 1, "--products", "bfloat16", "--output", tmp_path / "run")
    assert f"for 4 rows of {length} tokens" in run.stdout


@pytest.mark.parametrize("more", [("--rows", 5), ("--trained-share", 0.5), ("--objective", "grpo")])
def test_what_data_say_is_not_given_twice(plan, tmp_path, more):
    done = plan("--data", rows_of(tmp_path, 4, "one"), *more)
    assert (done.code, "RW112" in done.stderr) == (2, True)


def test_data_of_a_settings_file_are_not_read(plan, tmp_path):
    """A recipe is planned before its data are there, and with rewards, whose rows cannot be counted."""
    file = tmp_path / "recipe.yaml"
    file.write_text("data: not-there.jsonl\nobjective: grpo\nmethod: lora\n", encoding="utf-8")
    done = plan("--config", file, "--json")
    assert (done.code, done.document["counted_rows"]) == (0, None)


def test_a_pair_counts_as_two_rows_in_the_time_of_a_run(plan):
    of_pairs, of_rows = (
        plan("--method", "lora", "--rows", 8, "--objective", objective, "--json").document["run_tokens"]
        for objective in ("dpo", "sft")
    )
    assert of_pairs == 2 * of_rows

"""Files of every folder that a verb reads, damaged at random: one coded line that is no fault of ours, in a short time.

``RANKWISE_FUZZ_ROUNDS`` sets the rounds per file, ``RANKWISE_FUZZ_SEED`` where they start.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from damage import (
    TooSlowError,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_values,
    damaged_yaml,
    limited,
)
from rankwise.cli.main import main
from rankwise.errors import RunError
from rankwise.evaluation.loading import max_length_of
from rankwise.foreign import parse_json, read_json
from rankwise.records import load_record, read_metrics
from rankwise.training.checkpoints import MANIFEST, _write_manifest
from reports.comparison_folders import write_comparison

ROUNDS = int(os.environ.get("RANKWISE_FUZZ_ROUNDS", "2"))
SEED = int(os.environ.get("RANKWISE_FUZZ_SEED", "0"))
SECONDS = 60
# A machine of the tests may be busy; what hangs takes for ever.


@pytest.fixture(scope="module")
def talkative(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose generation settings say much."""
    folder = tmp_path_factory.mktemp("talkative") / "model"
    shutil.copytree(model_folder, folder)
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 50, "repetition_penalty": 1.1}
    given |= {"eos_token_id": [2], "bos_token_id": 1, "pad_token_id": 0, "max_length": 40, "suppress_tokens": [5]}
    given |= {"bad_words_ids": [[6]], "no_repeat_ngram_size": 2, "min_length": 0, "use_cache": True, "num_beams": 1}
    (folder / "generation_config.json").write_text(json.dumps({**given, "transformers_version": "5.23.0"}))
    return folder


@pytest.fixture(scope="module")
def sharded(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded") / "model"
    shutil.copytree(model_folder, folder)
    (folder / "model.safetensors").unlink()
    LlamaForCausalLM.from_pretrained(model_folder).save_pretrained(folder, max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


TRAIN = ("--max-steps", 2, "--save-steps", 1, "--logging-steps", 1, "--eval-steps", 1, "--batch-size", 2, "--r", 2)


@pytest.fixture(scope="module")
def stopped(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was stopped after the first of two steps."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    data = ["--data", rows_file, "--eval-data", rows_file]
    assert main([str(part) for part in ["train", "--model", model_folder, *data, "--output", folder, *TRAIN]]) == 0
    shutil.rmtree(folder / "checkpoints" / "step-2")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**record, "status": "interrupted"}))
    lines = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if json.loads(line)["step"] < 2]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compared") / "comparison"
    write_comparison(folder)
    return folder


@pytest.fixture(scope="module")
def settings(model_folder: Path, rows_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("settings") / "folder"
    folder.mkdir()
    given = {"model": model_folder, "data": rows_file, "row": 0, "max-length": 64, "trust-remote-code": "false"}
    (folder / "run.yaml").write_text("".join(f"{key}: {value}\n" for key, value in given.items()))
    return folder


Mutate = Callable[[random.Random, bytes], bytes]
GENERATE = ("generate", "--prompt", "Hi", "--max-new-tokens", "2")

# Fixture, file in it, how it is damaged, and the verbs that read it. {} is the damaged folder.
CASES: dict[str, tuple[str, str, Mutate, tuple[tuple[str, ...], ...]]] = {
    "run.json": (
        "run_folder",
        "run.json",
        damaged_json,
        (("inspect", "{}"), (*GENERATE, "--adapter", "{}"), ("merge", "--adapter", "{}", "--output", "{out}")),
    ),
    "run.json to resume": ("stopped", "run.json", damaged_json, (("train",),)),
    "adapter_config.json": (
        "run_folder",
        "adapter_config.json",
        damaged_json,
        (
            ("inspect", "{}"),
            ("inspect", "{}", "--model", "{model}"),
            (*GENERATE, "--adapter", "{}", "--model", "{model}"),
            ("merge", "--adapter", "{}", "--output", "{out}"),
        ),
    ),
    "adapter_model.safetensors": (
        "run_folder",
        "adapter_model.safetensors",
        damaged_safetensors,
        (("inspect", "{}"), (*GENERATE, "--adapter", "{}"), ("merge", "--adapter", "{}", "--output", "{out}")),
    ),
    "values of an adapter": (
        "run_folder",
        "adapter_model.safetensors",
        damaged_values,
        (("inspect", "{}"), (*GENERATE, "--adapter", "{}"), ("merge", "--adapter", "{}", "--output", "{out}")),
    ),
    "tokenizer_config.json of a run": (
        "run_folder",
        "tokenizer_config.json",
        damaged_json,
        ((*GENERATE, "--adapter", "{}"),),
    ),
    "config.json": (
        "model_folder",
        "config.json",
        damaged_json,
        (
            ("inspect", "{}"),
            ("plan", "--model", "{}", "--memory", "24GB"),
            (*GENERATE, "--model", "{}"),
            ("merge", "--adapter", "{run}", "--model", "{}", "--output", "{out}"),
        ),
    ),
    "model.safetensors": (
        "model_folder",
        "model.safetensors",
        damaged_safetensors,
        (
            ("inspect", "{}"),
            (*GENERATE, "--model", "{}"),
            ("merge", "--adapter", "{run}", "--model", "{}", "--output", "{out}"),
        ),
    ),
    "values of a model": (
        "model_folder",
        "model.safetensors",
        damaged_values,
        ((*GENERATE, "--model", "{}"), ("merge", "--adapter", "{run}", "--model", "{}", "--output", "{out}")),
    ),
    "model.safetensors.index.json": (
        "sharded",
        "model.safetensors.index.json",
        damaged_json,
        (
            ("inspect", "{}"),
            (*GENERATE, "--model", "{}"),
            ("merge", "--adapter", "{run}", "--model", "{}", "--output", "{out}"),
        ),
    ),
    "generation_config.json": ("talkative", "generation_config.json", damaged_json, ((*GENERATE, "--model", "{}"),)),
    "tokenizer_config.json": (
        "model_folder",
        "tokenizer_config.json",
        damaged_json,
        ((*GENERATE, "--model", "{}"), ("preview", "--model", "{}", "--data", "{rows}")),
    ),
    "tokenizer.json": (
        "model_folder",
        "tokenizer.json",
        damaged_json,
        ((*GENERATE, "--model", "{}"), ("preview", "--model", "{}", "--data", "{rows}")),
    ),
    **{
        f"{name} to resume": ("stopped", f"checkpoints/step-1/{name}", how, (("train",),))
        for name, how in {
            "manifest.json": damaged_json,
            "random.json": damaged_json,
            "random.safetensors": damaged_safetensors,
            "optimizer.json": damaged_json,
            "optimizer.safetensors": damaged_safetensors,
            "scheduler.json": damaged_json,
            "trainer_state.json": damaged_json,
            "progress.json": damaged_json,
            "adapter_model.safetensors": damaged_safetensors,
        }.items()
    },
    "metrics.jsonl": ("stopped", "metrics.jsonl", damaged_lines, (("train",),)),
    "comparison.json": ("compared", "comparison.json", damaged_json, (("report", "{}", "--output", "{out}"),)),
    "settings": ("settings", "run.yaml", damaged_yaml, (("preview", "--config", "{}/run.yaml"),)),
}


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_file_is_named_and_nothing_else_happens(case, request, tmp_path, capfd, model_folder, rows_file):
    source, name, damage, verbs = CASES[case]
    original = request.getfixturevalue(source)
    run = request.getfixturevalue("run_folder")
    failures = []
    for number in range(SEED, SEED + ROUNDS):
        # Text as a seed is the same in every process.
        draw = random.Random(f"{case} {number}")
        folder, out = tmp_path / f"{number}", tmp_path / f"{number}-out"
        shutil.copytree(original, folder)
        (folder / name).write_bytes(damage(draw, (folder / name).read_bytes()))
        if "checkpoints" in name and not name.endswith(MANIFEST):
            _write_manifest((folder / name).parent, 1)
        verb = draw.choice(verbs)
        places = {"{out}": out, "{run}": run, "{model}": model_folder, "{rows}": rows_file, "{}": folder}
        arguments = list(verb)
        for sign, place in places.items():
            arguments = [part.replace(sign, str(place)) for part in arguments]
        if verb == ("train",):
            data = ["--data", rows_file, "--eval-data", rows_file]
            arguments = ["train", "--model", model_folder, *data, "--output", folder, *TRAIN, "--resume"]
        failure = _failure_of([str(part) for part in arguments], capfd)
        if failure is not None:
            failures.append(f"round {number}: {verb}: {failure}")
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
    assert not failures, "\n".join(failures)


def _failure_of(arguments: list[str], capfd: pytest.CaptureFixture[str]) -> str | None:
    capfd.readouterr()
    try:
        with limited(SECONDS):
            code = main(arguments)
    except TooSlowError:
        return f"took more than {SECONDS} s"
    said = capfd.readouterr().err
    torch.set_default_dtype(torch.float32)
    last = said.strip().splitlines()[-1] if said.strip() else ""
    if code not in (0, 2) or "RW900" in said or "Traceback" in said or "RW550" in said:
        return f"exit {code}: {last[:1000]}"
    return f"{len(said):,} characters" if len(said) > 20_000 else None


def test_more_layers_than_a_model_has(rankwise, model_folder, tmp_path):
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    (tmp_path / "model" / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 2**31}))
    with limited(SECONDS):
        done = rankwise("generate", "--model", tmp_path / "model", "--prompt", "Hi")
    assert done.code == 2
    assert "error RW302: " in done.stderr
    assert "num_hidden_layers" in done.stderr


@pytest.mark.parametrize("field", ["target_modules", "exclude_modules", "rank_pattern"])
def test_an_expression_that_does_not_end(field, rankwise, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    endless = r"(\w|\w\w|\w\w\w|\w\w\w\w|\.)+[#!]"
    value = {endless: 2} if field == "rank_pattern" else endless
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with limited(SECONDS):
        done = rankwise("generate", "--adapter", tmp_path / "run", "--prompt", "Hi")
    assert done.code == 2
    assert "takes more than" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("verb", ["generate", "merge", "evaluate"])
def test_a_missing_shard(verb, rankwise, sharded, run_folder, rows_file, tmp_path):
    shutil.copytree(sharded, tmp_path / "model")
    sorted((tmp_path / "model").glob("*.safetensors"))[1].unlink()
    given = {
        "generate": ("--prompt", "Hi"),
        "merge": ("--adapter", run_folder, "--output", tmp_path / "out"),
        "evaluate": ("--task", "perplexity", "--data", rows_file, "--output", tmp_path / "out"),
    }
    done = rankwise(verb, "--model", tmp_path / "model", *given[verb])
    assert done.code == 2
    assert "error RW305: " in done.stderr or "error RW306: " in done.stderr
    assert "-of-0" in done.stderr
    assert not any(tmp_path.rglob("model.safetensors*json.*"))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("target_modules", [-1, 5]),
        ("target_modules", 5),
        ("modules_to_save", [None]),
        ("exclude_modules", {"q_proj": 1}),
        ("rank_pattern", {"(?i)q_proj": "x"}),
        ("layers_pattern", [3]),
        ("use_dora", "yes"),
        ("use_rslora", 3),
        ("layers_to_transform", ["0"]),
    ],
)
def test_an_adapter_setting_of_another_type_is_named(field, value, rankwise, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    done = rankwise("inspect", tmp_path / "run")
    assert done.code == 2
    assert "error RW410: " in done.stderr
    assert field in done.stderr


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "utf-8"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 70 + b"]" * 70, "nested more than 64 levels"),
        (b'{"a": NaN}', "nan"),
        (b'{"a": 1e999}', "not a finite number"),
        (b'{"a": ' + b"9" * 50 + b"}", "50 digits"),
        (b'"\\ud800"', "surrogates"),
    ],
)
def test_json_of_others_has_limits(content, reason):
    with pytest.raises(ValueError) as caught:
        parse_json(content)
    assert reason in str(caught.value).lower()


def test_a_named_pipe_is_no_settings_file(tmp_path):
    os.mkfifo(tmp_path / "config.json")
    with limited(10), pytest.raises(ValueError, match="not a regular file"):
        read_json(tmp_path / "config.json")


def test_a_base_model_that_is_no_name_is_shown_as_it_is(rankwise, run_folder, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": ["x"]}))
    done = rankwise("inspect", tmp_path / "run")
    assert done.code == 0
    assert any(line.split() == ["base", "model", "name", "or", "path", "x"] for line in done.stdout.splitlines())


@pytest.mark.parametrize(("field", "value"), [("base_model", []), ("data", {"train": []}), ("data", {"eval": "x"})])
def test_a_record_of_other_types_is_named_by_field(field, value, tmp_path):
    record = {"method": "lora", "seed": 0, "settings": {}, field: value}
    (tmp_path / "run.json").write_text(json.dumps(record))
    with pytest.raises(RunError, match=f"RW501: .*{field}"):
        load_record(tmp_path)


@pytest.mark.parametrize("value", ["null", '"8"', "true", "-1", "1e3", "99999999999"])
def test_a_length_of_rows_that_is_none_is_named(value, tmp_path):
    record = f'{{"method": "lora", "seed": 0, "settings": {{"max_length": {value}}}}}'
    (tmp_path / "run.json").write_text(record)
    with pytest.raises(RunError, match="RW501: .*max_length"):
        max_length_of([tmp_path])


def test_a_damaged_line_of_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2}\n{"step": 2, "lo')
    assert [line["step"] for line in read_metrics(tmp_path)] == [1]
    path.write_bytes(b'{"step": 1, "loss": 2}\n\xff\n{"step": 2, "loss": 1}\n')
    with pytest.raises(RunError, match="RW501: .*line 2"):
        list(read_metrics(tmp_path))


def test_what_is_damaged_was_sound_before(rankwise, stopped, compared, settings, model_folder, rows_file, tmp_path):
    """Else every round above would be refused for another reason."""
    shutil.copytree(stopped, tmp_path / "run")
    data = ["--data", rows_file, "--eval-data", rows_file]
    done = rankwise("train", "--model", model_folder, *data, "--output", tmp_path / "run", *TRAIN, "--resume")
    assert done.code == 0, done.stderr
    assert rankwise("report", compared, "--output", tmp_path / "report").code == 0
    assert rankwise("preview", "--config", settings / "run.yaml").code == 0


@pytest.mark.parametrize("verb", ["generate", "evaluate"])
def test_a_model_that_computes_nan_says_so(verb, rankwise, model_folder, rows_file, tmp_path):
    """Its weights are sound: a number in the configuration is not."""
    shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((model_folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 0, "rope_theta": 10000.0}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    given = {
        "generate": ("--prompt", "Hi"),
        "evaluate": ("--task", "perplexity", "--data", rows_file, "--output", tmp_path / "out"),
    }
    done = rankwise(verb, "--model", tmp_path / "model", *given[verb])
    assert done.code == 2
    assert "error RW323: " in done.stderr

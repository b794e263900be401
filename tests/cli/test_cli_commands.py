"""Each command on a tiny model, from the command line to what it leaves and says."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from rankwise.cli.main import COMMANDS
from rankwise.cli.options import options_of, panels_of
from rankwise.lora_config import ADAPTER, AdapterOptions, LoraConfig
from rankwise.options import Panel
from rankwise.planning.workload import Workload
from rankwise.training import session, setup


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_option_stands_under_a_heading_and_what_is_required_under_the_first(command):
    named = [option.field for options in panels_of(command).values() for option in options]
    assert sorted(named) == sorted(option.field for option in options_of(command))
    assert sorted(named) == sorted(command.settings.model_fields)
    if not named:
        # `doctor` has no options.
        return
    first, *others = panels_of(command).values()
    assert not [option.flag for options in others for option in options if "(required)" in option.help]
    assert first


@pytest.mark.parametrize("name", ["train", "compare", "plan"])
def test_an_option_of_the_adapter_is_one_of_every_command_that_trains_or_plans(name):
    (command,) = (command for command in COMMANDS if command.name == name)
    fields = {field.name for field in dataclasses.fields(AdapterOptions)}
    # Options of a run, such as --init, may follow.
    assert [option.field for option in panels_of(command)[Panel.ADAPTER]][: len(ADAPTER)] == list(ADAPTER)
    assert fields == set(ADAPTER)
    assert fields <= {field.name for field in dataclasses.fields(Workload)}
    assert fields <= {field.name for field in dataclasses.fields(LoraConfig)}


def test_train_says_what_came_of_it(run_folder, model_folder, rows_file, rankwise, tmp_path):
    output = tmp_path / "run"
    done = rankwise(
        *("train", "--model", model_folder, "--data", rows_file, "--eval-data", rows_file, "--output", output),
        *("--max-steps", 2, "--batch-size", 2, "--r", 2, "--logging-steps", 1, "--learning-rate", "1e-2"),
    )
    assert done.code == 0
    assert [line[:13] for line in done.stderr.splitlines()] == ["warning RW218"]
    for said in ("step 2/2", "tokens/s", "evaluation at step 0", "kept", "loss.svg", f"--adapter {output}"):
        assert said in done.stdout
    record = json.loads((output / "run.json").read_text())
    assert f"{record['initial_eval_loss']:.4f} -> {record['eval_loss']:.4f}" in done.stdout


def test_train_takes_a_file_and_prints_one_document(model_folder, rows_file, rankwise, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        f"model: {model_folder}\ndata: {rows_file}\nmethod: dora\nmax-steps: 3\nr: 2\nbatch-size: 2\n"
        "target-modules: [q_proj, v_proj]\n",
        encoding="utf-8",
    )
    done = rankwise("train", "--config", file, "--output", tmp_path / "run", "--max-steps", 1, "--json")
    assert done.code == 0
    assert done.document["method"] == "dora"
    assert done.document["steps"] == 1
    assert done.document["settings"]["target_modules"] == ["q_proj", "v_proj"]
    assert "step 1/1" in done.stderr


def terminating(function):
    """``function``, but SIGTERM comes when it is called."""

    def call(*arguments, **named):
        os.kill(os.getpid(), signal.SIGTERM)
        return function(*arguments, **named)

    return call


def test_sigterm_while_loading_leaves_nothing(model_folder, rows_file, rankwise, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "load_for_training", terminating(setup.load_for_training))
    done = rankwise("train", "--model", model_folder, "--data", rows_file, "--output", tmp_path / "run")
    assert done.code == 130
    assert "interrupted RW543" in done.stderr
    assert not (tmp_path / "run").exists()


def test_sigterm_while_saving_can_be_resumed(model_folder, rows_file, rankwise, tmp_path, monkeypatch):
    output = tmp_path / "run"
    command = ("train", "--model", model_folder, "--data", rows_file, "--output", output, "--max-steps", 1, "--r", 2)
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_weights", terminating(session.save_weights))
        done = rankwise(*command)
    assert done.code == 130
    assert "interrupted RW541" in done.stderr
    assert not list(output.glob("adapter*"))
    assert rankwise(*command, "--resume").code == 0
    assert json.loads((output / "run.json").read_text())["status"] == "finished"


def test_a_prompt_in_a_file_is_one_text(run_folder, rankwise, tmp_path):
    file = tmp_path / "ask.yaml"
    file.write_text(f"adapter: {run_folder}\nprompt: Hello, you, there\nmax-new-tokens: 2\n", encoding="utf-8")
    answers = rankwise("generate", "--config", file, "--json").document["answers"]
    assert [answer["prompt"] for answer in answers] == ["Hello, you, there"]


def test_preview_marks_the_trained_text(model_folder, rows_file, rankwise):
    done = rankwise("preview", "--model", model_folder, "--data", rows_file, "--row", 3)
    assert done.code == 0
    assert "[[It is 3.</s>]]" in done.stdout
    assert "user: What is 3?" in done.stdout
    assert "12 rows" in done.stdout
    assert "rows.jsonl, line 4" in done.stdout


def test_preview_as_document(model_folder, rows_file, rankwise):
    document = rankwise("preview", "--model", model_folder, "--data", rows_file, "--json").document
    trained = [segment["text"] for segment in document["row"]["segments"] if segment["trained"]]
    assert trained == ["It is 0.</s>"]
    assert document["data"]["rows"] == 12
    assert 0 < document["row"]["trained_tokens"] < document["row"]["tokens"]


def test_preview_says_that_rows_are_cut(model_folder, rows_file, rankwise):
    done = rankwise("preview", "--model", model_folder, "--data", rows_file, "--max-length", 36)
    assert "12 cut and 0 left out at --max-length 36" in done.stdout
    assert "NO stop token" in done.stdout
    assert "warning RW215" in done.stderr


def test_preview_shows_control_characters_instead_of_sending_them(model_folder, rankwise, tmp_path):
    path = tmp_path / "hostile.jsonl"
    path.write_text(json.dumps({"prompt": "a\x1b[2Jb", "completion": "c"}) + "\n", encoding="utf-8")
    done = rankwise("preview", "--model", model_folder, "--data", path)
    assert "\x1b" not in done.stdout
    assert r"a\u001b[2Jb" in done.stdout


def test_generate_needs_only_the_adapter(run_folder, rankwise):
    prompts = ("--prompt", "What is 1?", "--prompt", "What is 2?", "--max-new-tokens", 5)
    done = rankwise("generate", "--adapter", run_folder, *prompts, "--compare", "--json")
    assert done.code == 0
    assert [answer["prompt"] for answer in done.document["answers"]] == ["What is 1?", "What is 2?"]
    assert done.document["chat_template"] is True
    assert all(isinstance(answer["base"], str) for answer in done.document["answers"])


def test_generate_base_answers_as_without_the_adapter(run_folder, model_folder, rankwise):
    rest = ("--prompt", "What is 1?", "--max-new-tokens", 8, "--dtype", "float32", "--json")
    alone = rankwise("generate", "--model", model_folder, *rest).document["answers"][0]
    both = rankwise("generate", "--adapter", run_folder, "--compare", *rest).document["answers"][0]
    assert alone["base"] == both["base"]
    assert alone["tuned"] is None


def test_generate_says_that_the_limit_ended_an_answer(model_folder, rankwise, tmp_path):
    asked = ("generate", "--prompt", "x", "--max-new-tokens", 1, "--model")
    told = rankwise(*asked, model_folder)
    assert "the answer ended at the limit of 1 token " in told.stderr
    assert "the limit of" not in told.stdout
    assert rankwise(*asked, model_folder, "--json").document["answers"][0]["cut_at"] == {"base": 1}
    stops = shutil.copytree(model_folder, tmp_path / "stops")
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((stops / name).read_text())
        (stops / name).write_text(json.dumps({**settings, "eos_token_id": list(range(259))}))
    assert "the limit of" not in rankwise(*asked, stops).stderr
    assert rankwise(*asked, stops, "--json").document["answers"][0]["cut_at"] == {}


def test_generate_words_prompts_as_trained_wherever_it_runs(model_folder, rows_file, rankwise, tmp_path, monkeypatch):
    """The template lies in the run's folder: the file that training was given may have moved."""
    monkeypatch.chdir(tmp_path)
    Path("plain.jinja").write_text("{% for m in messages %}{{ m['content'] }}</s>{% endfor %}", encoding="utf-8")
    given = ("--model", model_folder, "--data", rows_file, "--chat-template", "plain.jinja", "--output", "run")
    assert rankwise("train", *given, "--max-steps", 1, "--batch-size", 2, "--r", 2).code == 0
    run = tmp_path / "run"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    done = rankwise("generate", "--adapter", run, "--prompt", "Hi", "--max-new-tokens", 2, "--json")
    assert done.code == 0
    assert done.document["chat_template"] is True


def test_generate_samples_by_seed(model_folder, rankwise):
    def text(seed):
        rest = ("--temperature", 2, "--seed", seed, "--max-new-tokens", 12, "--json")
        return rankwise("generate", "--model", model_folder, "--prompt", "x", *rest).document["answers"][0]["base"]

    assert text(1) == text(1)
    assert len({text(seed) for seed in range(4)}) > 1


def test_merge_writes_a_model_that_says_the_same(run_folder, rankwise, tmp_path):
    output = tmp_path / "merged"
    assert rankwise("merge", "--adapter", run_folder, "--output", output).code == 0
    rest = ("--prompt", "What is 1?", "--max-new-tokens", 8, "--dtype", "float32", "--json")
    tuned = rankwise("generate", "--adapter", run_folder, *rest).document["answers"][0]["tuned"]
    assert rankwise("generate", "--model", output, *rest).document["answers"][0]["base"] == tuned


@pytest.mark.parametrize(("mask", "file_mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_every_file_follows_the_umask(mask, file_mode, model_folder, rows_file, rankwise, tmp_path):
    """safetensors writes its files for their owner alone, whatever the umask says."""
    before = os.umask(mask)
    try:
        given = ("--model", model_folder, "--data", rows_file, "--max-steps", 1, "--batch-size", 2)
        for method in ("qlora", "full"):
            out = tmp_path / method
            done = rankwise("train", *given, "--method", method, "--output", out, "--cache", tmp_path / "cache")
            assert done.code == 0
        merged = ("--adapter", tmp_path / "qlora", "--output", tmp_path / "merged", "--onto", "quantized")
        assert rankwise("merge", *merged).code == 0
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len([path for path in files if path.suffix == ".safetensors"]) >= 6
    assert {
        path.name: oct(path.stat().st_mode & 0o777) for path in files if path.stat().st_mode & 0o777 != file_mode
    } == {}
    folders = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_dir()}
    assert folders == {0o777 & ~mask}


def test_merge_overwrites_nothing(run_folder, rankwise, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    before = files_of(tmp_path)
    done = rankwise("merge", "--adapter", run_folder, "--output", tmp_path)
    assert done.code == 2
    assert "RW532" in done.stderr
    assert files_of(tmp_path) == before


def test_inspect_an_adapter(run_folder, rankwise):
    done = rankwise("inspect", run_folder)
    assert done.code == 0
    for said in ("lora", "norm of B", "run: eval loss", "run: seed"):
        assert said in done.stdout


def test_inspect_counts_what_the_file_holds(run_folder, rankwise):
    document = rankwise("inspect", run_folder, "--json").document
    tensors = load_file(run_folder / "adapter_model.safetensors")
    norm = torch.cat([value.flatten() for key, value in tensors.items() if "lora_B" in key]).norm().item()
    assert document["tensors"] == len(tensors)
    assert document["numbers"] == sum(value.numel() for value in tensors.values())
    assert document["norm_of_B"]["total"] == pytest.approx(norm, rel=1e-5)
    assert len(document["norm_of_B"]["layers"]) == 2


def test_inspect_says_whether_the_adapter_fits(run_folder, model_folder, rankwise, tmp_path):
    assert rankwise("inspect", run_folder, "--model", model_folder, "--json").document["fits"]["shapes"] is True
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"hidden_size": 64, "head_dim": 16}))
    fit = rankwise("inspect", run_folder, "--model", other, "--json").document["fits"]
    assert fit["shapes"] is False
    assert fit["code"] == "RW411"


@pytest.mark.parametrize("command", ["inspect", "generate"])
def test_a_comparison_is_taken_for_no_run(command, rankwise, tmp_path):
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "best").mkdir()
    given = (tmp_path,) if command == "inspect" else ("--adapter", tmp_path, "--prompt", "Hi")
    done = rankwise(command, *given)
    assert done.code == 2
    assert (
        f"RW560: {tmp_path} is the folder of a comparison; give the run that it recommends, {tmp_path}/best."
        in done.stderr
    )


def renamed_base(run_folder, target, name):
    """The adapter of a run without its record, trained on ``name`` by its own word."""
    shutil.copytree(run_folder, target, ignore=shutil.ignore_patterns("run.json", "checkpoints"))
    config = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    return target


@pytest.mark.parametrize(
    ("named", "given", "warned"),
    [("owner/base", "owner/other", True), ("owner/base", "Owner/Base", False), ("owner/base", None, False)],
)
def test_shapes_that_fit_are_not_yet_the_same_model(
    named, given, warned, run_folder, model_folder, rankwise, tmp_path, monkeypatch
):
    """``given`` None is the model's folder, whose name says nothing."""
    adapter = renamed_base(run_folder, tmp_path / "adapter", named)
    monkeypatch.setattr("rankwise.models.source.download", lambda *_, **__: model_folder)
    model = ("--model", given or model_folder)
    prompt = ("--prompt", "Hi", "--max-new-tokens", 1)
    of_adapter = ("--adapter", adapter)
    for call in (
        ("generate", *prompt, *of_adapter),
        ("merge", "--output", tmp_path / "merged", *of_adapter),
        ("inspect", adapter),
    ):
        done = rankwise(*call, *model)
        assert done.code == 0
        assert done.stderr.count("warning RW417: ") == warned


def test_inspect_names_the_layer_that_learned_nothing(run_folder, rankwise, tmp_path):
    shutil.copytree(run_folder, tmp_path / "run")
    path = tmp_path / "run" / "adapter_model.safetensors"
    tensors = {key: value * (0 if ".layers.1." in key else 1) for key, value in load_file(path).items()}
    save_file(tensors, path)
    assert rankwise("inspect", tmp_path / "run", "--json").document["norm_of_B"]["zero_in_layers"] == [1]


def test_inspect_a_model(model_folder, rankwise):
    document = rankwise("inspect", model_folder, "--json").document
    assert document["kind"] == "model"
    assert document["architectures"] == ["LlamaForCausalLM"]

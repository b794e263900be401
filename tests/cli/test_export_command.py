"""``rankwise export`` and ``rankwise generate --chat`` by the command line."""

from __future__ import annotations

import errno
import io
import json
import shutil
import sys
import warnings
from pathlib import Path

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM

import rankwise as rw
from gguf_writer import write_folder_gguf
from rankwise.cli.export import warn_of_other_weights
from rankwise.cli.export_proof import prompts_of, rows_of
from rankwise.errors import DataError, RankwiseWarning
from rankwise.models import ModelSource, load_model, load_tokenizer
from rankwise.records import RunRecord, load_record
from rankwise.reports.numbers import visible

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2]])


@pytest.fixture
def run_folder(model_folder, tmp_path):
    """A DoRA run whose magnitudes have moved, with its data beside it."""

    def make(**settings):
        model, _ = load_model(str(model_folder))
        rw.add_adapter(model, rw.LoraConfig(**{"r": 2, "lora_alpha": 0.2, "init_lora_weights": False, **settings}))
        with torch.no_grad():
            for key, parameter in rw.adapter_parameters(model).items():
                if "magnitude" in key:
                    parameter.mul_(1 + 0.2 * torch.rand(parameter.shape))
        rw.save_adapter(model, tmp_path / "run", base_model=str(model_folder))
        rows = [{"messages": [{"role": "user", "content": f"what is {i}?"}, {"role": "assistant", "content": "a " * i}]}
                for i in range(1, 30)]  # fmt: skip
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
        RunRecord(
            method="dora", seed=0, settings={"model": str(model_folder), "data": str(tmp_path / "rows.jsonl")}
        ).save(tmp_path / "run")
        return tmp_path / "run"

    return make


def gguf_of(folder, place):
    return write_folder_gguf(place / "base.gguf", folder, "f16")


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_export_whose_proof_an_error_ends_does_not_stay(rankwise, run_folder, tmp_path, monkeypatch, error):
    there = []

    def prove(*_):
        # A kill would leave no more than this.
        there.append((tmp_path / "served").exists())
        raise error

    monkeypatch.setattr("rankwise.cli.export_proof.prove", prove)
    words = ("--adapter", run_folder(), "--for", "vllm", "--verify", "--server-python", sys.executable)
    for more in ((), ("--merged",)):
        done = rankwise("export", *words, *more, "--output", tmp_path / "served")
        assert "RW551" in done.stderr or "RW543" in done.stderr
        assert not (tmp_path / "served").exists()
    assert there == [False, False]


def test_over_another_base_than_trained_on_there_is_nothing_to_prove(rankwise, run_folder, model_folder, tmp_path):
    run = run_folder()
    record = load_record(run)
    record.base_model = {"sha256": "of other weights"}
    record.save(run)
    words = ("--adapter", run, "--model", model_folder, "--for", "vllm", "--verify", "--server-python", sys.executable)
    assert "error RW738: nothing can be proven" in rankwise("export", *words, "--output", tmp_path / "served").stderr
    assert not (tmp_path / "served").exists()


@pytest.mark.parametrize("case", ["architecture", "rank", "rows"])
def test_what_needs_no_model_is_refused_before_one_is_loaded(
    rankwise, run_folder, gpt2_folder, tmp_path, monkeypatch, case
):
    monkeypatch.setattr("rankwise.evaluation.engine.load_as_trained", lambda *_, **__: pytest.fail("loaded"))
    given = ["export", "--adapter", run_folder(use_dora=True), "--output", tmp_path / "served"]
    if case == "architecture":
        done = rankwise(*given, "--for", "llama.cpp", "--base-gguf", gguf_of(gpt2_folder, tmp_path))
    elif case == "rank":
        done = rankwise(*given, "--for", "vllm", "--rank", 600)
    else:
        (tmp_path / "rows.jsonl").write_text("{")
        done = rankwise(*given, "--for", "vllm")
    assert {"architecture": "RW743", "rank": "RW731", "rows": "RW203"}[case] in done.stderr
    assert not (tmp_path / "served").exists()


def test_the_command_names_the_gguf_that_was_given(rankwise, run_folder, model_folder, tmp_path):
    base = gguf_of(model_folder, tmp_path)
    given = ("--adapter", run_folder(), "--for", "llama.cpp", "--base-gguf", base, "--output", tmp_path / "out")
    assert f"llama-server --model {base} --lora {tmp_path}/out/adapter.gguf" in rankwise("export", *given).stdout


def test_lora_is_exported_exactly(rankwise, run_folder, model_folder, tmp_path):
    run = run_folder(use_rslora=True, rank_pattern={"q_proj": 3})
    done = rankwise("export", "--adapter", run, "--for", "vllm", "--output", tmp_path / "served", "--json")
    assert done.code == 0
    assert done.document["r"] == 3
    assert done.document["conversion"] is None
    assert done.document["commands"] == [
        f"vllm serve {model_folder} --enable-lora --lora-modules served={tmp_path}/served"
    ]
    theirs = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model_folder), tmp_path / "served")
    ours, _ = load_model(str(model_folder))
    rw.load_adapter(ours, run)
    torch.testing.assert_close(logits(theirs), logits(ours), rtol=1e-4, atol=1e-4)
    assert json.loads((tmp_path / "served" / "export.json").read_text())["r"] == 3


def test_dora_says_what_its_conversion_costs(rankwise, run_folder, tmp_path):
    run = run_folder(use_dora=True)
    given = ("export", "--adapter", run, "--for", "vllm", "--output", tmp_path / "served", "--max-error", 0.3)
    shown = rankwise(*given)
    assert shown.code == 0
    for words in ("relative error", "median layer", "all layers", "of rows that were set aside", "Perplexity: base"):
        assert words in shown.stdout
    assert "RW736" not in shown.stderr
    document = json.loads((tmp_path / "served" / "export.json").read_text())
    assert 0 < document["conversion"]["error"] <= 0.3
    assert len(document["conversion"]["by_layer"]) == 14
    assert document["likeness"]["tokens"] > 0


def test_without_rows_the_error_is_frobenius_and_that_is_said(rankwise, run_folder, tmp_path):
    run = run_folder(use_dora=True)
    (tmp_path / "rows.jsonl").unlink()
    done = rankwise("export", "--adapter", run, "--for", "peft", "--output", tmp_path / "served", "--rank", 4)
    assert "RW736" in done.stderr
    assert "in Frobenius norm" in done.stdout
    given = ("--rank", 4, "--data", tmp_path / "nothing.jsonl")
    again = rankwise("export", "--adapter", run, "--for", "peft", "--output", tmp_path / "again", *given)
    assert "RW201" in again.stderr


def test_rows_held_out_do_not_weigh_the_error(run_folder, model_folder, tmp_path):
    rows = rows_of(run_folder(), None, load_tokenizer(str(model_folder)))
    inputs = {tuple(row.tolist()) for row in rows.inputs}
    held_out = {tuple(row.ids.tolist()) for row in rows.held_out}
    assert len(inputs) + len(held_out) == 29
    assert not inputs & held_out
    for prompt, row in zip(prompts_of(rows, 3), rows.held_out):
        assert prompt == row.ids.tolist()[: len(prompt)]
        assert row.labels[len(prompt)] != -100


@pytest.mark.parametrize("objective", ["dpo", "kto", "grpo"])
def test_rows_of_other_objectives_are_their_good_answers(run_folder, model_folder, tmp_path, objective):
    folder = run_folder()
    pairs = [{"prompt": f"what is {i}?", "chosen": "a b", "rejected": "c d"} for i in range(1, 30)]
    marks = [
        {"prompt": f"what is {i}?", "completion": "a b" if i % 2 else "c d", "label": i % 2 == 1} for i in range(30)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, marks if objective == "kto" else pairs)))
    settings = {"model": str(model_folder), "data": str(tmp_path / "rows.jsonl")}
    RunRecord(method="dora", seed=0, settings=settings, objective=objective).save(folder)
    tokenizer = load_tokenizer(str(model_folder))
    if objective == "grpo":
        with pytest.raises(DataError, match="RW207: .* give some with --data"):
            rows_of(folder, None, tokenizer)
        return
    rows = rows_of(folder, None, tokenizer)
    texts = [tokenizer.decode(ids) for ids in [*rows.inputs, *(row.ids for row in rows.held_out)]]
    assert len(texts) == (15 if objective == "kto" else 29)
    assert all("a b" in text and "c d" not in text for text in texts)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        (("--for", "llama.cpp", "--merged", "--verify"), "RW112"),
        (("--for", "llama.cpp", "--merged", "--base-gguf", "x.gguf"), "RW112"),
        (("--for", "vllm", "--base-gguf", "x.gguf"), "RW112"),
        (("--for", "vllm", "--merged", "--rank", "3"), "RW112"),
        (("--for", "vllm", "--server-python", "/bin/sh"), "RW112"),
        (("--for", "vllm", "--data", "rows.jsonl"), "RW201"),
        (("--for", "ollama"), "RW737"),
        (("--for", "sglang", "--verify"), "RW739"),
        (("--for", "tgi"), "RW103"),
        ((), "RW103"),
    ],
)
def test_options_without_effect_are_refused(rankwise, run_folder, tmp_path, options, code):
    done = rankwise("export", "--adapter", run_folder(), "--output", tmp_path / "served", *options)
    assert done.code == 2
    assert code in done.stderr
    assert not (tmp_path / "served").exists()


def test_a_server_that_loads_other_weights_than_were_trained_is_warned_of():
    demo = ModelSource(kind="demo", name="demo", path=Path("demo.gguf"), base_model="owner/name")
    for target in ("vllm", "sglang", "peft"):
        with pytest.warns(RankwiseWarning, match=r"(?s)owner/name.*--merged"):
            warn_of_other_weights(demo, target)
    folder = ModelSource(kind="folder", name="base", path=Path("base"), base_model="/base")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_of_other_weights(demo, "llama.cpp")
        warn_of_other_weights(folder, "vllm")


def test_a_merged_export_for_vllm_is_an_ordinary_folder(rankwise, run_folder, tmp_path):
    run = run_folder(use_dora=True)
    done = rankwise("export", "--adapter", run, "--for", "vllm", "--merged", "--output", tmp_path / "served", "--json")
    assert done.document["commands"] == [f"vllm serve {tmp_path}/served"]
    adapted, _ = load_model(done.document["base_model"])
    rw.load_adapter(adapted, run)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "served")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("target", "serves"), [("llama.cpp", "llama-server --model"), ("ollama", "ollama create")])
def test_a_merged_export_for_llama_cpp_names_its_converter(rankwise, run_folder, tmp_path, target, serves):
    given = ("--adapter", run_folder(), "--for", target, "--merged", "--output", tmp_path / "served", "--json")
    convert, serve, *_ = rankwise("export", *given).document["commands"]
    assert convert.endswith(f"convert_hf_to_gguf.py {tmp_path}/served --outfile {tmp_path}/served/model.gguf")
    assert serve.startswith(serves)
    assert (tmp_path / "served" / "model.safetensors").is_file()
    assert (tmp_path / "served" / "Modelfile").exists() == (target == "ollama")


def test_a_proof_by_llama_cpp_needs_the_base_s_gguf(rankwise, run_folder, tmp_path):
    given = ("--for", "llama.cpp", "--verify", "--server-python", sys.executable, "--output", tmp_path / "served")
    done = rankwise("export", "--adapter", run_folder(), *given)
    assert "RW737" in done.stderr
    assert not (tmp_path / "served").exists()


def test_inspect_says_who_serves_it(rankwise, run_folder):
    found = rankwise("inspect", run_folder(use_dora=True), "--json").document["served_by"]
    assert any("export --for vllm" in place and "DoRA" in place for place in found)


@pytest.fixture
def says(monkeypatch):
    return lambda *lines: monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))


def test_a_conversation_keeps_its_history(rankwise, model_folder, says):
    says("hello", "", "and then?")
    given = ("generate", "--chat", "--model", model_folder, "--max-new-tokens", 4, "--system", "be brief", "--json")
    messages = rankwise(*given).document["messages"]
    assert [message["role"] for message in messages] == ["system", "user", "assistant", "user", "assistant"]
    says("hello", "/new", "other", "/exit", "never read")
    messages = rankwise(*given).document["messages"]
    assert [message["content"] for message in messages][:2] == ["be brief", "other"]
    assert len(messages) == 3


def test_a_chat_answers_as_generate_does(rankwise, model_folder, says):
    says("hello")
    told = rankwise("generate", "--chat", "--model", model_folder, "--max-new-tokens", 6)
    asked = ("generate", "--model", model_folder, "--max-new-tokens", 6, "--prompt", "hello", "--json")
    answer = rankwise(*asked).document["answers"][0]["base"]
    says("hello")
    given = ("generate", "--chat", "--model", model_folder, "--max-new-tokens", 6, "--json")
    assert rankwise(*given).document["messages"][1]["content"] == answer
    assert visible(answer) in told.stdout
    assert "ended at the limit of 6 tokens" in told.stderr


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_chat_takes_utf8(errors, rankwise, model_folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9\n"), encoding="utf-8", errors=errors))
    done = rankwise("generate", "--chat", "--model", model_folder)
    assert done.code == 2
    assert "error RW205: a line of standard input is not UTF-8" in done.stderr


def test_a_chat_without_a_template_is_refused(rankwise, model_folder, tmp_path, says):
    shutil.copytree(model_folder, tmp_path / "plain")
    for name in ("chat_template.jinja",):
        (tmp_path / "plain" / name).unlink(missing_ok=True)
    config = tmp_path / "plain" / "tokenizer_config.json"
    stored = json.loads(config.read_text())
    stored.pop("chat_template", None)
    config.write_text(json.dumps(stored))
    assert "RW121" in rankwise("generate", "--chat", "--model", model_folder, "--prompt", "hello").stderr
    says("hello")
    assert "RW121" in rankwise("generate", "--chat", "--model", tmp_path / "plain").stderr

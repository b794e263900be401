"""The commands on a GGUF file in its own bits: a run over it is planned, trained, loaded and merged over the same bits,
and refused in one sentence where that cannot be."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import pytest

from gguf_cases import base_gguf, saved
from rankwise.adapters.folder import four_bits_of, quantization_of
from rankwise.cli import generate
from rankwise.foreign import sha256_of
from rankwise.models.gguf_file import read_gguf_header
from rankwise.quantization import Linear4bit
from rankwise.records import load_record
from rankwise.verbs.settings import GenerateSettings

pytestmark = pytest.mark.filterwarnings("ignore:RW319")


@pytest.fixture
def gguf_file(tmp_path: Path) -> Path:
    saved("llama", tmp_path)
    return base_gguf(tmp_path, "q8_0")


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    rows = [{"prompt": f"add{i}", "completion": f"ab{i}cab"} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "rows.jsonl"


def train(rankwise, model: Path, rows: Path, output: Path, *options: object):
    return rankwise("train", "--model", model, "--data", rows, "--output", output, "--max-steps", 2, *options)


def is_packed(model: str, adapter: Path | None, **options: object) -> bool:
    settings = GenerateSettings(prompt=("Hi",), model=model, adapter=adapter, **options)
    speaker, _ = generate.load_speaker(settings, model, generate.record_of(adapter))
    return any(isinstance(module, Linear4bit) for module in speaker.model.modules())


def test_a_run_trains_over_the_file_and_is_loaded_as_it_was_trained(rankwise, gguf_file, rows_file, tmp_path):
    run = tmp_path / "run"
    assert train(rankwise, gguf_file, rows_file, run, "--method", "dora").code == 0
    record = load_record(run)
    assert record.base_model["quantization"]["quant_type"] == "file"
    assert quantization_of(run).quant_type == "file"
    assert four_bits_of(run) is None
    assert is_packed(str(gguf_file), run)
    assert not is_packed(str(gguf_file), run, base_bits="16")
    done = rankwise("merge", "--adapter", run, "--output", tmp_path / "merged", "--verify", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["merged_modules"] > 0


def test_16_expands_it_as_before(rankwise, gguf_file, rows_file, tmp_path):
    assert train(rankwise, gguf_file, rows_file, tmp_path / "run", "--base-bits", "16").code == 0
    assert load_record(tmp_path / "run").base_model["quantization"] is None
    assert not is_packed(str(gguf_file), tmp_path / "run")
    assert is_packed(str(gguf_file), None)


def test_the_plan_s_weights_are_the_file_s(rankwise, gguf_file):
    tensors = read_gguf_header(gguf_file).tensors.values()
    planned = rankwise("plan", "--model", gguf_file, "--method", "lora,qlora", "--dtype", "bfloat16", "--json")
    found = {name: row["breakdown"] for name, row in json.loads(planned.stdout)["methods"].items()}
    packed = sum(one.end - one.begin for one in tensors if one.ggml_type == gguf.GGMLQuantizationType.Q8_0)
    assert found["lora"]["weights_4bit"] == packed
    assert found["qlora"]["weights_4bit"] != packed


@pytest.mark.parametrize(
    "options",
    [
        ("--base-bits", "file", "--method", "qlora"),
        ("--base-bits", "file", "--method", "full"),
        ("--init", "pissa"),
        ("--new-tokens", "a,b"),
        ("--strategy", "fsdp", "--devices", 2),
    ],
)
def test_what_changes_the_base_s_weights_is_refused(options, rankwise, gguf_file, rows_file, tmp_path):
    done = train(rankwise, gguf_file, rows_file, tmp_path / "run", *options)
    assert done.code == 2
    assert "error RW112" in done.stderr
    assert not (tmp_path / "run").exists()


def test_rounding_a_file_again_is_said(rankwise, gguf_file, rows_file, tmp_path):
    done = train(rankwise, gguf_file, rows_file, tmp_path / "run", "--method", "qlora", "--block-size", 32)
    assert done.code == 0, done.stderr
    assert "RW179" in done.stderr


def test_a_comparison_mixes_no_bases(rankwise, gguf_file, rows_file, tmp_path):
    asked = (
        "compare",
        "--model",
        gguf_file,
        "--data",
        rows_file,
        "--output",
        tmp_path / "c",
        "--methods",
        "lora,qlora",
    )
    done = rankwise(*asked)
    assert done.code == 2
    assert "RW167: qlora would train over other bits" in done.stderr


def test_an_export_names_the_very_file_by_its_hash(rankwise, gguf_file, rows_file, tmp_path):
    assert train(rankwise, gguf_file, rows_file, tmp_path / "run").code == 0
    asked = ("export", "--adapter", tmp_path / "run", "--for", "llama.cpp", "--output")
    done = rankwise(*asked, tmp_path / "served", "--json")
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["base_gguf_sha256"] == sha256_of(gguf_file)
    other = tmp_path / "other.gguf"
    other.write_bytes(gguf_file.read_bytes() + b"\0")
    done = rankwise(*asked, tmp_path / "again", "--base-gguf", other)
    assert done.code == 2
    assert "RW743" in done.stderr


OBJECTIVES = {
    "dpo": ({"prompt": "add", "chosen": "ab", "rejected": "ba"}, ()),
    "grpo": ({"prompt": "add"}, ("--reward", "length=3", "--max-completion-length", 4)),
    "classify": ({"text": "add", "label": "sum"}, ()),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_every_kind_of_objective_learns_over_the_file(objective, rankwise, gguf_file, tmp_path):
    row, options = OBJECTIVES[objective]
    others = {"label": "other", "text": "sub"} if objective == "classify" else {}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [row, {**row, **others}] * 4)))
    done = train(
        rankwise, gguf_file, tmp_path / "rows.jsonl", tmp_path / "run", "--objective", objective,
        "--max-length", 64, *options,
    )  # fmt: skip
    assert done.code == 0, done.stderr
    assert load_record(tmp_path / "run").base_model["quantization"]["quant_type"] == "file"

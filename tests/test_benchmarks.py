"""The benchmarks of training run, on a model of a few elements, and their pages are what their runs make."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankwise import ops
from rankwise.models.gguf_file import ARCHITECTURES
from tiny_models import tiny_llama

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("peft", reason="the benchmarks compare with PEFT: pip install '.[bench]'")
pytest.importorskip("bitsandbytes", reason="the benchmarks compare with bitsandbytes: pip install '.[bench]'")
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import end_to_end  # noqa: E402
import evidence  # noqa: E402
import memory_plan  # noqa: E402
import pages  # noqa: E402
import results  # noqa: E402
import steps  # noqa: E402
import timing  # noqa: E402

WORDS = [f"w{index}" for index in range(90)]


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks silence libraries for their whole process; other tests must not feel it."""
    monkeypatch.setattr(contenders, "silence", lambda: None)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """A tiny bfloat16 Llama with a tokenizer of whole words."""
    folder = tmp_path / "base"
    tiny_llama(hidden_size=64, intermediate_size=128).to(torch.bfloat16).save_pretrained(folder)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=inner, **special).save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What a benchmark does in fresh processes happens in this one: importing torch anew takes seconds."""

    def run(script: str, arguments: list[str]) -> dict[str, Any]:
        answer = tmp_path / "answer.json"
        modules = {"steps": steps, "end_to_end": end_to_end}
        modules[Path(script).stem].main([*arguments, "--answer", str(answer)])
        return {**json.loads(answer.read_text()), "process_peak_bytes": 1}

    monkeypatch.setattr(timing, "in_fresh_process", run)


@pytest.mark.parametrize("method", contenders.METHODS)
def test_flops_lie_between_the_floor_and_the_peer(method: str, base: Path) -> None:
    """Both sides make at least the frozen products but the first layer's input gradients, and ours never more."""
    ids = torch.randint(0, 97, (2, 16))
    counted = {}
    for side in contenders.SIDES:
        model = contenders.build(side, str(base), method, 0.0)
        step = contenders.Step(model, ids)
        counted[side] = steps.counted_flops(model, step)
        assert all(parameter.grad is None for parameter in model.parameters()), "counting leaves nothing behind"
    floor = timing.flops(timing.Floor(steps.dense_shapes(str(base)), ids.numel()))
    assert 0.8 * floor < counted["ours"] <= counted["peft"]
    assert ops.implementation(torch.empty(1)) == ops.implementation(torch.empty(2))


@pytest.mark.parametrize("subject", pages.MEASURED)
def test_a_page_is_what_its_runs_make(subject: str) -> None:
    """``python benchmarks/pages.py`` writes them again after a change of their layout."""
    assert (results.FOLDER / f"{subject}.md").read_text(encoding="utf-8") == pages.text_of(subject)


@pytest.mark.parametrize("subject", pages.SUBJECTS)
def test_a_subject_without_runs_has_no_page(subject: str) -> None:
    assert (results.FOLDER / f"{subject}.md").exists() is (subject in pages.MEASURED)


def test_the_plan_meets_whole_runs() -> None:
    rows = [row for run in results.runs_of("memory", results.FOLDER) for row in run["rows"]]
    assert len(rows) >= 25
    assert abs(statistics.median(memory_plan.errors(rows))) <= 0.02
    assert sum(map(memory_plan.is_within, rows)) >= 0.95 * len(rows)


# Exported as their text parts.
AS_TEXT = {"gemma3", "gemma4", "qwen3_5"}


def test_the_page_of_families_names_all_that_are_there() -> None:
    """`make families` writes it again after a change of the families that transformers or the export know."""
    (run,) = results.runs_of("families", results.FOLDER)
    found = run["outcomes"]
    if run["versions"]["transformers"] == transformers.__version__:
        assert found["trained"].keys() == found["merged"].keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    exported = ARCHITECTURES.keys() - AS_TEXT
    assert found["llama.cpp"].keys() == exported
    text = (results.FOLDER / "families.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in text for family in [*found["trained"], *exported])


# --- each benchmark, once ---


@pytest.mark.usefixtures("here")
def test_steps_measures_and_writes(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "results"
    steps.main([str(base), "--methods", "qdora", "--quick", "--output", str(output)])
    result = json.loads(next(output.glob("steps_*.json")).read_text())
    (row,) = result["rows"]
    assert set(row["seconds"]) == {"ours", "peft", "our LoRA", "floor"}
    assert row["ratios"]["saved"] < 0.3, "the layers' inputs and little else"
    assert row["adapter_dtypes"] == {"ours": ["float32"], "peft": ["float32"]}
    page = (output / "steps.md").read_text()
    assert "qdora" in page
    assert str(tmp_path) not in page + json.dumps(result)


@pytest.mark.usefixtures("here")
def test_end_to_end_trains_both_on_the_same_rows(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [f'"{" ".join(WORDS[i : i + 4])}","{" ".join(WORDS[i + 4 : i + 9])}"' for i in range(30)]
    data = tmp_path / "e2e.csv"
    data.write_text("\n".join(["mr,ref", *lines]) + "\n")
    monkeypatch.setattr(timing, "watched", _command_in_this_process)
    output = tmp_path / "results"
    small = ["--methods", "lora", "--steps", "2", "--batch", "2", "--max-length", "32", "--eval-rows", "5"]
    end_to_end.main([str(data), "--eval-data", str(data), "--model", str(base), *small, "--output", str(output)])
    (row,) = json.loads(next(output.glob("end_to_end_*.json")).read_text())["rows"]
    assert row["ours"]["examples"] == row["peer"]["examples"] == 4
    for key in ("tokens", "trained_tokens"):
        assert row["ours"][key] == row["peer"][key], "the same tokens, and the same of them with a label"
    losses = row["eval_loss"]
    assert losses["ours"] == pytest.approx(losses["peer"], rel=0.02), "two steps from one base end close together"
    assert losses["ours"] != losses["base"]
    assert losses["peer"] != losses["base"]
    assert str(tmp_path) not in (output / "end_to_end.md").read_text()


def test_end_to_end_says_which_records_are_of_eight_bits() -> None:
    page = pages.text_of("end_to_end").splitlines()
    for run in results.runs_of("end_to_end", results.FOLDER):
        rows = [line for line in page if line.startswith(f"| {results.processor(run)} |")]
        assert all(("in 8 bits" in line) == ("in 8 bits" in run["rows"][0]["ours"]["acceleration"]) for line in rows)


@pytest.mark.parametrize(("version", "known"), [("0.1.0", False), ("0.1.1.dev3+g0123abc", True)])
def test_a_record_of_an_unknown_commit_says_so(version: str, known: bool) -> None:
    run = {"machine": results.machine(), "versions": {"rankwise": version}, "command": "python x.py"}
    assert ("(commit unknown)" in results.where_from([run])[0]) is not known


def test_four_bits_times_every_promise(tmp_path: Path) -> None:
    words = ["--size", "128", "256", "--rounds", "3", "--output", str(tmp_path), "--name", "four_bits_small"]
    # Its own process: the import silences logging.
    subprocess.run([sys.executable, str(BENCHMARKS / "four_bits.py"), *words], check=True, capture_output=True)
    assert "2048 forward + input gradient | bf16" in (tmp_path / "four_bits.md").read_text(encoding="utf-8")


def _command_in_this_process(command: list[str]) -> int:
    from rankwise.cli.main import main

    assert command[1:3] == ["-m", "rankwise"]
    assert main(command[3:]) == 0
    return 1


@pytest.mark.usefixtures("here")
def test_evidence_goes_on_with_its_list_and_marks_what_has_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    machine = results.machine()
    side = {"tokens": 10, "train_seconds": 2.0, "peak_memory_bytes": 3e6, "acceleration": ""}

    def measured(cell: evidence.Cell, given: object) -> dict[str, Any]:
        ran.append(str(cell))
        return {"ours": side, "peer": {**side, "train_seconds": 8.0}, "eval_loss": {"base": 2, "peer": 1, "ours": 1}}

    monkeypatch.setattr(evidence, "measured", measured)
    words = [str(tmp_path), "--data", "t.csv", "--eval-data", "d.csv", "--output", str(tmp_path)]
    evidence.main([*words, "--cells", "1"])
    # Another processor goes on with the same list.
    monkeypatch.setattr(results, "machine", lambda: {**machine, "processor": "Other CPU"})
    evidence.main([*words, "--cells", "2"])
    assert ran == [str(cell) for cell in evidence.cells()][:3]
    rows = [line for line in (tmp_path / "evidence.md").read_text().splitlines() if line.startswith("| 0.5B | qlora")]
    assert "1 of 3" in rows[0]
    assert "4.00" in rows[0]
    assert (tmp_path / "evidence.md").read_text().count("Other CPU") == 3
    assert "not run yet" in (tmp_path / "evidence.md").read_text()
    # Classes of processors that this one cannot be are left for others.
    monkeypatch.setattr(evidence.native, "usable_levels", lambda: ("avx2",))
    evidence.main(words)
    assert ran[3:] == [str(cell) for cell in evidence.cells() if cell.level in ("", "avx2")][3:]

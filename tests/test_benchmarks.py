"""The benchmarks of training run, on models of a few elements, and count what they say they count."""

from __future__ import annotations

import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rankwise import ops
from rankwise.export.gguf import ARCHITECTURES
from tiny_models import tiny_llama

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("peft", reason="the benchmarks compare with PEFT: pip install 'rankwise[bench]'")
pytest.importorskip("bitsandbytes", reason="the benchmarks compare with bitsandbytes: pip install 'rankwise[bench]'")
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import end_to_end  # noqa: E402
import memory_plan  # noqa: E402
import neighbours  # noqa: E402
import pages  # noqa: E402
import quantized_load  # noqa: E402
import results  # noqa: E402
import scaling  # noqa: E402
import steps  # noqa: E402
import timing  # noqa: E402
import tried_families  # noqa: E402

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
        modules = {"steps": steps, "end_to_end": end_to_end, "scaling": scaling, "neighbours": neighbours}
        modules[Path(script).stem].main([*arguments, "--answer", str(answer)])
        return {**json.loads(answer.read_text()), "process_peak_bytes": 1}

    monkeypatch.setattr(timing, "in_fresh_process", run)


def test_saved_bytes_are_the_storages_that_autograd_keeps() -> None:
    layer = nn.Linear(8, 16, bias=False)
    x = torch.randn(4, 8)
    # The product keeps x for the weight's gradient; the weight itself is a parameter. exp keeps its result.
    assert timing.saved_bytes(layer, lambda: layer(x).exp()) == x.nbytes + 4 * 16 * 4


def test_views_of_one_storage_count_once() -> None:
    x = torch.randn(6, 8, requires_grad=True)
    assert timing.saved_bytes(nn.Identity(), lambda: x[:3].exp() + (x[0] * x[1]).sum()) == 3 * 8 * 4 + x.nbytes


def test_floor_makes_every_product_twice() -> None:
    model = tiny_llama()
    shapes = timing.linear_shapes(model)
    assert (97, 32) in shapes, "the output head is one of them"
    T = 5
    floor = timing.Floor(shapes, T)
    assert timing.flops(floor) == sum(2 * 2 * T * N * K for N, K in shapes)
    shared = timing.Floor(shapes, T, share_weights=True)
    assert timing.flops(shared) == timing.flops(floor)
    assert len({id(W) for W in shared.W}) == len(set(shapes))


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


def test_watched_sees_the_memory_of_another_process_and_its_failure() -> None:
    grown = timing.watched([sys.executable, "-c", "import time; x = bytearray(b'1') * (64 << 20); time.sleep(1)"])
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory of a process is read from Linux's /proc")
    assert 64 << 20 < grown < 256 << 20
    with pytest.raises(RuntimeError, match="went wrong"):
        timing.watched([sys.executable, "-c", "raise SystemExit('went wrong')"])


def test_judged_says_which_side_of_the_goal() -> None:
    assert results.judged(1.3, 1.35, at_most=True) == "1.30 (<= 1.35: kept)"
    assert results.judged(1.4, 1.35, at_most=True) == "1.40 (<= 1.35: missed)"
    assert results.judged(3.2, 3.0, at_most=False) == "3.20 (>= 3: kept)"
    assert results.judged(2.0, None, at_most=True) == "2.00"


def test_command_leaves_folders_of_the_machine_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["/somewhere/steps.py", str(tmp_path / "smol"), "--rounds", "3"])
    assert results.command() == "python benchmarks/steps.py smol --rounds 3"


@pytest.mark.parametrize("subject", pages.SUBJECTS)
def test_a_page_is_what_its_runs_make(subject: str) -> None:
    """``python benchmarks/pages.py`` writes them again after a change of their layout."""
    assert (results.FOLDER / f"{subject}.md").read_text(encoding="utf-8") == pages.text_of(subject)


def test_the_plan_meets_whole_runs() -> None:
    off = [error for run in results.runs_of("memory", results.FOLDER) for error in memory_plan.errors(run["rows"])]
    assert len(off) >= 25
    assert abs(statistics.median(off)) <= 0.02
    assert sum(abs(error) <= memory_plan.GOAL for error in off) >= 0.95 * len(off)


def test_the_page_of_families_names_all_that_are_there() -> None:
    """`make families` writes it again after a change of the families that transformers or the export know."""
    (run,) = results.runs_of("families", results.FOLDER)
    found = run["outcomes"]
    if run["versions"]["transformers"] == transformers.__version__:
        assert found["trained"].keys() == found["merged"].keys() == MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys()
    # gemma3 is exported as its text part, gemma3_text.
    assert found["llama.cpp"].keys() == ARCHITECTURES.keys() - {"gemma3"}
    text = (results.FOLDER / "families.md").read_text(encoding="utf-8")
    assert all(f"`{family}`" in text for family in [*found["trained"], *ARCHITECTURES.keys() - {"gemma3"}])


def test_families_are_read_from_the_outcomes_of_tests(tmp_path: Path) -> None:
    case = '<testcase name="test_a_trace_plans_it[{}]">{}</testcase>'
    skipped = '<skipped message="not  made small"/>'
    cases = [case.format("llama", ""), case.format("gpt-sw3", skipped), '<testcase name="test_another[llama]"/>']
    (tmp_path / "found.xml").write_text(f"<testsuite>{''.join(cases)}</testsuite>")
    assert tried_families.outcomes(tmp_path / "found.xml")["planned"] == {"llama": "", "gpt-sw3": "not made small"}
    (tmp_path / "found.xml").write_text(f"<testsuite>{case.format('llama', '<failure/>')}</testsuite>")
    with pytest.raises(ValueError, match="llama.* failed"):
        tried_families.outcomes(tmp_path / "found.xml")


def test_runs_of_other_processors_join_the_page_of_their_subject(tmp_path: Path) -> None:
    def run(instructions: str, dtype: str) -> results.Run:
        about = {"processor": "Intel(R) Xeon(R) Processor", "instructions": instructions, "cores": 2, "threads": 2}
        return {
            "machine": {**about, "memory_gb": None, "python": "3"},
            "versions": {"torch": "2", "peft": None},
            "command": "python benchmarks/x.py",
            "dtype": dtype,
        }

    def page(runs: list[results.Run]) -> list[str]:
        return [*results.where_from(runs), *results.table(["processor", "dtype"], map(results.row_name, runs))]

    for instructions, dtype in (("AVX2", "float32"), ("AVX2", "bfloat16"), ("AMX", "bfloat16")):
        results.publish(tmp_path, "subject", run(instructions, dtype), page)
    assert sorted(path.name for path in tmp_path.glob("*.json")) == [
        "subject_amx.json",
        "subject_avx2.json",
        "subject_avx2_float32.json",
    ]
    lines = (tmp_path / "subject.md").read_text().splitlines()
    rows = [line for line in lines if line.startswith("| Intel")]
    named = ("AMX | bfloat16", "AVX2 | bfloat16", "AVX2 | float32")
    assert rows == [f"| Intel Xeon, {name} |" for name in named]
    results.publish(tmp_path / "named", "subject", run("AMX", "float32"), page, "mine")
    assert (tmp_path / "named" / "subject_mine.json").exists()
    assert "| Intel Xeon, AMX | float32 |" in (tmp_path / "named" / "subject.md").read_text()
    assert lines[0] == "- **Intel Xeon, AMX** (2 cores, 2 threads), Python 3; torch 2: `python benchmarks/x.py`"


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
def test_neighbours_measures_and_writes(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    options = ["--spins", "default", "7", "--busy", "1", "--batch", "1", "--length", "8", "--rounds", "1"]
    neighbours.main([str(base), *options, "--output", str(tmp_path)])
    result = json.loads(next(tmp_path.glob("neighbours_*.json")).read_text())
    cases = ["alone", "beside 1", "on one core"]
    assert {spin: list(found) for spin, found in result["seconds"].items()} == {"default": cases, "7": cases}
    assert set(result["seconds"]["7"]["on one core"]) == set(neighbours.SIDES)
    assert len(os.sched_getaffinity(0)) == len(os.sched_getaffinity(os.getppid()))
    page = (tmp_path / "neighbours.md").read_text()
    assert "| as libgomp does by default | ours |" in page
    assert "| GOMP_SPINCOUNT=7 | products |" in page
    assert os.environ["GOMP_SPINCOUNT"] == "7"


def test_quantized_load_measures_and_writes(base: Path, tmp_path: Path) -> None:
    quantized_load.main(["--model", str(base), "--rounds", "1", "--output", str(tmp_path)])
    result = json.loads(next(tmp_path.glob("quantized_load_*.json")).read_text())
    assert set(result["seconds"]) == {"plain", *quantized_load.OURS, "NF4, bitsandbytes"}
    assert "Loading base" in (tmp_path / "quantized_load.md").read_text()


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


def _command_in_this_process(command: list[str]) -> int:
    from rankwise.cli.main import main

    assert command[1:3] == ["-m", "rankwise.cli.main"]
    assert main(command[3:]) == 0
    return 1


def test_mean_loss_is_per_labelled_token(base: Path) -> None:
    model = contenders.ours(str(base), "lora", 0.0).float()
    ids = torch.randint(3, 97, (1, 9))
    labels = ids.clone()
    labels[0, :4] = -100
    rows = [(ids[0].tolist(), labels[0].tolist()), ([5, 6, 7], [-100, -100, 7])]
    plain = tiny_llama(hidden_size=64, intermediate_size=128).bfloat16().float()
    with torch.no_grad():
        total = [float(plain(input_ids=torch.tensor([i]), labels=torch.tensor([wanted])).loss) for i, wanted in rows]
    expected = (5 * total[0] + 1 * total[1]) / 6
    assert end_to_end.mean_loss(model, [rows]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.usefixtures("here")
def test_scaling_measures_and_writes(base: Path, tmp_path: Path) -> None:
    output = tmp_path / "results"
    small = "--lengths 16 32 --vocabularies 500 1000 --batch 1 --tokens 16 --rounds 1"
    scaling.main([str(base), *small.split(), "--output", str(output)])
    result = json.loads(next(output.glob("scaling_*.json")).read_text())
    assert [row["length"] for row in result["lengths"]] == [16, 32]
    first, second = (row["saved_bytes"] for row in result["lengths"])
    assert first < second < 2.5 * first, "memory grows with the tokens, not with their square"
    weights = [row["ours"]["weight_bytes"] for row in result["vocabularies"]]
    assert weights[1] - weights[0] == 500 * scaling.WIDTH * 2

"""The benchmarks of training run, on models of a few elements, and count what they say they count."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from rankwise import ops
from rankwise.planning.speed import LAUNCHES
from tiny_models import tiny_llama

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("peft", reason="the benchmarks compare with PEFT: pip install 'rankwise[bench]'")
pytest.importorskip("bitsandbytes", reason="the benchmarks compare with bitsandbytes: pip install 'rankwise[bench]'")
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import end_to_end  # noqa: E402
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_job  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_models  # noqa: E402
import gpu_paper  # noqa: E402
import pages  # noqa: E402
import quantized_load  # noqa: E402
import replay_halving  # noqa: E402
import results  # noqa: E402
import scaling  # noqa: E402
import stand_in  # noqa: E402
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
        modules = {"steps": steps, "end_to_end": end_to_end, "scaling": scaling}
        modules[Path(script).stem].main([*arguments, "--answer", str(answer)])
        return {**json.loads(answer.read_text()), "process_peak_bytes": 1}

    monkeypatch.setattr(timing, "in_fresh_process", run)


# --- what is counted ---


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


def test_alternate_calls_everyone_in_every_round() -> None:
    order: list[str] = []
    calls = {
        name: ((lambda name=name: order.append(name)), (lambda name=name: order.append(f"{name} back")))
        for name in ("a", "b")
    }
    seconds = timing.alternate(calls, 2, warmup=1)
    assert order == ["a", "a back", "b", "b back"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]


def test_watched_sees_the_memory_of_another_process_and_its_failure() -> None:
    grown = timing.watched([sys.executable, "-c", "import time; x = bytearray(b'1') * (64 << 20); time.sleep(1)"])
    if not Path("/proc/self/status").exists():
        pytest.skip("anonymous memory of a process is read from Linux's /proc")
    assert 64 << 20 < grown < 256 << 20
    with pytest.raises(RuntimeError, match="went wrong"):
        timing.watched([sys.executable, "-c", "raise SystemExit('went wrong')"])


def test_a_replay_stops_rates_by_their_recorded_curves() -> None:
    """Six rates get 5 steps each, two get 15: of them the one that is lower at step 15 stays."""
    rates = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    curves = {rate: ([0, 10, 60], [4.0, 3.0 + n, 2.0]) for n, rate in enumerate(rates)}
    curves[3e-4] = ([0, 10, 20, 60], [4.0, 3.5, 1.0, 1.5])
    assert replay_halving.replayed(curves, steps=60, budget=1.0) == (3e-4, 6 * 5 + 2 * 15)
    assert replay_halving.replayed(curves, steps=60, budget=0.2)[0] == 1e-4


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
    assert (results.PAGES / f"{subject}.md").read_text(encoding="utf-8") == pages.text_of(subject)


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


def test_end_to_end_draws_rows_without_repetition(tmp_path: Path) -> None:
    data = tmp_path / "e2e.csv"
    data.write_text("mr,ref\n" + "".join(f"m{index},r{index}\n" for index in range(20)))
    given = argparse.Namespace(data=data, eval_data=data, steps=5, batch=4, seed=0, eval_rows=4)
    files = end_to_end.write_rows(given, tmp_path)
    rows = end_to_end.read_e2e(Path(files["train"]))
    assert sorted(row["ref"] for row in rows) == sorted(f"r{index}" for index in range(20))
    held_out = [row["mr"] for row in end_to_end.read_e2e(Path(files["eval"]))]
    assert held_out == ["m0", "m5", "m10", "m15"], "spread evenly"


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
    small = [
        "--lengths",
        "16",
        "32",
        "--vocabularies",
        "500",
        "1000",
        "--batch",
        "1",
        "--tokens",
        "16",
        "--rounds",
        "1",
    ]
    scaling.main([str(base), *small, "--output", str(output)])
    result = json.loads(next(output.glob("scaling_*.json")).read_text())
    assert [row["length"] for row in result["lengths"]] == [16, 32]
    first, second = (row["saved_bytes"] for row in result["lengths"])
    assert first < second < 2.5 * first, "memory grows with the tokens, not with their square"
    weights = [row["ours"]["weight_bytes"] for row in result["vocabularies"]]
    assert weights[1] - weights[0] == 500 * scaling.WIDTH * 2


def test_growth_leaves_the_larger_weights_out() -> None:
    def side(peak: int, weights: int) -> dict[str, int]:
        return {"peak_memory_bytes": peak, "before_steps_bytes": 0, "weight_bytes": weights}

    rows = [
        {"vocabulary": 1, "ours": side(100, 10), "peft": side(100, 10)},
        {"vocabulary": 2, "ours": side(160, 60), "peft": side(400, 60)},
    ]
    last = scaling.vocabulary_table(rows)[-1]
    assert "1.10 (<= 1.2: kept)" in last
    assert "3.50" in last


# --- the card's benchmark, on the CPU ---


@pytest.fixture
def automatic() -> Iterator[None]:
    yield
    ops.set_implementation("auto")


@pytest.mark.usefixtures("automatic")
def test_gpu_checks_pass_here_and_find_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {}
    for group in gpu_jobs.CHECKS:
        counts[group], failed = gpu_checks.check_group(group, "cpu", quick=True)
        assert failed == []
        assert counts[group] > 0
    right: Callable[..., Any] = gpu_checks.table.run

    def wrong(name: str, *given: Any) -> Any:
        return 1.01 * right(name, *given) if name == "glu" else right(name, *given)

    monkeypatch.setattr(gpu_checks.table, "run", wrong)
    fewer, failed = gpu_checks.check_group("elementwise", "cpu", quick=True)
    assert fewer < counts["elementwise"]
    assert all("glu" in line for line in failed)
    assert failed


def in_this_process(job: gpu_jobs.Job, end: float) -> dict[str, Any]:
    """Stands for a process of the job: sixty of them would load torch sixty times."""
    return json.loads(json.dumps(gpu_job.carry_out(job)))


@pytest.mark.usefixtures("automatic")
def test_gpu_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_models, "ROUNDS", 1)
    monkeypatch.setattr(gpu_models, "LAYER_ROUNDS", 1)
    monkeypatch.setattr(gpu, "do", in_this_process)
    assert gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "gpu.json").read_text())
    jobs = [gpu_jobs.Job.of(one["job"]) for one in result["jobs"].values()]
    found = {one["job"]["what"]: one["found"] for one in result["jobs"].values() if one["job"]["kind"] == "check"}
    assert set(found) == set(gpu_jobs.CHECKS)
    assert all(one["failed"] == [] for one in found.values())
    done = {
        (job.what, job.method, job.side, job.form)
        for job, one in zip(jobs, result["jobs"].values())
        if one["found"].get("step_ms") is not None
    }
    kinds = [("Llama tiny", side, "loop") for side in contenders.SIDES]
    kinds += [("layer 64", side, "loop") for side in contenders.SIDES]
    kinds += [("Llama tiny", "ours", form) for form in ("padded", "packed")]
    assert done == {(what, method, side, form) for what, side, form in kinds for method in contenders.METHODS}
    page = (tmp_path / "gpu.md").read_text()
    assert "our DoRA takes" in page
    assert "of PEFT's tokens per second" in page


def runs(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


ONE_LAYER = ["--device", "cpu", "--tiny", "--sections", "layers", "--methods", "lora", "dora"]


@pytest.mark.usefixtures("automatic")
def test_gpu_saves_each_row_and_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, results = [*ONE_LAYER, "--output", str(tmp_path)], tmp_path / "gpu.json"
    command, deadline = [sys.executable, str(BENCHMARKS / "gpu.py"), *given], time.monotonic() + 300
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        jobs: list[psutil.Process] = []
        while not jobs and process.poll() is None and time.monotonic() < deadline:
            jobs = psutil.Process(process.pid).children() if results.is_file() else []
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    # The job that ran ends too: it would disturb the next call's timings.
    assert jobs
    while any(map(runs, jobs)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, jobs))
    before = json.loads(results.read_text())["jobs"]
    assert 0 < len(before) < 4
    monkeypatch.setattr(gpu_models, "LAYER_ROUNDS", 1)
    monkeypatch.setattr(gpu, "do", in_this_process)
    assert gpu.main(given) == 0
    after = json.loads(results.read_text())["jobs"]
    assert len(after) == 4
    assert {key: after[key] for key in before} == before
    assert all(one["found"]["step_ms"] > 0 for one in after.values())


def test_gpu_notes_jobs_that_die_or_hang_and_does_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sticky error of CUDA takes its process along; nothing else."""
    codes = {
        "lora": "import os; os.abort()",
        "dora": "import time; time.sleep(600)",
        "qlora": "import sys; sys.exit('CUDA error: an illegal memory access was encountered')",
        "qdora": "import sys; open(sys.argv[2], 'w').write('{\"note\": \"out of memory\"}')",
    }
    monkeypatch.setitem(gpu_jobs.SECONDS, "layer", 2)
    monkeypatch.setattr(gpu, "sides", lambda device: ("ours",))
    monkeypatch.setattr(
        gpu, "command_of", lambda job, answer: [sys.executable, "-c", codes[job.method], "x", str(answer)]
    )
    given = ["--device", "cpu", "--tiny", "--sections", "layers", "--output", str(tmp_path)]
    assert gpu.main(given) == 0
    notes = [one["found"]["note"] for one in json.loads((tmp_path / "gpu.json").read_text())["jobs"].values()]
    assert [note.split(":")[0] for note in notes] == ["exit code -6", "ended after 2 s", "exit code 1", "out of memory"]
    assert "illegal memory access" in notes[2]
    assert "illegal memory access" in (tmp_path / "gpu.md").read_text()


def test_gpu_says_when_no_time_is_left_and_what_is_of_another_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "do", lambda job, end: {"note": "stand-in"})
    given = [*ONE_LAYER, "--output", str(tmp_path)]
    assert gpu.main([*given, "--seconds", "0"]) == 3
    assert "4 jobs are left" in capsys.readouterr().err
    assert gpu.main(given) == 0
    monkeypatch.setattr(gpu.results, "versions", lambda: {"torch": "1.0"})
    assert gpu.main([*given, "--seconds", "0"]) == 3
    assert "of another card, version or source" in capsys.readouterr().err


def test_a_check_that_fails_or_dies_fails_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = ["--device", "cpu", "--tiny", "--sections", "checks", "--output"]
    for number, found in enumerate(({"passed": 3, "failed": ["glu: error 1"]}, {"note": "exit code -6: gone"})):
        monkeypatch.setattr(gpu, "do", lambda job, end, found=found: found)
        assert gpu.main([*given, str(tmp_path / str(number))]) == 1
        assert "FAILED" in (tmp_path / str(number) / "gpu.md").read_text()


def test_gpu_notes_a_contender_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise torch.OutOfMemoryError("no more")

    monkeypatch.setattr(gpu_models, "layer_row", fails)
    job = gpu_jobs.Job("layer", "layer 64", "lora", sizes=(64,), device="cpu")
    assert gpu_models.measured(job).note == "out of memory"


# Launches a layer at the most, forward and backward, by issue 25. It names none for QDoRA.
GOALS = {"lora": 80, "dora": 95, "qlora": 88, "qdora": 113}


@pytest.mark.slow
@pytest.mark.parametrize("method", GOALS)
def test_a_step_on_a_card_starts_no_more_than_it_must(method: str) -> None:
    """The page and the plan's time say the same."""
    row = gpu_paper.row(method, "padded")
    assert row.launches_per_layer <= GOALS[method]
    assert row.host_syncs_per_step == 1
    assert row.masked_attention_ops == 0
    assert all(M % 256 == 0 for M in row.head_products)
    assert "_to_copy" not in row.operators
    assert gpu_paper.line(row) in (BENCHMARKS.parent / "docs/results/gpu-paper.md").read_text(encoding="utf-8")
    # Once an optimizer step.
    gains = sum(row.operators.get(name, 0) for name in ("adapted_gain", "adapted_gain_4bit"))
    forward = row.forward_launches_per_layer
    assert (forward - gains, row.launches_per_layer - forward) == LAUNCHES[method]


def test_llama_shapes_are_the_known_ones() -> None:
    counts = {name: sum(N * K for N, K in gpu_models.llama_shapes(name)) for name in ("1B", "8B")}
    # Of all parameters of Llama 3.2 1B (one embedding) and Llama 3.1 8B (two), what is neither norm nor embedding.
    assert counts["1B"] == 1_235_814_400 - 2048 * (2 * 16 + 1)
    assert counts["8B"] == 8_030_261_248 - 4096 * (2 * 32 + 1) - 128256 * 4096


def test_gpu_needs_no_installation_and_no_pydantic() -> None:
    """In a process that cannot see the installed package, trl, datasets, typer, rich or pydantic."""
    code = f"""
from importlib.machinery import PathFinder
import sys
find, missing = PathFinder.find_spec, {{"pydantic", "trl", "datasets", "typer", "rich", "scipy", "gguf", "psutil"}}
PathFinder.find_spec = staticmethod(lambda name, *rest: None if name.split(".")[0] in missing else find(name, *rest))
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu, gpu_job, gpu_models, gpu_unsloth, rankwise
assert rankwise.__file__.startswith({str(stand_in.SOURCE)!r})
assert sys.modules["pydantic"].BaseModel.__name__ == "Declared"
model = gpu_models.adapted(gpu_models.OneLayer(8, "cpu"), "dora", "ours", targets=["layer"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_gpu_says_that_it_needs_a_card(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err

"""The card's benchmark runs, on the CPU: its checks, its jobs and what it does when they fail."""

from __future__ import annotations

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

from rankwise import ops
from rankwise.planning.speed import LAUNCHES
from tables import long

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("peft", reason="the benchmarks compare with PEFT: pip install 'rankwise[bench]'")
pytest.importorskip("bitsandbytes", reason="the benchmarks compare with bitsandbytes: pip install 'rankwise[bench]'")
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_job  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_models  # noqa: E402
import gpu_paper  # noqa: E402
import stand_in  # noqa: E402


@pytest.fixture(autouse=True)
def loud(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmarks silence libraries for their whole process; other tests must not feel it."""
    monkeypatch.setattr(contenders, "silence", lambda: None)


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


@pytest.mark.long
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
@pytest.mark.parametrize("method", ["dora", "qlora", *long([("lora",), ("qdora",)])])
def test_a_step_on_a_card_starts_no_more_than_it_must(method: str) -> None:
    """The plan's time says the same."""
    row = gpu_paper.row(method, "padded")
    assert row.launches_per_layer <= GOALS[method]
    assert row.host_syncs_per_step == 1
    assert row.masked_attention_ops == 0
    assert all(M % 256 == 0 for M in row.head_products)
    assert "_to_copy" not in row.operators
    # Once an optimizer step.
    gains = sum(row.operators.get(name, 0) for name in ("adapted_gain", "adapted_gain_4bit"))
    forward = row.forward_launches_per_layer
    assert (forward - gains, row.launches_per_layer - forward) == LAUNCHES[method]


def test_llama_shapes_are_the_known_ones() -> None:
    counts = {name: sum(N * K for N, K in gpu_models.llama_shapes(name)) for name in ("1B", "8B")}
    # Of all parameters of Llama 3.2 1B (one embedding) and Llama 3.1 8B (two), what is neither norm nor embedding.
    assert counts["1B"] == 1_235_814_400 - 2048 * (2 * 16 + 1)
    assert counts["8B"] == 8_030_261_248 - 4096 * (2 * 32 + 1) - 128256 * 4096


@pytest.mark.long
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

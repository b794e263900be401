"""The card's benchmark runs, on the CPU: its checks, its jobs and what it does when they fail."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rankwise import ops
from rankwise.methods import METHODS
from tables import long

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
pytest.importorskip("peft", reason="the benchmarks compare with PEFT: pip install '.[bench]'")
pytest.importorskip("bitsandbytes", reason="the benchmarks compare with bitsandbytes: pip install '.[bench]'")
sys.path.append(str(BENCHMARKS))

import contenders  # noqa: E402
import gpu  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_job  # noqa: E402
import gpu_jobs  # noqa: E402
import gpu_models  # noqa: E402
import gpu_paper  # noqa: E402


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


@pytest.mark.long
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


# Launches a layer at the most, forward and backward.
GOALS = {"lora": 80, "dora": 95, "qlora": 88, "qdora": 113}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["qdora", *long([("lora",), ("dora",), ("qlora",)])])
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
    assert (forward - gains, row.launches_per_layer - forward) == METHODS[method].launches

"""One job of `gpu.py` in a process of its own: what fails here, fails here alone.

    python benchmarks/gpu_job.py JOB --answer FILE

JOB is a `gpu_jobs.Job` as JSON. FILE gets what it found, as JSON too.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stand_in import source_tree

source_tree()

import contenders  # noqa: E402
import gpu_checks  # noqa: E402
import gpu_four_bits  # noqa: E402
import gpu_models  # noqa: E402
import torch  # noqa: E402
from gpu_jobs import Job, end_with_parent  # noqa: E402

from rankwise.records import write_json  # noqa: E402

# What nvidia-smi tells of a card, with our names.
CARD_STATE = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "power.limit": "power_limit_w",
    "power.draw": "power_w",
    "temperature.gpu": "celsius",
}


def carry_out(job: Job) -> dict[str, Any]:
    """What the job found. Errors of a contender are a row's note; all others go through."""
    contenders.silence()
    return KINDS[job.kind](job)


def _check(job: Job) -> dict[str, Any]:
    passed, failed = gpu_checks.check_group(job.method, job.device, quick=job.is_tiny)
    return {"passed": passed, "failed": failed}


def _warm(job: Job) -> dict[str, Any]:
    """Compile what the method's step needs, by one step of a model of two layers in the true widths."""
    model = gpu_models.contender(job, layers=2)
    gpu_models.step_of(job, model)()
    return {}


def _time(job: Job) -> dict[str, Any]:
    before = card_state(job.device)
    row = gpu_models.measured(job)
    return {**dataclasses.asdict(row), "card_before": before, "card_after": card_state(job.device)}


def _four_bits(job: Job) -> dict[str, Any]:
    timed, bandwidth = gpu_four_bits.measure(list(job.sizes))
    return {"rows": [dataclasses.asdict(row) for row in timed], "copy_bytes_per_second": bandwidth}


KINDS: dict[str, Callable[[Job], dict[str, Any]]] = {
    "check": _check,
    "warm": _warm,
    "model": _time,
    "layer": _time,
    "four-bits": _four_bits,
}


def card_state(device: str) -> dict[str, float]:
    """Clocks, power and temperature; empty without a card or without nvidia-smi."""
    if device != "cuda":
        return {}
    index = str(torch.cuda.current_device())
    command = ["nvidia-smi", "-i", index, f"--query-gpu={','.join(CARD_STATE)}", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split(",")
    except (OSError, subprocess.SubprocessError):
        return {}
    return {name: float(value) for name, value in zip(CARD_STATE.values(), found) if _is_number(value)}


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", type=json.loads)
    parser.add_argument("--answer", type=Path, required=True)
    given = parser.parse_args()
    end_with_parent()
    write_json(given.answer, carry_out(Job.of(given.job)))


if __name__ == "__main__":
    main()

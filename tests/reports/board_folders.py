"""Run folders as ``rankwise train`` leaves them, made up."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rankwise.records import RunRecord


def write_run(
    folder: Path,
    *,
    steps: int = 10,
    status: str = "finished",
    prompt: str | None = None,
    answer: str = "answer",
    warnings: list[dict[str, Any]] | None = None,
) -> Path:
    """Losses fall from 4 to 2, evaluations (start, middle, end) from 3 to 2; 80 % of the planned memory is used."""
    folder.mkdir(parents=True)
    RunRecord(
        method="lora",
        seed=0,
        settings={"model": "demo", "max_steps": steps, "sample_prompt": prompt},
        predicted_peak_memory_bytes=1_500_000_000,
        trainable_parameters=4_884_480,
        base_model={"name": "demo"},
        data={"train": {"source": "rows.jsonl"}},
        warnings=warnings or [],
        kept_step=steps if status == "finished" else None,
        status=status,
    ).save(folder)
    lines: list[dict[str, Any]] = [{"step": 0, "eval_loss": 3.0}]
    for step in range(1, steps + 1):
        figures = {"loss": 4 - 2 * step / steps, "grad_norm": 1 / step, "b_norm": step / steps, "learning_rate": 1e-4}
        costs = {"tokens_per_second": 1234.5, "train_seconds": 2.0 * step, "peak_memory_bytes": 1_200_000_000}
        lines.append({"step": step, **figures, **costs})
        if step in (steps // 2, steps):
            lines.append({"step": step, "eval_loss": 3 - step / steps})
            lines.append({"step": step, "sample": f"{answer} at step {step}"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder

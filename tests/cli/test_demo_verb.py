"""`rankwise demo`: plan, comparison, report and recommendation, here on the tiny model with one method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from in_process import steps_in_this_process


@pytest.mark.slow
def test_the_demo_ends_with_a_report_and_a_recommendation(
    model_folder: Path, tmp_path: Path, rankwise: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
):
    steps_in_this_process(monkeypatch)
    folder = tmp_path / "demo"
    done = rankwise(
        "demo", "--model", model_folder, "--output", folder, "--methods", "lora", "--max-steps", 1, "--eval-limit", 4
    )
    assert done.code == 0, done.stderr
    assert (folder / "report.html").is_file()
    lines = done.stdout.strip().splitlines()
    assert any(line.startswith("report") and str(folder / "report.html") in line for line in lines)
    assert any("LoRA: it is the only method with a result" in line for line in lines)
    chapters = [line for line in lines if line[:2] in ("1.", "2.", "3.", "4.")]
    assert [line[0] for line in chapters] == ["1", "2", "3", "4"]
    assert f"rankwise chat --adapter {folder / 'best'}" in done.stdout

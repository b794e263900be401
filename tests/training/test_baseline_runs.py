"""`--method bottleneck` and `--method prefix` as whole runs: they train, resume exactly, and leave a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from training_rows import Recorder, snapshot

from rankwise.errors import Interrupted
from rankwise.training.run import train


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_a_run_trains_and_resumes_to_the_bit(settings: Any, tmp_path: Path, method: str):
    whole = train(settings(method=method, output=tmp_path / "whole"))
    assert whole.eval_loss < whole.initial_eval_loss
    assert 0 < whole.trainable_parameters < whole.total_parameters
    with pytest.raises(Interrupted):
        train(settings(method=method, output=tmp_path / "cut"), Recorder(stop_at=3))
    cut = train(settings(method=method, output=tmp_path / "cut", resume=True))
    assert cut.eval_loss == whole.eval_loss
    name = "adapter_model.safetensors"
    assert snapshot(tmp_path / "cut")[name] == snapshot(tmp_path / "whole")[name]

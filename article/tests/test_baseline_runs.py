"""`--method bottleneck` and `--method prefix` as whole runs: they train, resume exactly, and are compared."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from rankwise.cli.main import main
from rankwise.config import TrainSettings
from rankwise.errors import Interrupted, RankwiseWarning
from rankwise.evaluation.record import load_result
from rankwise.records import load_record
from rankwise.training.run import train
from rankwise.training.watch import SilentObserver
from small_engines import save_byte_model, write_lines

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning")


class StopAt(SilentObserver):
    def __init__(self, step: int) -> None:
        self.stop_at = step

    def step(self, info: Any) -> None:
        if info.step == self.stop_at:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture
def given(tmp_path: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    rows = [{"prompt": f"Is {n}? ", "completion": "Yes"} for n in range(12)]
    model = save_byte_model(tmp_path / "model")
    return {
        "model": str(model),
        "data": str(write_lines(tmp_path / "train.jsonl", rows)),
        "eval_data": str(write_lines(tmp_path / "eval.jsonl", rows[:4])),
        "r": 4,
        "max_steps": 4,
        "eval_steps": 2,
        "batch_size": 2,
        "max_length": 16,
        "dtype": "float32",
        "device": "cpu",
        "learning_rate": 1e-2,
    }


@pytest.mark.parametrize("method", ["bottleneck", "prefix"])
def test_a_run_trains_resumes_to_the_bit_and_is_evaluated(
    given: dict[str, Any], tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
):
    def settings(name: str, **more: Any) -> TrainSettings:
        return TrainSettings.model_validate({**given, "method": method, "output": tmp_path / name, **more})

    whole = train(settings("whole"))
    assert whole.eval_loss < whole.initial_eval_loss
    assert 0 < whole.trainable_parameters < whole.total_parameters
    assert whole.device["acceleration"] == "off"
    with pytest.raises(Interrupted):
        train(settings("cut"), StopAt(2))
    assert train(settings("cut", resume=True)).eval_loss == whole.eval_loss
    name = "adapter_model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    asked = f"evaluate --adapter {tmp_path / 'whole'} --task perplexity --data {given['eval_data']} --device cpu"
    assert main([*asked.split(), "--output", str(tmp_path / "told")]) == 0
    assert load_result(tmp_path / "told" / "perplexity").metrics["loss"] == pytest.approx(whole.eval_loss, rel=1e-5)
    capsys.readouterr()
    # The base would answer through it, too.
    assert main([*asked.split(), "--base", "--output", str(tmp_path / "both")]) == 2
    assert "RW151" in capsys.readouterr().err


def test_options_that_it_does_not_use_are_said(given: dict[str, Any], tmp_path: Path):
    changes = {"method": "prefix", "output": tmp_path / "run", "target_modules": "q_proj", "max_steps": 1}
    with pytest.warns(RankwiseWarning, match="RW529.*--target-modules"):
        train(TrainSettings.model_validate({**given, **changes}))


@pytest.mark.long
def test_they_are_compared_on_a_task(given: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    options = {name: value for name, value in given.items() if name not in ("device", "learning_rate")}
    words = [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    others = f"--methods lora,prefix,bottleneck --learning-rates 1e-2 --seeds 1 --output {tmp_path / 'out'}"
    words += others.split()
    (tmp_path / "e2e.csv").write_text("mr,ref\nname[A],A is a pub.\n")
    words += ["--task", "e2e", "--task-data", f"e2e={tmp_path / 'e2e.csv'}"]
    assert main(["compare", *words]) == 0
    for method in ("prefix", "bottleneck"):
        folders = list((tmp_path / "out" / "runs").glob(f"{method}-*"))
        assert {load_record(folder).status for folder in folders} == {"finished"}
        assert "BLEU" in load_result(folders[0] / "evaluation" / "e2e").metrics
    assert "LoRA" in capsys.readouterr().out

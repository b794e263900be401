"""Preferences by the command line: preview, plan, train, SFT before DPO."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

import rankwise as rw


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"What is {n}?", "chosen": f"It is {n}.", "rejected": f"No idea, {n}"} for n in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def trains(rankwise: Callable[..., Any], model_folder: Path, pairs_file: Path, tmp_path: Path) -> Callable[..., Any]:
    def train(name: str, *options: object) -> tuple[Any, Path]:
        output = tmp_path / name
        command = ["train", "--model", model_folder, "--output", output, "--max-steps", 2, "--batch-size", 2]
        command += ["--objective", "dpo", "--data", pairs_file, "--logging-steps", 1, "--learning-rate", 0.01]
        return rankwise(*command, *options), output

    return train


def test_a_preview_shows_both_sides(model_folder: Path, pairs_file: Path, rankwise: Callable[..., Any]) -> None:
    done = rankwise("preview", "--model", model_folder, "--data", pairs_file, "--objective", "dpo")
    assert done.code == 0
    assert "[[It is 0.</s>" in done.stdout
    assert "[[No idea, 0</s>" in done.stdout
    assert "chosen" in done.stdout


def test_a_run_shows_rewards(trains: Callable[..., Any], pairs_file: Path) -> None:
    done, output = trains("run", "--r", 2, "--eval-data", pairs_file)
    assert done.code == 0, done.stderr
    assert "margin" in done.stdout
    assert "accuracy" in done.stdout
    assert "of the evaluation pairs have the better answer ahead" in done.stdout
    record = json.loads((output / "run.json").read_text())
    assert record["objective"] == "dpo"
    assert record["predicted_peak_memory_bytes"] > 0


def test_a_plan_counts_two_sequences_a_pair(model_folder: Path, rankwise: Callable[..., Any]) -> None:
    def peak(*options: object) -> int:
        command = ["plan", "--model", model_folder, "--method", "lora", "--memory", "2GB", "--max-length", 256]
        return rankwise(*command, *options, "--json").document["methods"]["lora"]["peak_bytes"]

    assert peak("--objective", "dpo", "--batch-size", 4) == pytest.approx(peak("--batch-size", 8), rel=0.02)
    assert peak("--objective", "dpo", "--batch-size", 4) > peak("--batch-size", 4)


def test_training_goes_on_with_an_adapter_as_the_reference(
    trains: Callable[..., Any], run_folder: Path, model_folder: Path
) -> None:
    done, output = trains("dpo", "--adapter", run_folder)
    assert done.code == 0, done.stderr
    first = safetensors.torch.load_file(run_folder / "adapter_model.safetensors")
    last = safetensors.torch.load_file(output / "adapter_model.safetensors")
    assert first.keys() == last.keys()
    assert any(not torch.equal(first[key], last[key]) for key in first)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    # The reference is the adapter that training began with, not the base: at the first step nothing has moved.
    assert lines[0]["reward_chosen"] == pytest.approx(0, abs=1e-4)
    assert lines[0]["reward_rejected"] == pytest.approx(0, abs=1e-4)
    assert abs(lines[1]["reward_margin"]) > 1e-4
    assert json.loads((output / "run.json").read_text())["settings"]["r"] == 2
    card = (output / "README.md").read_text()
    assert "against the adapter that training began with as the reference" in card
    assert str(run_folder) not in card
    model, _ = rw.load_model(str(model_folder))
    rw.load_adapter(model, output)
    rw.merge_adapter(model)


@pytest.mark.parametrize(
    ("options", "word"),
    [(("--method", "dora"), "LoRA"), (("--r", 4), "--r"), (("--r", 16), "--r"), (("--lora-alpha", 7), "--lora-alpha")],
    ids=["method", "rank", "the default rank", "alpha"],
)
def test_an_adapter_is_trained_on_as_it_is(
    options: tuple[object, ...], word: str, trains: Callable[..., Any], run_folder: Path
) -> None:
    done, output = trains("dpo", "--adapter", run_folder, *options)
    assert done.code == 2
    assert "RW764" in done.stderr
    assert word in done.stderr
    assert not output.exists()


def test_an_adapter_of_another_base_is_refused(
    trains: Callable[..., Any], run_folder: Path, tmp_path: Path, rankwise: Callable[..., Any]
) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(run_folder, other)
    record = json.loads((other / "run.json").read_text())
    record["base_model"]["sha256"] = "0" * 64
    (other / "run.json").write_text(json.dumps(record))
    done, output = trains("dpo", "--adapter", other)
    assert done.code == 2
    assert "RW764" in done.stderr
    assert not output.exists()

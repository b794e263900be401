"""Stopped while it writes its results, a run leaves nothing half-written and finishes when it is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rankwise.errors import Interrupted, RunError
from rankwise.records import load_record
from rankwise.training import session
from rankwise.training.run import train
from rankwise.training.weights import save_weights

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")


def stopping(function: Any, at_call: int, error: BaseException) -> Any:
    """``function``, but its n-th call raises before it does anything."""
    calls = 0

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == at_call:
            raise error
        return function(*args, **kwargs)

    return call


PLACES = {
    "the kept step": ("restore_kept", 1),
    "weights": ("save_weights", 1),
    "first file": ("rename", 1),
    "second file": ("rename", 2),
    "plot": ("write_plot", 1),
    "card": ("write_card", 1),
}


@pytest.mark.parametrize("place", PLACES)
def test_an_interrupted_final_save_is_made_good(
    place: str, settings: Any, straight_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, at_call = PLACES[place]
    with monkeypatch.context() as patch:
        # The first rename in session is that of the first final file; all others are records' and checkpoints'.
        patch.setattr(session, name, stopping(getattr(session, name), at_call, KeyboardInterrupt()))
        with pytest.raises(Interrupted) as caught:
            train(settings(lora_dropout=0.1))
    assert caught.value.code == "RW541"
    assert load_record(tmp_path / "run").status == "interrupted"
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
    for file in (tmp_path / "run").glob("*.safetensors"):
        safetensors.torch.load_file(file)
    assert train(settings(lora_dropout=0.1, resume=True)).status == "finished"
    folders = (straight_run, tmp_path / "run")
    straight, run = ({path.name for path in folder.iterdir()} for folder in folders)
    assert straight == run
    one, other = (safetensors.torch.load_file(folder / "adapter_model.safetensors") for folder in folders)
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_full_disk_at_the_end_is_said_and_made_good(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(session, "save_weights", stopping(None, 1, OSError(28, "No space left on device")))
        with pytest.raises(RunError, match="--resume") as caught:
            train(settings(max_steps=2))
    assert caught.value.code == "RW551"
    assert load_record(tmp_path / "run").status == "failed"
    assert train(settings(max_steps=2, resume=True)).status == "finished"


@pytest.mark.parametrize("damage", ["a changed number", "a cut file"])
def test_an_adapter_that_reads_differently_is_not_kept(
    damage: str, settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(model: Any, folder: Path, gathered: Any) -> None:
        save_weights(model, folder, gathered)
        content = bytearray((folder / "adapter_model.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "adapter_model.safetensors").write_bytes(content[: -1 if damage == "a cut file" else None])

    monkeypatch.setattr(session, "save_weights", save)
    with pytest.raises(RunError, match=r"RW551: the adapter that was written differs.*--resume"):
        train(settings(max_steps=1))
    assert not (tmp_path / "run" / "adapter_model.safetensors").exists()

"""A checkpoint exists whole or not at all: full disks, short writes, errors at every call, kill -9 at any moment."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rankwise.errors import RunError
from rankwise.training import checkpoints
from rankwise.training.checkpoints import (
    check_checkpoint,
    list_checkpoints,
    newest_valid,
    remove_old,
    remove_unfinished,
    save_checkpoint,
)
from rankwise.training.states import load_state, save_state


def write(folder: Path) -> None:
    save_state(folder, "optimizer", {"step": torch.tensor(3.0), "moment": torch.ones(64)})
    (folder / "notes.json").write_text("{}")


def test_a_state_is_written_without_a_copy_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full run's moments are twice its weights; those that share memory, which safetensors refuses, are copied."""
    moment, written = torch.arange(64.0), dict[str, torch.Tensor]()
    save_file = safetensors.torch.save_file

    def save(tensors: dict[str, torch.Tensor], *rest: object) -> None:
        written.update(tensors)
        save_file(tensors, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", save)
    save_state(tmp_path, "optimizer", {"first": moment, "part": moment[8:16], "across": moment.view(8, 8).T})
    assert written["0"].data_ptr() == moment.data_ptr()
    found = load_state(tmp_path, "optimizer")
    assert torch.equal(found["first"], moment)
    assert torch.equal(found["part"], moment[8:16])
    assert torch.equal(found["across"], moment.view(8, 8).T)


def no_damage(error: RunError) -> None:
    raise AssertionError(error)


def test_saved_checkpoint_is_listed_and_valid(tmp_path: Path) -> None:
    for step in (2, 10, 9):
        save_checkpoint(tmp_path, step, write)
    assert [item.step for item in list_checkpoints(tmp_path)] == [2, 9, 10]
    newest = newest_valid(tmp_path, no_damage)
    assert newest is not None
    assert newest.path.name == "step-10"
    assert set(json.loads((newest.path / "manifest.json").read_text())["files"]) == {
        "notes.json",
        "optimizer.json",
        "optimizer.safetensors",
    }


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_an_error_at_any_call_leaves_the_old_checkpoint(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every file-system call of a save fails once, in turn, until one save goes through."""
    save_checkpoint(tmp_path, 1, write)
    calls = {"seen": 0, "fail_at": 0}

    def failing(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls["seen"] += 1
            if calls["seen"] == calls["fail_at"]:
                raise OSError(number, os.strerror(number))
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "replace", "chmod", "open"):
        monkeypatch.setattr(checkpoints.os, name, failing(getattr(os, name)))
    survivors = []
    for fail_at in range(1, 100):
        calls.update(seen=0, fail_at=fail_at)
        with contextlib.suppress(OSError):
            save_checkpoint(tmp_path, 2, write)
            break
        found = newest_valid(tmp_path, no_damage)
        assert found is not None
        survivors.append(found.step)
        assert not list((tmp_path / "checkpoints").glob(".tmp-*"))
    # Only opening and flushing the parent folder come after the rename.
    assert survivors[:-2] == [1] * (len(survivors) - 2)
    assert len(survivors) > 8
    assert newest_valid(tmp_path, no_damage).step == 2  # type: ignore[union-attr]


def test_short_write_is_found_by_the_manifest(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write)
    newer = save_checkpoint(tmp_path, 2, write)
    file = newer.path / "optimizer.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    said: list[str] = []
    found = newest_valid(tmp_path, lambda error: said.append(error.message))
    assert found is not None
    assert found.step == 1
    assert len(said) == 1
    assert "optimizer.safetensors has" in said[0]


@pytest.mark.parametrize("kind", ["changed", "missing", "no manifest", "broken manifest"])
def test_damage_is_named(kind: str, tmp_path: Path) -> None:
    saved = save_checkpoint(tmp_path, 1, write)
    manifest, file = saved.path / "manifest.json", saved.path / "notes.json"
    {
        "changed": lambda: file.write_text("[]"),
        "missing": file.unlink,
        "no manifest": manifest.unlink,
        "broken manifest": lambda: manifest.write_text('{"files": ["x"]}'),
    }[kind]()
    with pytest.raises(RunError, match=r"manifest\.json" if "manifest" in kind else r"notes\.json") as caught:
        check_checkpoint(saved)
    assert caught.value.code == "RW515"
    with pytest.raises(RunError, match="--overwrite"):
        newest_valid(tmp_path, lambda error: None)


def test_a_manifest_names_no_files_elsewhere(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"")
    checkpoint = save_checkpoint(tmp_path, 1, write)
    facts = {"bytes": 0, "sha256": checkpoints.sha256_of(other)}
    for name in (str(other), "../../other"):
        (checkpoint.path / "manifest.json").write_text(json.dumps({"step": 1, "files": {name: facts}}))
        with pytest.raises(RunError, match=r"RW515: .*manifest\.json is missing or cannot be read"):
            check_checkpoint(checkpoint)


def test_full_disk_is_said_before_writing(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="GB free") as caught:
        save_checkpoint(tmp_path, 1, write, size_bytes=10**18)
    assert caught.value.code == "RW513"
    assert list((tmp_path / "checkpoints").iterdir()) == []


def test_old_ones_go_and_the_best_stays(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_checkpoint(tmp_path, step, write)
    remove_old(tmp_path, keep=2, step=5, best_step=1)
    assert [item.step for item in list_checkpoints(tmp_path)] == [1, 4, 5]


def test_an_old_one_with_a_file_of_the_user_stays(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, step, write)
    (tmp_path / "checkpoints" / "step-1" / "mine.txt").write_text("mine")
    remove_old(tmp_path, keep=1, step=3)
    assert [item.step for item in list_checkpoints(tmp_path)] == [1, 3]


def test_the_one_just_written_stays_beside_damaged_later_ones(tmp_path: Path) -> None:
    for step in (10, 20, 15):
        save_checkpoint(tmp_path, step, write)
    remove_old(tmp_path, keep=1, step=15)
    assert [item.step for item in list_checkpoints(tmp_path)] == [15]


def test_unfinished_ones_are_not_seen_and_are_cleared(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, write)
    (tmp_path / "checkpoints" / ".tmp-step-2-abc").mkdir()
    (tmp_path / "checkpoints" / "step-x").mkdir()
    assert [item.step for item in list_checkpoints(tmp_path)] == [1]
    remove_unfinished(tmp_path)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-1", "step-x"]

"""--overwrite replaces a run and nothing else: whatever the user keeps in the folder stays or stops it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from training_rows import snapshot
from transformers.integrations.integration_utils import default_logdir

from rankwise.errors import RunError
from rankwise.records import RunRecord, load_record
from rankwise.training.checkpoints import save_checkpoint
from rankwise.training.old_run import EVENTS, clear_run
from rankwise.training.output import check_output
from rankwise.training.run import train

pytestmark = pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning", "ignore::UserWarning")

USERS = (
    "notes.md",
    "runs/precious/run.json",
    "runs/precious/checkpoints/step-1/adapter_model.safetensors",
    "runs/events.out.tfevents.1",
    "vocab_study/words.txt",
    "vocab.json",
    "tokenizer_old/tokenizer.json",
    "model_soup.safetensors",
    "adapter_ideas.txt",
    "my_config.json",
    "prompt.jinja",
)
# Each fits a pattern that a careless cleaner would use.


def write(folder: Path, names: tuple[str, ...], text: str = "mine") -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def old_run(tmp_path: Path) -> Path:
    """A folder as an interrupted run leaves it, without the training."""
    folder = tmp_path / "old"
    folder.mkdir()
    save_checkpoint(folder, 4, lambda temporary: (temporary / "optimizer.json").write_text("{}") and None)
    write(folder, ("metrics.jsonl", "loss.svg", "tokenizer.json"), "old")
    RunRecord("lora", 0, {"model": "demo", "tensorboard": True}, files=["tokenizer.json"]).save(folder)
    return folder


def test_the_users_files_survive(settings: Any, tmp_path: Path) -> None:
    train(settings(max_steps=1, method="full"))
    write(tmp_path / "run", USERS)
    record = train(settings(max_steps=1, overwrite=True))
    assert {name: (tmp_path / "run" / name).read_text() for name in USERS} == dict.fromkeys(USERS, "mine")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert "model.safetensors" not in left
    assert "config.json" not in left
    assert {"adapter_model.safetensors", "tokenizer.json"} <= left
    assert set(record.files) <= left


def test_only_what_the_record_names_goes(old_run: Path) -> None:
    write(old_run, (*USERS, "tokenizer_config.json"))
    clear_run(old_run)
    assert {path.name for path in old_run.iterdir()} == {
        *(name.split("/")[0] for name in USERS),
        *("tokenizer_config.json", "run.json", "checkpoints"),
    }
    assert list((old_run / "checkpoints").iterdir()) == []


def test_tensorboard_files_go_by_their_names(old_run: Path) -> None:
    events = f"{default_logdir()}/events.out.tfevents.123.host.0"
    write(old_run, (events, "runs/Jan01_00-00-00_host/mine.txt", "runs/Jan01_00-00-00_host/events.out.tfevents.9"))
    assert list(old_run.glob(EVENTS))
    clear_run(old_run)
    assert [path.name for path in (old_run / "runs").rglob("*") if path.is_file()] == ["mine.txt"]
    assert not (old_run / events).parent.exists()


def test_a_record_cannot_name_files_elsewhere(old_run: Path, tmp_path: Path) -> None:
    write(tmp_path, ("outside.txt",))
    names = ["../outside.txt", str(tmp_path / "outside.txt"), "", ".", "checkpoints/../../outside.txt", 7]
    RunRecord("lora", 0, {}, files=names).save(old_run)
    clear_run(old_run)
    assert (tmp_path / "outside.txt").read_text() == "mine"


def symlink(run: Path) -> None:
    write(run.parent, ("elsewhere/file",))
    (run / "checkpoints" / "step-9").symlink_to(run.parent / "elsewhere", target_is_directory=True)


FOREIGN = {
    "a file": lambda run: write(run, ("checkpoints/notes.md",)),
    "a folder": lambda run: write(run, ("checkpoints/best/weights",)),
    "a step without a manifest": lambda run: write(run, ("checkpoints/step-9/weights",)),
    "a file in a step": lambda run: write(run, ("checkpoints/step-4/notes.md",)),
    "a temporary name of another kind": lambda run: write(run, ("checkpoints/.tmp-mine/notes.md",)),
    "a link": symlink,
    "a folder by a file's name": lambda run: write(run, ("README.md/chapter",)),
}


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_stands_in_the_way_stops_it(kind: str, old_run: Path) -> None:
    FOREIGN[kind](old_run)
    before = snapshot(old_run.parent)
    with pytest.raises(RunError) as caught:
        check_output(old_run, resume=False, overwrite=True)
    assert caught.value.code == "RW504"
    with pytest.raises(RunError):
        clear_run(old_run)
    assert snapshot(old_run.parent) == before


def test_checkpoints_without_a_record_are_anybodys(old_run: Path) -> None:
    (old_run / "run.json").unlink()
    for resume, overwrite in ((False, False), (True, False), (False, True)):
        with pytest.raises(RunError) as caught:
            check_output(old_run, resume=resume, overwrite=overwrite)
        assert caught.value.code == "RW504"


@pytest.mark.parametrize("content", ["", "[1]", '{"name": "an app", "scripts": {}}', '{"method": "lora", "seed": 0'])
def test_a_foreign_run_json_is_no_record(content: str, old_run: Path) -> None:
    (old_run / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json") as caught:
        check_output(old_run, resume=False, overwrite=True)
    assert caught.value.code == "RW504"


def test_unfinished_work_does_not_stop_it(old_run: Path) -> None:
    write(
        old_run, ("checkpoints/.tmp-step-5-abc_1/x", "checkpoints/.tmp-old-step-4-77/x", "checkpoints/.tmp-final-a/x")
    )
    assert check_output(old_run, resume=False, overwrite=True) == "overwrite"
    clear_run(old_run)
    assert list((old_run / "checkpoints").iterdir()) == []


def test_a_record_names_what_the_run_wrote(settings: Any, tmp_path: Path) -> None:
    train(settings(max_steps=1))
    always = {"run.json", "metrics.jsonl", "loss.svg", "README.md", "checkpoints"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {*load_record(tmp_path / "run").files, *always}
    assert json.loads((tmp_path / "run" / "run.json").read_text())["files"]

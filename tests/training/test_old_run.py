"""--overwrite replaces a run and nothing else: whatever the user keeps in the folder stays or stops it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from training_rows import snapshot

from rankwise.disk import hold
from rankwise.errors import RunError
from rankwise.records import RunRecord, load_record
from rankwise.training.checkpoints import EVENTS, check_output, clear_run, list_checkpoints, save_checkpoint
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
    RunRecord(
        method="lora", seed=0, settings={"model": "demo", "report_to": ["tensorboard"]}, files=["tokenizer.json"]
    ).save(folder)
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
    write(old_run, ("tensorboard/events.out.tfevents.123.host.0", "tensorboard/mine.txt"))
    assert list(old_run.glob(EVENTS))
    clear_run(old_run)
    assert [path.name for path in (old_run / "tensorboard").iterdir()] == ["mine.txt"]


def test_a_record_cannot_name_files_elsewhere(old_run: Path, tmp_path: Path) -> None:
    write(tmp_path, ("outside.txt",))
    names = ["../outside.txt", str(tmp_path / "outside.txt"), "", ".", "checkpoints/../../outside.txt", 7]
    RunRecord(method="lora", seed=0, settings={}, files=names).save(old_run)
    clear_run(old_run)
    assert (tmp_path / "outside.txt").read_text() == "mine"


LINKED = {
    "a link": ("link", "link/precious.txt"),
    "a link in a folder": ("a/link", "a/link/precious.txt"),
    "a folder below a link": ("link", "link/below/precious.txt"),
    "a link to the folder above": ("up", "up/elsewhere/precious.txt"),
    "the folder of TensorBoard": ("tensorboard", "events.out.tfevents.1"),
}


@pytest.mark.parametrize("kind", LINKED)
def test_nothing_behind_a_link_goes(kind: str, old_run: Path, tmp_path: Path) -> None:
    link, name = LINKED[kind]
    target = tmp_path if kind.endswith("above") else tmp_path / "elsewhere"
    (old_run / link).parent.mkdir(exist_ok=True)
    write(tmp_path, ("elsewhere/precious.txt", "elsewhere/below/precious.txt"))
    write(tmp_path, ("elsewhere/events.out.tfevents.1",))
    (old_run / link).symlink_to(target, target_is_directory=True)
    RunRecord(
        method="lora", seed=0, settings={"report_to": ["tensorboard"]}, files=[name, f"./{name}", f"{link}/../{name}"]
    ).save(old_run)
    before = snapshot(tmp_path / "elsewhere")
    clear_run(old_run)
    assert snapshot(tmp_path / "elsewhere") == before
    assert (old_run / link).is_symlink()


def test_a_link_by_the_name_of_a_file_goes_and_not_its_target(old_run: Path, tmp_path: Path) -> None:
    write(tmp_path, ("precious.svg",))
    (old_run / "loss.svg").unlink()
    (old_run / "loss.svg").symlink_to(tmp_path / "precious.svg")
    clear_run(old_run)
    assert not os.path.lexists(old_run / "loss.svg")
    assert (tmp_path / "precious.svg").read_text() == "mine"


@pytest.mark.parametrize("name", ["step-4/mine.txt", "step-7/mine.txt", "step-4/folder/mine.txt"])
@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_foreign_files_among_checkpoints_are_refused(mode: str, name: str, old_run: Path) -> None:
    write(old_run / "checkpoints", (name,))
    before = snapshot(old_run)
    with pytest.raises(RunError, match=f"RW504.*{name}"):
        check_output(old_run, **{"resume": False, "overwrite": False, mode: True})
    with pytest.raises(RunError, match="RW504"):
        clear_run(old_run)
    assert snapshot(old_run) == before


@pytest.mark.parametrize("mode", ["resume", "overwrite"])
def test_checkpoints_behind_a_link_are_refused(mode: str, old_run: Path, tmp_path: Path) -> None:
    (old_run / "checkpoints").rename(tmp_path / "elsewhere")
    (old_run / "checkpoints").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    before = snapshot(tmp_path)
    with pytest.raises(RunError, match="checkpoints") as caught:
        check_output(old_run, **{"resume": False, "overwrite": False, mode: True})
    assert caught.value.code == "RW554"
    with pytest.raises(RunError):
        clear_run(old_run)
    assert snapshot(tmp_path) == before


def test_a_checkpoint_behind_a_link_is_none(old_run: Path, tmp_path: Path) -> None:
    step = save_checkpoint(tmp_path / "other", 9, lambda temporary: (temporary / "weights").write_text("x") and None)
    (old_run / "checkpoints" / "step-9").symlink_to(step.path, target_is_directory=True)
    before = snapshot(tmp_path / "other")
    assert [item.step for item in list_checkpoints(old_run)] == [4]
    save_checkpoint(old_run, 9, lambda temporary: (temporary / "weights").write_text("new") and None)
    assert [item.step for item in list_checkpoints(old_run)] == [4, 9]
    assert snapshot(tmp_path / "other") == before


@pytest.mark.parametrize("name", ["run.json", "a\0b", "x" * 5000, "loss.svg/x", "README.md/.."])
def test_a_strange_name_in_the_record_removes_nothing(name: str, old_run: Path) -> None:
    write(old_run, ("mine.txt",))
    RunRecord(method="lora", seed=0, settings={}, files=["tokenizer.json"]).save(old_run)
    record = json.loads((old_run / "run.json").read_text())
    (old_run / "run.json").write_text(json.dumps({**record, "files": ["tokenizer.json", name]}))
    clear_run(old_run)
    assert {path.name for path in old_run.iterdir()} == {"run.json", "mine.txt", "checkpoints"}


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


@pytest.mark.parametrize("settings", [{"report_to": 5}, {"report_to": None}])
def test_settings_of_other_types_do_not_stop_it(settings: Any, old_run: Path) -> None:
    record = load_record(old_run)
    record.settings = settings
    record.save(old_run)
    assert check_output(old_run, resume=False, overwrite=True) == "overwrite"


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


def test_a_replacement_cut_off_at_any_moment_looks_like_no_finished_run(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(settings(max_steps=1))
    shutil.copytree(tmp_path / "run", tmp_path / "finished")
    for at_call in range(100):
        shutil.rmtree(tmp_path / "run")
        shutil.copytree(tmp_path / "finished", tmp_path / "run")
        with monkeypatch.context() as patch:
            _cut_at(at_call, patch)
            with contextlib.suppress(KeyboardInterrupt):
                clear_run(tmp_path / "run")
                break
        if load_record(tmp_path / "run").status == "finished":
            assert snapshot(tmp_path / "run").items() >= snapshot(tmp_path / "finished").items()
        else:
            with pytest.raises(RunError, match=r"RW505.*--overwrite"):
                train(settings(max_steps=1, resume=True))
    assert at_call > 10
    assert train(settings(max_steps=1, overwrite=True)).status == "finished"


def _cut_at(at_call: int, patch: pytest.MonkeyPatch) -> None:
    calls = iter(range(at_call))
    for name in ("rename", "replace", "unlink", "rmdir"):
        patch.setattr(os, name, functools.partial(_cut, getattr(os, name), calls))


def _cut(real: Any, calls: Iterator[int], *args: Any, **named: Any) -> Any:
    if next(calls, None) is None:
        raise KeyboardInterrupt
    return real(*args, **named)


def test_what_kills_leave_goes_and_what_looks_like_it_stays(settings: Any, tmp_path: Path) -> None:
    write(tmp_path, ("run/.run.json.0a1b2c3d",))
    train(settings(max_steps=1))
    assert not list((tmp_path / "run").glob(".*"))
    users = (
        ".run.json.bak",
        ".notes.md.0a1b2c3d",
        ".README.md.0a1b2c3",
        ".README.md.0a1b2c3d.txt",
        "run.json.0a1b2c3d",
    )
    strays = (".README.md.0a1b2c3d", ".metrics.jsonl.01234567", ".loss.svg.ffffffff", ".run.json.00000000")
    write(tmp_path / "run", (*users, *strays))
    train(settings(max_steps=1, overwrite=True))
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left >= set(users)
    assert not left & set(strays)


@pytest.mark.parametrize(
    "name", [".run.json.bak", ".run.json.0a1b2c3d4", ".README.md.0a1b2c3d", ".run.json.0a1b2c3d/x"]
)
def test_other_hidden_files_are_not_ours(name: str, tmp_path: Path) -> None:
    write(tmp_path / "run", (name,))
    with pytest.raises(RunError, match="RW504"):
        check_output(tmp_path / "run", resume=False, overwrite=False)


@pytest.mark.parametrize("there", [False, True])
def test_one_run_at_a_time(there: bool, settings: Any, tmp_path: Path) -> None:
    if there:
        train(settings(max_steps=1))
    given = settings(max_steps=1, output=tmp_path / "alias" / "run", overwrite=there)
    before = snapshot(tmp_path)
    (tmp_path / "alias").symlink_to(tmp_path)
    with hold(tmp_path / "run"), pytest.raises(RunError, match="RW582"):
        train(given)
    assert snapshot(tmp_path) == before

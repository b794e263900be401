"""``--report-to``: trackers get what is logged, and the run stays what it was."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest

from rankwise.config import Tracker
from rankwise.errors import ConfigError, RankwiseWarning, RunError
from rankwise.records import read_metrics
from rankwise.training.run import train


class Fake:
    """Stands for the packages trackio and wandb, whose calls are the same."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.named, self.config, self.ended = "", {}, 0

    def init(self, project: str, *, name: str, config: dict[str, Any], **_: Any) -> Any:
        print("a dashboard opens")
        self.named, self.config = f"{project}/{name}", config
        return SimpleNamespace(log=self.log, finish=self.finish)

    def log(self, values: dict[str, float], step: int) -> None:
        self.lines.append((step, values))

    def finish(self) -> None:
        self.ended += 1


def find_trackers_as(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    found, names = importlib.util.find_spec, get_args(Tracker)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name in names else found(name, *more))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    find_trackers_as(monkeypatch, object())
    for name in ("trackio", "wandb"):
        monkeypatch.setitem(
            sys.modules, name, SimpleNamespace(init=lambda project="", **given: made.init(project, **given))
        )
    return made


@pytest.mark.parametrize("trackers", ["wandb", ("trackio", "wandb")])
def test_a_tracker_gets_what_is_logged_and_the_run_is_the_same(trackers, settings, tmp_path, fake, capsys):
    plain = train(settings(output=tmp_path / "plain"))
    assert fake.lines == []
    told = train(settings(output=tmp_path / "told", report_to=trackers))
    count = len(trackers) if isinstance(trackers, tuple) else 1
    lines = [line for line in read_metrics(tmp_path / "told") if "loss" in line for _ in range(count)]
    theirs = [(step, values["train/loss"]) for step, values in fake.lines if "train/loss" in values]
    assert [(line["step"], line["loss"]) for line in lines] == theirs
    assert all("memory/peak_memory_bytes" in values for _, values in fake.lines if "train/loss" in values)
    assert {step for step, values in fake.lines if "eval/loss" in values} == {0, 4, 8}
    assert (fake.named, fake.config["max_steps"], fake.ended) == ("rankwise/told", 8, count)
    assert (told.train_loss, told.eval_loss) == (plain.train_loss, plain.eval_loss)
    assert "dashboard" not in capsys.readouterr().out


def test_memory_stands_beside_its_prediction(settings, fake):
    plan = SimpleNamespace(before_loading=lambda *_: None, before_training=lambda *_: (2**20, 0))
    train(settings(report_to="trackio"), foresight=plan)
    values = fake.lines[-2][1]
    assert values["memory/predicted_peak_memory_bytes"] == 2**20
    assert values["memory/peak_memory_of_predicted"] == values["memory/peak_memory_bytes"] / 2**20


def test_a_tracker_that_cannot_start_stops_the_run(settings, fake, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no key for the server")

    monkeypatch.setattr(sys.modules["wandb"], "init", fail)
    with pytest.raises(RunError, match="wandb failed: no key for the server") as caught:
        train(settings(report_to=("trackio", "wandb")))
    assert caught.value.code == "RW629"
    assert fake.ended == 1


def test_a_tracker_that_fails_later_is_dropped_and_the_run_goes_on(settings, fake, monkeypatch):
    calls = []

    def fail(*_: Any) -> None:
        calls.append("log")
        raise OSError("the server is gone")

    monkeypatch.setattr(fake, "log", fail)
    with pytest.warns(RankwiseWarning, match="wandb failed: the server is gone"):
        told = train(settings(report_to="wandb"))
    assert calls == ["log"]
    assert told.status == "finished"


def test_missing_packages_are_named_together_and_nothing_is_written(settings, tmp_path, monkeypatch):
    find_trackers_as(monkeypatch, None)
    with pytest.raises(ConfigError) as caught:
        train(settings(output=tmp_path / "run", report_to=("wandb", "trackio")))
    assert caught.value.code == "RW794"
    assert "--report-to trackio, wandb" in caught.value.message
    assert "pip install trackio wandb" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(settings):
    with pytest.raises(ValueError, match="wandb"):
        settings(report_to="wandbb")

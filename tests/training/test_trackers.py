"""``--report-to``: transformers' own callbacks get what is logged, and the run stays what it was."""

from __future__ import annotations

import importlib.util
import sys
from types import SimpleNamespace
from typing import Any, get_args

import pytest
from transformers import TrainerCallback
from transformers.integrations import integration_utils

from rankwise.config import Tracker
from rankwise.errors import ConfigError, RankwiseWarning, RunError
from rankwise.records import read_metrics
from rankwise.training.run import train


class Recording(TrainerCallback):
    """Stands for the callback of a tracker."""

    seen: list[dict[str, float]]
    named: str

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        Recording.named = f"{args.project}/{args.run_name}"

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        Recording.seen.append(dict(logs, step=state.global_step))


def find_only_trackers_as(monkeypatch: pytest.MonkeyPatch, spec: Any) -> None:
    found = importlib.util.find_spec
    names = get_args(Tracker)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: spec if name in names else found(name, *more))


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tracker is found, and records."""
    Recording.seen = []
    for name in get_args(Tracker):
        monkeypatch.setitem(integration_utils.INTEGRATION_TO_CALLBACK, name, Recording)
    find_only_trackers_as(monkeypatch, object())


@pytest.mark.parametrize("trackers", [("trackio",), "wandb", ("tensorboard",)])
def test_a_tracker_gets_what_is_logged_and_the_run_is_the_same(trackers, settings, tmp_path, installed):
    plain = train(settings(output=tmp_path / "plain"))
    assert Recording.seen == []
    told = train(settings(output=tmp_path / "told", report_to=trackers))
    ours = [line for line in read_metrics(tmp_path / "told") if "loss" in line]
    theirs = [logs for logs in Recording.seen if "loss" in logs]
    assert [(line["step"], line["loss"]) for line in ours] == [(logs["step"], logs["loss"]) for logs in theirs]
    assert Recording.named == "rankwise/told"
    assert told.train_loss == plain.train_loss
    assert told.eval_loss == plain.eval_loss


def test_a_run_of_wandb_ends_with_ours(settings, tmp_path, installed, monkeypatch):
    ended = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(finish=lambda: ended.append(len(Recording.seen))))
    train(settings(output=tmp_path / "run", report_to="wandb"))
    assert ended == [len(Recording.seen)]
    train(settings(output=tmp_path / "other", report_to="mlflow"))
    assert len(ended) == 1


def test_a_tracker_that_cannot_start_stops_the_run(settings, tmp_path, installed, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError("no key for the server")

    monkeypatch.setattr(Recording, "on_train_begin", fail)
    with pytest.raises(RunError, match="wandb failed: no key for the server") as caught:
        train(settings(output=tmp_path / "run", report_to="wandb"))
    assert caught.value.code == "RW629"


def test_a_tracker_that_fails_later_is_dropped_and_the_run_goes_on(settings, tmp_path, installed, monkeypatch):
    calls = []

    def fail(*_: Any, **__: Any) -> None:
        calls.append("log")
        raise OSError("the server is gone")

    monkeypatch.setattr(Recording, "on_log", fail)
    with pytest.warns(RankwiseWarning, match="wandb failed: the server is gone"):
        told = train(settings(output=tmp_path / "run", report_to="wandb"))
    assert calls == ["log"]
    assert told.status == "finished"


@pytest.mark.parametrize("name", get_args(Tracker))
def test_transformers_knows_each_tracker_by_our_name(name):
    assert name in integration_utils.INTEGRATION_TO_CALLBACK


def test_missing_packages_are_named_together_and_nothing_is_written(settings, tmp_path, monkeypatch):
    find_only_trackers_as(monkeypatch, None)
    with pytest.raises(ConfigError) as caught:
        train(settings(output=tmp_path / "run", report_to=("wandb", "mlflow")))
    assert caught.value.code == "RW794"
    assert "--report-to mlflow, wandb" in caught.value.message
    assert "pip install mlflow wandb" in caught.value.message
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(settings):
    with pytest.raises(ValueError, match="wandb"):
        settings(report_to="wandbb")

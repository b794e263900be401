"""``compare --executor ray``: lost machines, and a real Ray cluster of two nodes where Ray is installed."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fake_comparison import Quiet, compare, given, starts, without_times

from in_process import steps_in_this_process
from rankwise.comparison import pool, run
from rankwise.comparison.pool import LOST, connect
from rankwise.errors import RunError

pytestmark = [
    pytest.mark.filterwarnings("ignore::rankwise.errors.RankwiseWarning"),
    pytest.mark.usefixtures("real_stages"),
]
needs_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed")


def unreliable(losses: int) -> Any:
    """A cluster on which the first training loses its machine so many times."""
    left = {"losses": losses}

    def start(module: str, arguments: list[str], name: Path, environment: dict[str, str]) -> Any:
        if name.name.startswith("lora") and name.name.endswith("seed0.train") and left["losses"]:
            left["losses"] -= 1
            return pool.Call(lambda: LOST, lambda: None)
        return pool.start(module, arguments, name, environment)

    return SimpleNamespace(places=2, start=start)


@pytest.mark.parametrize(("losses", "finished"), [(2, 4), (3, 3)])
def test_a_lost_step_starts_again_but_not_for_ever(
    losses: int, finished: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps_in_this_process(monkeypatch)
    monkeypatch.setattr(run, "connect", lambda *_: unreliable(losses))
    found: Any = compare(**given(tmp_path, methods="lora,full", learning_rates="2e-4", executor="ray"))
    assert sum(item["status"] == "finished" for item in found["runs"]) == finished
    errors = [item["error"]["code"] for item in found["runs"] if item["error"]]
    assert errors == ["RW583"] * (4 - finished)


def test_no_cluster_is_one_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError) as caught:
        connect("127.0.0.1:1", "cpu")
    assert caught.value.code == "RW555"


def test_without_a_cluster_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(RunError, match="RW555|Ray"):
        compare(**given(tmp_path, executor="ray", address="127.0.0.1:1"))
    assert not (tmp_path / "out").exists()


class Fault(Exception):
    cause = OSError("no folder")


class NodeGone(Exception): ...


@pytest.mark.parametrize(
    ("found", "code"), [("3", 3), (TimeoutError(), -signal.SIGINT), (NodeGone(), LOST), (Fault(), None)]
)
def test_a_task_is_watched_and_stopped_through_ray(
    found: Any, code: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its reference alone; Ray's errors are exit codes, or one of the folder's."""
    asked: list[object] = []

    def get(reference: object) -> object:
        if isinstance(found, Exception):
            raise found
        return found

    kinds = SimpleNamespace(TaskCancelledError=TimeoutError, RayTaskError=Fault, RayError=NodeGone)
    task = SimpleNamespace(remote=lambda *_: "task")
    ray = SimpleNamespace(get=get, cancel=asked.append, exceptions=kinds, remote=lambda **_: lambda function: task)
    monkeypatch.setitem(sys.modules, "ray", ray)
    call = pool.Cluster({}, 1).start("module", [], tmp_path / "out", {})
    call.stop()
    assert asked == ["task"]
    if code is not None:
        assert call.wait() == code
        return
    with pytest.raises(RunError, match="RW555.*no folder"):
        call.wait()


@pytest.fixture
def two_nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name, value in pool.QUIET.items():
        monkeypatch.setenv(name, value)
    import ray
    from ray.cluster_utils import Cluster

    # The nodes keep the environment of their start.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), *sys.path]))
    monkeypatch.setenv("FAKE_STEP_SECONDS", "0.6")
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    second = cluster.add_node(num_cpus=1)
    yield cluster, second
    ray.shutdown()
    cluster.shutdown()


@needs_ray
@pytest.mark.slow
def test_a_killed_node_changes_nothing_in_the_report(
    two_nodes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    cluster, second = two_nodes
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    watcher = Killer(lambda: cluster.remove_node(second, allow_graceful=False), tmp_path / "ray")
    kwargs = {"learning_rates": "2e-4", "methods": "lora,full"}
    found: Any = compare(watcher=watcher, **given(tmp_path, "ray", executor="ray", **kwargs))
    assert watcher.lost
    assert "state-dump" not in "".join(capfd.readouterr())
    local: Any = compare(**given(tmp_path, "local", **kwargs))
    assert set(starts(tmp_path / "ray")) == set(starts(tmp_path / "local"))
    assert without_times(found["methods"], tmp_path / "ray") == without_times(local["methods"], tmp_path / "local")


class Killer(Quiet):
    """Kills once two trainings run and have made a step."""

    def __init__(self, kill: Callable[[], object], folder: Path) -> None:
        self.kill, self.folder, self.lost = kill, folder, False
        threading.Thread(target=self.wait, daemon=True).start()

    def wait(self) -> None:
        while len(list(self.folder.glob("runs/*/step-*"))) < 2 or len(list(self.folder.glob("runs/*"))) < 2:
            time.sleep(0.02)
        self.kill()

    def say(self, text: str) -> None:
        self.lost |= "its machine is gone" in text

"""Two processes that train one model over gloo. Each launch takes seconds, so that few of them are looked at often."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from rankwise.cli.launch import _failure, continued
from rankwise.cli.main import main
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, Interrupted, RunError
from rankwise.records import RunRecord, read_metrics
from rankwise.training import ranks
from rankwise.training.batches import KEY
from rankwise.training.shares import Remainder, Shares, share

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
# 29 rows in batches of 4, and 2 of them a step: an epoch ends in a batch of one row. 12 steps are 3 epochs.
ROWS, EVAL_ROWS, STEPS = 29, 7, 12
# Seconds after which a run hangs, on a machine that has other work too.
LONG = 500
OPTIONS = (
    *("--dtype", "float32", "--device", "cpu", "--r", 4, "--max-length", 48, "--learning-rate", 1e-3),
    *("--gradient-accumulation", 2, "--max-steps", STEPS, "--eval-steps", 4, "--save-steps", 2, "--logging-steps", 1),
    *("--lr-scheduler-type", "constant", "--ignore-plan"),
)


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("rows")
    for name, count in (("train", ROWS), ("eval", EVAL_ROWS)):
        rows = [{"prompt": f"{name} {index}: ", "completion": "abcdefgh"[: 2 + index % 6]} for index in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = ("--data", folder / "train.jsonl", "--eval-data", folder / "eval.jsonl")
    return [str(item) for item in ("train", "--model", model_folder, *data, *OPTIONS)]


def start(arguments: list[Any]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "rankwise", *map(str, arguments)]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=ENVIRONMENT, **pipes)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(folder / "adapter_model.safetensors")


def lines(folder: Path, name: str) -> list[float]:
    return [line[name] for line in read_metrics(folder) if name in line]


def record(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "run.json").read_text())


class Runs:
    """The runs that several tests look at: one process of batch 4, and two of batch 2."""

    def __init__(self, folder: Path, given: list[str]) -> None:
        self.one, self.two = folder / "one", folder / "two"
        two = start([*given, "--method", "qdora", "--batch-size", 2, "--devices", 2, "--output", self.two, "--json"])
        assert main([*given, "--method", "qdora", "--batch-size", "4", "--output", str(self.one)]) == 0
        self.stdout, self.stderr = two.communicate(timeout=LONG)
        assert two.returncode == 0, self.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, given: list[str]) -> Runs:
    return Runs(tmp_path_factory.mktemp("runs"), given)


def test_two_processes_give_the_losses_of_one(runs: Runs) -> None:
    expected, found = lines(runs.one, "loss"), lines(runs.two, "loss")
    assert len(found) == STEPS
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found == pytest.approx(expected, rel=1e-4)
    assert lines(runs.two, "entropy") == pytest.approx(lines(runs.one, "entropy"), rel=1e-4)
    assert lines(runs.two, "eval_loss") == pytest.approx(lines(runs.one, "eval_loss"), rel=1e-5)
    assert lines(runs.two, "eval_loss")[0] == lines(runs.one, "eval_loss")[0]


def test_two_processes_learn_what_one_learns(runs: Runs) -> None:
    expected, found = weights(runs.one), weights(runs.two)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


def test_the_record_is_that_of_both(runs: Runs) -> None:
    one, two = record(runs.one), record(runs.two)
    assert (two["devices"], two["strategy"], one["devices"], one["strategy"]) == (2, "ddp", 1, None)
    assert two["frozen_bytes"] == one["frozen_bytes"] > 0
    assert (two["status"], two["kept_step"]) == ("finished", one["kept_step"])
    assert lines(runs.two, "tokens") == lines(runs.one, "tokens")
    assert two["tokens_per_second"] > 0
    assert two["peak_memory_bytes"] > 0


def test_one_process_writes_and_speaks(runs: Runs) -> None:
    assert json.loads(runs.stdout)["steps"] == STEPS
    assert runs.stderr.count("Training ...") == 1
    assert lines(runs.two, "step") == sorted(lines(runs.two, "step"))
    states = {path.name for path in next((runs.two / "checkpoints").iterdir()).glob("random*.json")}
    assert states == {"random.json", "random-1.json"}


def test_a_sharded_run_is_the_unsharded_one(runs: Runs, given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "sharded"
    options = ("--method", "qdora", "--batch-size", 2, "--devices", 2, "--strategy", "fsdp", "--sample-prompt", "a")
    code, stderr = ended(start([*given, *options, "--output", folder]))
    assert code == 0, stderr
    whole, sharded = record(runs.two), record(folder)
    assert sharded["strategy"] == "fsdp"
    assert sharded["frozen_bytes"] <= 0.55 * whole["frozen_bytes"]
    assert lines(folder, "loss") == lines(runs.two, "loss")
    assert lines(folder, "eval_loss") == lines(runs.two, "eval_loss")
    expected, found = weights(runs.two), weights(folder)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def children(pid: int) -> list[int]:
    """The processes of a launcher, by rank."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if int(folder.joinpath("stat").read_text().rpartition(")")[2].split()[1]) == pid:
                environment = folder.joinpath("environ").read_bytes().split(b"\0")
                found |= {int(item[5:]): int(folder.name) for item in environment if item.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


@contextlib.contextmanager
def running(arguments: list[Any], folder: Path, after: str) -> Iterator[subprocess.Popen[str]]:
    """A launched run, once ``after`` (a pattern) exists in its folder."""
    run = start(arguments)
    try:
        deadline = time.monotonic() + LONG
        while not list(folder.glob(after)) and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        yield run
    finally:
        run.kill()


def ended(run: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and messages; a run that hangs fails the test."""
    stderr = run.communicate(timeout=LONG)[1]
    return run.returncode, stderr


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_killed_process_ends_all_and_the_run_continues_to_the_bit(
    runs: Runs, given: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "killed"
    options = [*given, "--method", "qdora", "--batch-size", 2, "--devices", 2, "--output", folder]
    with running(options, folder, "checkpoints/step-2") as run:
        os.kill(children(run.pid)[1], signal.SIGKILL)
        code, stderr = ended(run)
    assert code == 2
    assert stderr.count("error RW") == 1, stderr
    assert "error RW702: process 0 of 2 has lost the others" in stderr
    assert record(folder)["status"] == "failed"
    again = start(["train", "--resume", "--output", folder])
    code, stderr = ended(again)
    assert code == 0, stderr
    expected, found = weights(runs.two), weights(folder)
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []
    assert lines(folder, "loss") == lines(runs.two, "loss")


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds the processes in /proc")
def test_a_signal_to_one_process_saves_once_and_ends_all(given: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "stopped"
    options = [*given, "--max-steps", 2000, "--batch-size", 2, "--devices", 2, "--output", folder]
    with running(options, folder, "checkpoints/step-2") as run:
        os.kill(children(run.pid)[1], signal.SIGTERM)
        code, stderr = ended(run)
    assert code == 130
    assert stderr.count("interrupted RW") == 1, stderr
    assert "interrupted RW540: stopped after step" in stderr
    done = record(folder)
    assert done["status"] == "interrupted"
    assert (folder / "checkpoints" / f"step-{done['steps']}").is_dir()


UNEQUAL = """
import os, sys
from rankwise.cli.main import main
sys.exit(main([*sys.argv[1:], "--seed", os.environ["RANK"]]))
"""


def test_processes_that_differ_are_refused_with_one_message(given: list[str], tmp_path: Path) -> None:
    script = tmp_path / "unequal.py"
    script.write_text(UNEQUAL)
    # Without -- torchrun would take --r for one of its own options.
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--", str(script)]
    done = subprocess.run(
        [sys.executable, *launcher, *given, "--output", str(tmp_path / "run")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=LONG,
    )
    assert done.returncode != 0
    assert done.stderr.count("error RW") == 1, done.stderr
    assert "RW700: the processes of this run do not do the same: --seed is 1 in process 1 and 0 in" in done.stderr
    assert not (tmp_path / "run").exists()


# --- what needs no launch ---


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 5, 8, 23, 24])
def test_the_shares_are_the_batches_of_one_process(rows: int, count: int) -> None:
    size = 2
    each = [list(Shares(range(rows), size, count, rank)) for rank in range(count)]
    assert len({len(batches) for batches in each}) == 1
    idle = [Remainder(rows, size, count, rank).is_idle for rank in range(count)]
    taken = []
    for batches in zip(*each):
        last = batches[-1] is each[-1][-1]
        real = [batch for rank, batch in enumerate(batches) if not (last and idle[rank])]
        taken += [row for batch in real for row in batch]
        assert all(1 <= len(batch) <= size for batch in batches)
    assert taken == list(range(rows))


def test_parts_are_as_even_as_can_be() -> None:
    parts = [share(list(range(7)), 3, rank) for rank in range(3)]
    assert parts == [[0, 1, 2], [3, 4], [5, 6]]


def test_an_idle_process_learns_nothing_from_its_row() -> None:
    remainder = Remainder(5, 2, 2, 1)
    assert remainder.is_idle
    batch = {"labels": torch.tensor([[1, 2]]), "input_ids": torch.tensor([[1, 2]])}
    masked = remainder.masked(batch)
    assert masked["labels"].eq(-100).all()
    assert (masked[KEY].tokens, masked[KEY].examples, len(masked[KEY].scored)) == (0, 0, 0)


LAUNCHED = dict(zip(LAUNCHERS, ("1", "2", "1", "2", "localhost", "29500")))


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def write(**values: str) -> None:
        for name in LAUNCHERS:
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return write


def test_the_place_is_read_from_torchruns_environment(environment: Callable[..., None]) -> None:
    environment(**LAUNCHED)
    assert ranks.place() == ranks.Place(rank=1, count=2, local_rank=1, local_count=2)
    assert not ranks.is_writer()
    environment(WORLD_SIZE="1", RANK="0")
    assert ranks.place() is None
    assert ranks.is_writer()


@pytest.mark.parametrize(
    ("verb", "changes", "words"),
    [
        ("train", {"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ("evaluate", {"WORLD_SIZE": "x"}, "WORLD_SIZE=x"),
        ("train", {"WORLD_SIZE": "1", "LOCAL_RANK": "-1"}, "LOCAL_RANK=-1"),
        ("train", {"MASTER_ADDR": ""}, "and not MASTER_ADDR"),
        ("train", {"RANK": "2"}, "and RANK=2"),
    ],
)
def test_a_broken_environment_is_one_clear_error(
    verb: str, changes: dict[str, str], words: str, rankwise: Any, environment: Any, tmp_path: Path
) -> None:
    environment(**{**LAUNCHED, **changes})
    given = ("--model", "demo", "--data", "stdlib", "--output", tmp_path / "run")
    done = rankwise(verb, *given, *(("--task", "perplexity") if verb == "evaluate" else ()))
    assert done.code == 2
    assert "RW136" in done.stderr
    assert words in done.stderr


def settings(**changes: Any) -> TrainSettings:
    return TrainSettings(**{"model": "demo", "data": "stdlib", "output": Path("run"), **changes})


@pytest.mark.parametrize(
    ("changes", "processes", "code"),
    [
        ({"devices": 2}, 4, "RW137"),
        ({"devices": 2}, 1, "RW137"),
        ({"strategy": "ddp"}, 1, "RW138"),
        ({"method": "prefix"}, 2, "RW146"),
        ({"strategy": "fsdp", "method": "full"}, 2, "RW148"),
    ],
)
def test_options_that_do_not_go_with_the_processes_are_refused(
    changes: dict[str, Any], processes: int, code: str
) -> None:
    with pytest.raises(ConfigError, match=code):
        ranks.check_processes(settings(**changes), processes)
    ranks.check_processes(settings(), processes)


def test_an_apple_gpu_is_one_device() -> None:
    with pytest.raises(ConfigError, match="RW139"):
        ranks.check_cards("mps", 2)
    ranks.check_cards("cpu", 64)


def test_the_exit_code_is_that_of_the_process_that_failed() -> None:
    assert _failure({0: 130, 1: 2}).exit_code == 2  # type: ignore[attr-defined]
    assert _failure({0: 130, 1: 130}).exit_code == 130  # type: ignore[attr-defined]
    assert _failure({0: -15, 1: 1}).exit_code == 1  # type: ignore[attr-defined]
    killed = _failure({0: -9, 1: -15})
    assert isinstance(killed, RunError)
    assert "process 0 by SIGKILL, process 1 by SIGTERM" in killed.message


def test_a_restarted_process_resumes_what_the_last_one_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = settings(output=tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not continued(given).resume
    run = RunRecord(method="lora", seed=0, settings={}, status="failed")
    run.save(tmp_path)
    assert continued(given).resume
    run.status = "interrupted"
    run.save(tmp_path)
    with pytest.raises(Interrupted):
        continued(given)
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ConfigError, match="RW147"):
        continued(settings(output=tmp_path, overwrite=True))

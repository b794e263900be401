"""``rankwise train``: fine-tune, show the progress, and print the results.

Several processes on this machine are started by torch's elastic launcher, as torchrun starts them.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from pathlib import Path

import typer

from rankwise.cli.options import Command
from rankwise.compat.system import end_with_parent
from rankwise.config import TrainSettings
from rankwise.errors import Interrupted, RunError
from rankwise.records import write_text
from rankwise.training import ranks
from rankwise.training.checkpoints import holds_run
from rankwise.verbs.output import Document, Output
from rankwise.verbs.train import carry_out, check, settings_of_the_run, summary


def run(settings: TrainSettings, output: Output) -> Document | None:
    """Train. Returns the document of the run; None if another process (a launched one, or the writer) prints it."""
    began = time.monotonic()
    end_with_launcher()
    settings = continued(settings)
    if ranks.place() is None and (settings.devices or 1) > 1:
        check(settings)
        ranks.check_processes(settings, settings.devices or 1)
        launch(settings, as_json=output.as_json)
        return None
    output.console.quiet = not ranks.is_writer()
    record = carry_out(settings, output, began)
    for label, text in summary(settings.output, record):
        output.line(f"{label:<12}{text}")
    return {"output": str(settings.output)} | record.to_json() if ranks.is_writer() else None


COMMAND = Command(
    name="train",
    settings=TrainSettings,
    run=run,
    summary="Fine-tune a model on your data, and write a run folder: adapter, record, loss curve.",
    examples=(
        "rankwise train --model demo --data rows.jsonl --output runs/first",
        "rankwise train --model demo --data train.csv --eval-data dev.csv \\",
        "    --method dora --r 8 --max-steps 200 --output runs/dora",
        "rankwise train --resume --output runs/first",
    ),
    earlier=settings_of_the_run,
)


INTERRUPTED = Interrupted.exit_code
# The environment variable that gives launched processes the number of their launcher's process.
LAUNCHER = "RANKWISE_LAUNCHER"


def launch(settings: TrainSettings, *, as_json: bool) -> None:
    """Train in ``settings.devices`` processes and wait for them. The processes print their own messages.

    Raises typer.Exit with their exit code if they did not finish, RunError (RW704) if they were killed.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from rankwise.models.device import usable_cores

    assert settings.devices is not None
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // settings.devices)))
    # A process that was asked to stop ends its step and saves, within the time that the others wait for it.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(ranks.PATIENCE_SECONDS))
    # nohup lets a command ignore SIGHUP, and the launcher would end its processes at that signal all the same.
    ignores_hangup = hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=settings.devices,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=0,
        signals_to_handle="SIGTERM,SIGINT,SIGQUIT" + ("" if ignores_hangup else ",SIGHUP"),
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )
    # The launcher would repeat the processes' messages.
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="rankwise-") as folder:
        file = Path(folder) / "train.yaml"
        write_text(file, json.dumps(settings.model_dump(mode="json", exclude_unset=True), ensure_ascii=False))
        command = ("-m", "rankwise", "train", "--config", str(file), *(["--json"] if as_json else []))
        os.environ[LAUNCHER] = str(os.getpid())
        try:
            elastic_launch(config, sys.executable)(*command)
        except SignalException:
            raise typer.Exit(INTERRUPTED) from None
        except ChildFailedError as error:
            raise _failure({number: failure.exitcode for number, failure in error.failures.items()}) from None
        finally:
            del os.environ[LAUNCHER]


def end_with_launcher() -> None:
    """In a process that ``launch`` started: end, with its step saved, when the launcher is killed. The processes are in
    sessions of their own, so that nothing else would end them.
    """
    launcher = os.environ.pop(LAUNCHER, None)
    if launcher is None:
        return
    end_with_parent()
    if str(os.getppid()) != launcher:
        # It was killed before.
        os.kill(os.getpid(), signal.SIGTERM)


def _failure(codes: dict[int, int]) -> Exception:
    """The exception for the exit codes of the processes; a killed one has minus its signal's number."""
    told = [code for code in codes.values() if code > 0 and code != INTERRUPTED]
    lost = {number: code for number, code in codes.items() if code < 0}
    # Once a process is lost, the launcher interrupts the others, which then report no reason.
    if told or (not set(lost.values()) - {-signal.SIGTERM} and INTERRUPTED in codes.values()):
        return typer.Exit(told[0] if told else INTERRUPTED)
    killed = ", ".join(f"process {number} by {signal.Signals(-code).name}" for number, code in lost.items())
    return RunError(
        "RW704",
        f"the processes were killed ({killed}); continue from the last checkpoint with --resume, if there is one.",
    )


def continued(settings: TrainSettings) -> TrainSettings:
    """The settings of a process that torchrun has restarted (--max-restarts): it resumes from the last checkpoint."""
    is_again = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and holds_run(settings.output)
    return settings.model_copy(update={"resume": True, "overwrite": False}) if is_again else settings

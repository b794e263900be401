"""Several processes of ``rankwise train`` on this machine, by torch's elastic launcher, as torchrun starts them."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

import typer

from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, Interrupted, RunError
from rankwise.records import load_record, write_text
from rankwise.training import ranks
from rankwise.training.interrupt import end_with_parent
from rankwise.training.output import holds_run

INTERRUPTED = Interrupted.exit_code
# The environment variable that gives launched processes the number of their launcher's process.
LAUNCHER = "RANKWISE_LAUNCHER"


def launch(settings: TrainSettings, *, as_json: bool) -> None:
    """Train in ``settings.devices`` processes and wait for them. The processes print their own messages.

    Raises typer.Exit with their exit code where they did not finish, RunError (RW704) where they were killed.
    """
    # Imported here, so that the command line does not load torch.
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
    """The settings of a process that torchrun has restarted (--max-restarts): it resumes from the last checkpoint.

    Raises ConfigError (RW147) for --overwrite, which would remove that; Interrupted (RW543) for a run that was stopped.
    """
    if settings.overwrite and int(os.environ.get("TORCHELASTIC_MAX_RESTARTS") or 0) > 0:
        raise ConfigError(
            "RW147",
            "--overwrite and torchrun's --max-restarts do not go together: each restart would remove what the last one "
            f"had trained; remove {settings.output} yourself, or leave one of the two out.",
        )
    if not ranks.restarts() or not holds_run(settings.output):
        return settings
    if load_record(settings.output).status == "interrupted":
        raise Interrupted("RW543", "train was stopped by Ctrl-C or SIGTERM, and is not started again.")
    return settings.model_copy(update={"resume": True})

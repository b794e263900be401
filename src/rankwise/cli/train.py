"""``rankwise train``: fine-tune, show the progress, and print the results.

Several processes on this machine are started by torch's elastic launcher, as torchrun starts them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from rankwise.cli.options import Command
from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, DataError, Interrupted, RunError, is_out_of_memory, out_of_memory
from rankwise.evaluation.tasks.names import retained_from
from rankwise.foreign import Fields
from rankwise.labels import in_words
from rankwise.methods import method_of
from rankwise.objectives import OBJECTIVES
from rankwise.options import flag
from rankwise.planning.workload import uncollected
from rankwise.records import RunRecord, load_record, read_metrics, write_text
from rankwise.reports.numbers import byte_size, duration, plural, rate
from rankwise.reports.summary import change_of
from rankwise.training import ranks
from rankwise.training.checkpoints import holds_run
from rankwise.verbs.output import Document, Output, watching
from rankwise.verbs.settings import check_paths

if TYPE_CHECKING:
    from rankwise.planning.guard import MemoryGuard

# Options that --resume does not take from the record: code of a model, for one, runs on explicit request only.
NOT_OF_THE_RUN = {"output", "resume", "overwrite", "trust_remote_code"}


def settings_of_the_run(given: Fields) -> Fields:
    """With --resume: the settings in ``run.json`` of --output, so that no option has to be repeated.

    Raises RunError (RW503 to RW505) if the folder holds no run to resume, DataError (RW201) for missing data, and
    ConfigError (RW770) if a Python file of its rewards is not given again.
    """
    if given.get("resume") is not True or not isinstance(given.get("output"), str):
        return {}
    from rankwise.training.checkpoints import check_output

    folder = Path(given["output"])
    check_output(folder, resume=True, overwrite=given.get("overwrite") is True)
    known = set(TrainSettings.model_fields) - NOT_OF_THE_RUN
    if "epochs" in given:
        # The run's own max_steps would override the given epochs.
        known.discard("max_steps")
    settings = load_record(folder).settings
    _check_rewards(folder, settings, given)
    found = {name: value for name, value in settings.items() if name in known}
    _check_data({name: value for name, value in found.items() if name not in given})
    return found


def _check_rewards(folder: Path, settings: Fields, given: Fields) -> None:
    """Raise ConfigError (RW770) for Python code that the run names: it runs only when the user gives it again."""
    specs = settings.get("reward") or ()
    if "reward" not in given and any(".py:" in spec for spec in specs):
        again = " ".join(f"--reward {spec}" for spec in specs)
        raise ConfigError(
            "RW770",
            f"the run in {folder} was rewarded by a Python file, and such a file runs only on request; pass it again: "
            f"{again}.",
        )


def _check_data(settings: Fields) -> None:
    """Raise DataError (RW201) for missing files that the run's record names and the user did not write."""
    from rankwise.data import check_there

    found = {**settings, "retain": retained_from(settings.get("retain"))[1]}
    for name in ("data", "eval_data", "retain"):
        if isinstance(path := found.get(name), str):
            try:
                check_there(path)
            except DataError:
                option = flag(name)
                text = f"there is no file or folder {path}, which the run took as {option}; give it with {option} PATH."
                raise DataError("RW201", text) from None


def run(settings: TrainSettings, output: Output) -> Document | None:
    """Train. Returns the document of the run; None if another process (a launched one, or the writer) prints it."""
    from rankwise.training.checkpoints import check_output

    began = time.monotonic()
    end_with_launcher()
    _, retained = retained_from(settings.retain)
    check_paths(model=settings.model, data=(settings.data, settings.eval_data, retained), output=settings.output)
    settings = continued(settings)
    # Before torch is loaded; the run checks this again when it holds the folder.
    check_output(settings.output, resume=settings.resume, overwrite=settings.overwrite)
    where = ranks.place()
    processes = settings.devices or 1
    if where is None and processes > 1:
        ranks.check_processes(settings, processes)
        launch(settings, as_json=output.as_json)
        return None
    output.console.quiet = not ranks.is_writer()
    # While torch and transformers are imported, collections free nothing and take a quarter of the time.
    with uncollected():
        from rankwise.evaluation.retained import RetainedRows
        from rankwise.training.parts import part_of
        from rankwise.training.run import train_as_asked
        from rankwise.training.setup import with_adapters_options
        from rankwise.training.watch import SilentObserver
    asked = with_adapters_options(settings)
    retention = None if asked.retain is None else part_of(RetainedRows, asked)
    guard = _guard(asked.model_dump(), output)
    try:
        watched = watching(output, every=settings.logging_steps, of_rewards=OBJECTIVES[settings.objective].of_rewards)
        with watched if ranks.is_writer() else contextlib.nullcontext(SilentObserver()) as observer:
            record = train_as_asked(asked, observer, guard, retention, began)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, guard.advice()) from error
    for label, text in summary(settings.output, record):
        output.line(f"{label:<12}{text}")
    return {"output": str(settings.output)} | record.to_json() if ranks.is_writer() else None


def _guard(settings: Fields, output: Output) -> MemoryGuard:
    from rankwise.acceleration import anonymous_memory_bytes
    from rankwise.planning.guard import MemoryGuard

    where = ranks.place()
    started = {} if where is None else {"devices": where.count}
    return MemoryGuard(
        {**settings, **started},
        output.line,
        anonymous_memory_bytes,
        ignore=settings["ignore_plan"],
        sharers=1 if where is None else where.local_count,
    )


def summary(folder: Path, record: RunRecord) -> Iterator[tuple[str, str]]:
    """The results of a finished run, as labelled lines."""
    yield "reward" if OBJECTIVES[record.objective].of_rewards else "loss", change_sentence(folder, record)
    if record.kept_step is not None:
        because = f": {record.kept_because}" if record.kept_because else ""
        yield "kept", f"step {record.kept_step} of {record.steps}{because}"
    if "reward_accuracy" in record.eval_rewards:
        accuracy, margin = (record.eval_rewards.get(f"reward_{name}") or 0.0 for name in ("accuracy", "margin"))
        yield (
            "rewards",
            f"{accuracy:.1%} of the evaluation pairs have the better answer ahead, by {margin:.3g} on average",
        )
    if (answers := record.answers) is not None:
        is_few = 2 * answers["changed"] <= answers["asked"]
        few = "; to change them, train on demonstrations first and continue with --adapter" if is_few else ""
        yield "answers", f"{answers['changed']} of {answers['asked']} greedy answers differ from the reference's{few}"
    if OBJECTIVES[record.objective].of_labels and "eval" in record.data:
        yield "answers", f"{in_words(record.eval_rewards, record.data['eval']['rows'])} on the evaluation data"
    if record.trainable_parameters is not None and record.total_parameters:
        share = 100 * record.trainable_parameters / record.total_parameters
        yield "trained", f"{record.trainable_parameters:,} parameters, {share:.2f} % of the model"
    if (kept := record.retained) is not None:
        what = "question" if kept.get("unit") == "question" else "row"
        rows = f"on {plural(kept['rows'], what)} of {kept['source']}"
        yield "retained", f"{kept['base']:.4f} -> {kept['loss']:.4f} {rows}: {kept['verdict']} ({change_of(kept)})"
    if record.rate_search is not None:
        chosen, trials = record.rate_search["chosen"], record.rate_search["trials"]
        tried = plural(len({trial["learning_rate"] for trial in trials}), "rate")
        steps = plural(sum(trial["steps"] for trial in trials), "step")
        yield "rate", f"{rate(chosen)}, the best of {tried} in short runs of {steps} together"
    yield "speed", _speed(record)
    yield "written", f"{folder}  (curve: {folder / 'loss.svg'})"
    row = method_of(record.method)
    # `generate` does not load methods of other distributions.
    if OBJECTIVES[record.objective].of_labels:
        yield "try", f"rankwise predict --{'model' if row.trains_all else 'adapter'} {folder} --data D"
    elif not row.is_guest:
        kind, compare = ("model", "") if row.trains_all else ("adapter", " --compare")
        yield "try", f'rankwise generate --{kind} {folder} --prompt "..."{compare}'


def change_sentence(folder: Path, record: RunRecord) -> str:
    """The loss, or of rewards the mean reward, before and after; without evaluation data, the first and the last line
    of ``metrics.jsonl``.
    """
    is_reward = OBJECTIVES[record.objective].of_rewards
    if record.initial_eval_loss is not None and record.eval_loss is not None:
        # The evaluation loss of rewards is the negative of their mean.
        before, after = (-loss if is_reward else loss for loss in (record.initial_eval_loss, record.eval_loss))
        return f"{before:.4f} -> {after:.4f} on the evaluation data"
    figure, trained_on = ("reward", "training prompts") if is_reward else ("loss", "training data")
    logged = [line[figure] for line in read_metrics(folder) if line.get(figure) is not None]
    if not logged:
        return "not logged"
    return f"{logged[0]:.4f} -> {logged[-1]:.4f} on the {trained_on}, first and last as logged (no --eval-data)"


def _speed(record: RunRecord) -> str:
    several = record.devices > 1
    together = f" of {record.devices} processes together ({record.strategy})" if several else ""
    peak = f"peak memory{' of one process' if several else ''} {byte_size(record.peak_memory_bytes)}"
    if record.predicted_peak_memory_bytes is not None:
        peak += f" (predicted {byte_size(record.predicted_peak_memory_bytes)})"
    speed = "–" if record.tokens_per_second is None else f"{record.tokens_per_second:,.0f}"
    return f"{speed} tokens/s{together}, {peak}, {duration(record.wall_seconds)} in all"


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
    ranks.end_with_parent()
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

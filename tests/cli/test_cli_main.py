"""The frame of the command line: help, errors, exit codes, where output goes."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import pytest

from rankwise.cli import main as cli
from rankwise.cli.options import Command, options_of
from rankwise.errors import DataError, Interrupted, warn
from rankwise.options import Count, Names, Panel, Settings, option

SOURCE = Path(__file__).parents[2] / "src"
HELP_LIMIT_SECONDS = 0.5
# As a library may raise it that was being imported.
AFTER_CTRL_C = ImportError("the core failed to import")
AFTER_CTRL_C.__cause__ = KeyboardInterrupt()


class PlaySettings(Settings):
    count: Annotated[Count, option(Panel.OTHER, "How many.")] = 1
    names: Annotated[Names, option(Panel.OTHER, "Which ones.")] = ()


def play(run):
    """The command line with one command of our own."""
    return Command(name="play", settings=PlaySettings, run=run, summary="Play.", examples=("rankwise play",))


def raising(error: BaseException):
    def run(settings, output):
        raise error

    return run


@pytest.fixture
def with_command(monkeypatch, rankwise):
    build_app = cli.build_app

    def call(run, *arguments):
        app = build_app([play(run)])
        monkeypatch.setattr(cli, "build_app", lambda: app)
        return rankwise("play", *arguments)

    return call


def fresh_python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, check=True)


def cpu_seconds(*arguments: str) -> float:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    fresh_python(*arguments)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_help_is_quick():
    """Half a second where Python and the libraries of every command line take 0.1 s; a slower processor has longer."""
    libraries, ours = [], []
    for _ in range(3):
        libraries.append(cpu_seconds("-c", "import pydantic, rich.console, typer"))
        ours.append(cpu_seconds("-m", "rankwise", "--help"))
    assert min(ours) < HELP_LIMIT_SECONDS * max(1.0, min(libraries) / 0.1)


HELP_OF_ALL = """
import sys
from rankwise.cli.main import COMMANDS, main
for words in [[], *([command.name] for command in COMMANDS)]:
    code = main([*words, "--help"])
    heavy = {"torch", "transformers", "datasets", "trl", "numpy", "matplotlib"} & set(sys.modules)
    if code or heavy:
        sys.exit(f"{words}: {code} {heavy}")
"""


def test_help_imports_no_heavy_library():
    assert fresh_python("-c", HELP_OF_ALL).stdout.count("Usage: rankwise") == 1 + len(cli.COMMANDS)


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_help_of_a_command_has_an_example_and_every_option(command, rankwise):
    done = rankwise(command.name, "--help")
    assert done.code == 0
    assert f"  {command.examples[0]}" in done.stdout
    for shown in options_of(command):
        assert (shown.metavar if shown.kind == "argument" else shown.flag) in done.stdout
    assert "--json" in done.stdout
    assert "--config FILE.yaml" in done.stdout


@pytest.mark.parametrize("command", cli.COMMANDS, ids=lambda command: command.name)
def test_help_fits_80_columns(command, rankwise, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = rankwise(command.name, "--help").stdout
    assert all(len(line) <= 80 for line in text.splitlines())


def test_without_arguments_it_shows_the_commands(rankwise):
    done = rankwise()
    assert done.code == 0
    for command in cli.COMMANDS:
        assert f"  {command.name} " in done.stdout


def test_version_names_the_libraries(rankwise):
    done = rankwise("--version")
    assert done.code == 0
    assert done.stdout.startswith("rankwise ")
    assert "transformers" in done.stdout


@pytest.mark.parametrize(
    ("error", "code", "start"),
    [
        (DataError("RW203", "line 3 has no prompt."), 2, "error RW203: line 3 has no prompt."),
        (Interrupted("RW540", "stopped after step 3."), 130, "interrupted RW540: stopped after step 3."),
        (KeyboardInterrupt(), 130, "interrupted RW543: "),
        (AFTER_CTRL_C, 130, "interrupted RW543: "),
        (Exception("boom"), 1, "error RW900: a fault of rankwise: Exception: boom; "),
        (RuntimeError("boom\nsecond line"), 1, "error RW900: a fault of rankwise: RuntimeError: boom second line; "),
        (MemoryError(), 2, "error RW550: "),
        (PermissionError(13, "Permission denied", "/somewhere"), 2, "error RW551: /somewhere: permission denied"),
        (OSError(28, "No space left on device", "/full/disk"), 2, "error RW551: /full/disk: no space left on device"),
        (OSError(28, "No space left on device"), 2, "error RW551: a file or the standard output: no space left"),
    ],
)
def test_an_error_is_one_line_and_an_exit_code(error, code, start, with_command):
    done = with_command(raising(error))
    assert done.code == code
    assert done.stdout == ""
    assert done.stderr.startswith(start)
    assert done.stderr.count("\n") == 1


def test_an_error_of_several_lines_is_joined(with_command):
    assert with_command(raising(DataError("RW203", "one;\n  two."))).stderr.startswith("error RW203: one; two.")


def test_markup_in_an_error_is_text(with_command):
    assert "[red]x[/red] [" in with_command(raising(DataError("RW203", "[red]x[/red] ["))).stderr


def test_the_traceback_is_shown_on_request_only(with_command, monkeypatch):
    assert "Traceback" not in with_command(raising(RuntimeError("boom"))).stderr
    monkeypatch.setenv("RANKWISE_DEBUG", "1")
    shown = with_command(raising(RuntimeError("boom"))).stderr
    assert "Traceback" in shown
    assert "error RW900" in shown


def test_with_json_stdout_is_one_document_whatever_is_printed(with_command):
    def run(settings, output):
        print("a library talks")
        output.line("progress")
        warn("RW105", "careful.")
        return {"count": settings.count, "loss": float("nan")}

    done = with_command(run, "--json", "--count", 3)
    assert done.code == 0
    assert done.document == {"count": 3, "loss": None}
    assert "a library talks" in done.stderr
    assert "progress" in done.stderr
    assert "warning RW105: careful." in done.stderr


@pytest.mark.parametrize("arguments", [(), ("--count", "many"), ("--bogus",)])
def test_with_json_an_error_is_a_document_too(arguments, with_command):
    done = with_command(raising(DataError("RW203", "line 3.")), "--json", *arguments)
    assert done.code == 2
    assert set(done.document["error"]) == {"code", "kind", "message"}
    assert done.document["error"]["code"] in done.stderr


def test_a_warning_is_shown_once_and_others_are_silent(with_command):
    import logging
    import warnings

    def run(settings, output):
        for _ in range(3):
            warn("RW105", "careful.")
        warnings.warn("an old function", FutureWarning, stacklevel=1)
        logging.getLogger("transformers").warning("chatter")
        return {}

    done = with_command(run)
    assert done.stderr.startswith("warning RW105: careful.")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--conut", "2"), "--count"),
        (("stray",), "stray"),
        (("--count",), "--count"),
        (("--count", "0"), "--count is '0'"),
        (("--count", "many"), "--count is 'many'"),
    ],
)
def test_a_mistake_in_the_options_exits_2_and_says_which(arguments, said, with_command):
    done = with_command(raising(AssertionError("must not run")), *arguments)
    assert done.code == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_unknown_command_names_the_close_one(rankwise):
    done = rankwise("trian")
    assert done.code == 2
    assert "train" in done.stderr


def test_the_command_line_wins_over_the_file_and_the_file_over_the_default(with_command, tmp_path):
    file = tmp_path / "play.yaml"
    file.write_text("count: 5\nnames: [a, b]\n", encoding="utf-8")

    def run(settings, output):
        return settings.model_dump()

    assert with_command(run, "--json").document == {"count": 1, "names": []}
    assert with_command(run, "--json", "--config", file).document == {"count": 5, "names": ["a", "b"]}
    given = with_command(run, "--json", "--config", file, "--count", 7, "--names", "c, d").document
    assert given == {"count": 7, "names": ["c", "d"]}


def test_sigterm_ends_a_command_as_ctrl_c_does(with_command):
    def run(settings, output):
        os.kill(os.getpid(), signal.SIGTERM)
        raise AssertionError("must not go on")

    before = signal.getsignal(signal.SIGTERM)
    done = with_command(run)
    assert done.code == 130
    assert done.stderr.startswith("interrupted RW543: play was stopped by Ctrl-C or SIGTERM.")
    assert done.stderr.count("\n") == 1
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    "environment",
    [
        {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1"},
        {"WORLD_SIZE": " 8"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
    ],
)
@pytest.mark.parametrize("command", ["train", "merge"])
def test_several_processes_are_refused_before_writing(command, environment, rankwise, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    inputs = {"train": ("--model", "demo", "--data", "stdlib"), "merge": ("--adapter", tmp_path)}
    done = rankwise(command, *inputs[command], "--output", tmp_path / "out", "--json")
    assert done.code == 2
    # torchrun's processes may train, and these variables are a part of what it writes.
    incomplete = command == "train" and "WORLD_SIZE" in environment
    code, words = (
        ("RW136", "the environment") if incomplete else ("RW117", f"{command} was started in several processes (")
    )
    assert done.stderr.startswith(f"error {code}: {words}")
    assert done.document["error"]["code"] == code
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "environment",
    [{"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, {"SLURM_NTASKS": "4"}, {"WORLD_SIZE": ""}],
)
def test_one_process_is_not_refused(environment, rankwise, monkeypatch, tmp_path):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    done = rankwise("merge", "--adapter", tmp_path / "none", "--output", tmp_path / "out")
    assert "RW117" not in done.stderr


def test_a_reader_that_has_gone_is_no_error():
    command = f"{sys.executable} -m rankwise train --help | head -1"
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith("Usage: ")
    assert done.stderr == ""


@pytest.mark.parametrize("words", ["doctor", "inspect no-such-folder --json"])
def test_a_full_stdout_is_no_traceback(words):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    command = [sys.executable, "-m", "rankwise", *words.split()]
    environment = {**os.environ, "PYTHONPATH": str(SOURCE)}
    with open("/dev/full", "w", encoding="utf-8") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error RW")
    assert "Traceback" not in done.stderr


def test_ctrl_c_before_a_command_begins_is_no_traceback(rankwise, monkeypatch):
    monkeypatch.setattr(cli, "build_app", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    done = rankwise("doctor")
    assert done.code == 130
    assert done.stderr.startswith("interrupted RW543: ")

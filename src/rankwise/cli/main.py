"""``rankwise``: the commands, and the one place where every error becomes one line and an exit code.

0 done, 2 a mistake in the input, 1 a bug of rankwise, 130 interrupted. Nothing imports torch before a command runs.

``--help`` is narrow enough for 80 columns, examples with their line breaks kept.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import io
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from rankwise.cli import (
    compare,
    doctor,
    evaluate,
    export,
    generate,
    inspect,
    merge,
    plan,
    predict,
    preview,
    train,
)
from rankwise.cli.options import Command, function_of, panels_of
from rankwise.cli.output import (
    DEBUG_VARIABLE,
    Output,
    debugging,
    only_our_messages,
    print_document,
    print_message,
    shortened,
    stdout_for_the_document,
)
from rankwise.disk import coded_error, is_of_device
from rankwise.errors import (
    ConfigError,
    InternalError,
    Interrupted,
    ModelError,
    RankwiseError,
    is_out_of_memory,
    one_line,
    out_of_memory,
)
from rankwise.options import Settings
from rankwise.records import WAIT_POLICIES
from rankwise.training import ranks
from rankwise.training.observer import terminable

COMMANDS: tuple[Command, ...] = (
    preview.COMMAND,
    plan.COMMAND,
    train.COMMAND,
    compare.COMMAND,
    evaluate.COMMAND,
    generate.COMMAND,
    predict.COMMAND,
    merge.COMMAND,
    export.COMMAND,
    inspect.COMMAND,
    doctor.COMMAND,
)
SUMMARY = "Fine-tune a language model with low-rank adapters, wisely: LoRA, QLoRA, DoRA and QDoRA."
EXAMPLES = (
    "rankwise plan     --model demo --memory 16GB",
    "rankwise preview  --model demo --data rows.jsonl",
    "rankwise train    --model demo --data rows.jsonl --output runs/first",
    'rankwise generate --adapter runs/first --prompt "Hello" --compare',
    "rankwise merge    --adapter runs/first --output merged",
    "rankwise export   --adapter runs/first --for vllm --output served",
)
LIBRARIES = ("rankwise", "torch", "transformers", "datasets", "safetensors")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code. Every error is reported before the return."""
    arguments = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    as_json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A file name that is not UTF-8 is shown with escapes instead of raising.
            stream.reconfigure(errors="backslashreplace")
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        # A mapped file that was cut ends the process by a signal, which says nothing by itself.
        faulthandler.enable(sys.__stderr__)
    _share_the_cores()
    try:
        with only_our_messages():
            code = get_command(build_app()).main(args=arguments, prog_name="rankwise", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # ``rankwise ... | head``; the code is rich's.
        _give_up_stdout()
        return 1
    except BaseException as error:
        # The last handler: any error becomes one line.
        if not isinstance(error, Exception | KeyboardInterrupt) and not _is_of_tokenizers(error):
            raise
        return _report(_as_ours(error), error, as_json=as_json)


def _share_the_cores() -> None:
    """Let PyTorch's waiting threads sleep soon, unless the user has set how they wait.

    libgomp reads the variable when torch is loaded. By default a waiting thread spins 300,000 times, during which no
    other process can use its core. With 1,000, a LoRA step beside one busy process takes 3.61 s instead of 4.53 s;
    alone it takes 1.963 s instead of 1.970 s.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in WAIT_POLICIES):
        os.environ["GOMP_SPINCOUNT"] = "1000"


def build_app(commands: Sequence[Command] = COMMANDS) -> typer.Typer:
    app = typer.Typer(
        cls=typer_group(tuple(commands), SUMMARY, EXAMPLES),
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_root)
    for command in commands:
        function = function_of(command, functools.partial(_invoke, command))
        app.command(command.name, cls=typer_command(command), help=command.summary)(function)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        print("  ".join(f"{name} {_version(name)}" for name in LIBRARIES))
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Options before the command."""


def _version(name: str) -> str:
    from importlib import metadata

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "(not installed)"


def _invoke(command: Command, settings: Settings, as_json: bool) -> None:
    _refuse_several_processes(command)
    try:
        with terminable(), stdout_for_the_document(as_json=as_json):
            document = command.run(settings, Output(as_json=as_json))
    except KeyboardInterrupt:
        raise Interrupted("RW543", f"{command.name} was stopped by Ctrl-C or SIGTERM.") from None
    if as_json and document is not None:
        print_document(document)
    if document is not None and (code := command.exit_code(document)):
        raise typer.Exit(code)


def _refuse_several_processes(command: Command) -> None:
    """Raise ConfigError (RW117) in each process of a launcher that started several: they would all write the same."""
    if command is train.COMMAND and ranks.place() is not None:
        return
    names = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")
    found = {name: os.environ[name] for name in names if os.environ.get(name, "").strip().isdecimal()}
    several = [f"{name}={value}" for name, value in found.items() if int(value) > 1]
    if several and "output" in command.settings.model_fields:
        how = "use torchrun or --devices N" if command is train.COMMAND else "start it once, without a launcher"
        raise ConfigError(
            "RW117",
            f"{command.name} was started in several processes ({', '.join(several)}), and each would do all the work "
            f"and write the same files; {how}, or unset these variables if there is one process.",
        )
    # Raises here for a variable of torchrun that holds no number, before a library does.
    ranks.place()


def _report(error: RankwiseError, cause: BaseException, *, as_json: bool) -> int:
    if debugging():
        traceback.print_exception(cause, file=sys.stderr)
    if not ranks.is_first_to_tell():
        return error.exit_code
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    # The error may be that stdout or stderr cannot be written.
    with contextlib.suppress(OSError):
        print_message(kind, error.code, error.message)
    if as_json:
        told = {"code": error.code, "kind": type(error).__name__, "message": shortened(error.message)}
        try:
            print_document({"error": told | ({"of_device": True} if is_of_device(cause) else {})})
        except OSError:
            _give_up_stdout()
    return error.exit_code


def _is_of_tokenizers(error: BaseException) -> bool:
    """Whether the library tokenizers failed: it raises plain Exceptions, and Rust's panics, which are none."""
    frames = traceback.walk_tb(error.__traceback__)
    is_plain = type(error) is Exception or type(error).__name__ == "PanicException"
    return is_plain and any("tokeniz" in frame.f_code.co_filename for frame, _ in frames)


def _as_ours(error: BaseException) -> RankwiseError:
    """The error that the user reads. RankwiseErrors stay unchanged; usage, memory and file-system errors get a code and
    advice.
    """
    if isinstance(error, RankwiseError):
        return error
    if _is_interruption(error):
        # Outside of a command and of the parser, which gives only the exit code.
        return Interrupted("RW543", "the command was stopped by Ctrl-C or SIGTERM.")
    if hasattr(error, "format_message"):
        return ConfigError("RW120", _usage_sentence(error))
    if is_out_of_memory(error):
        return out_of_memory(error)
    if (coded := coded_error(error)) is not None:
        return coded
    if _is_of_tokenizers(error):
        return ModelError("RW317", f"the tokenizer fails on a text: {one_line(error)}; download its files again.")
    advice = f"please report it with what {DEBUG_VARIABLE}=1 prints"
    return InternalError("RW900", f"a fault of rankwise: {type(error).__name__}: {one_line(error)}; {advice}.")


def _is_interruption(error: BaseException | None) -> bool:
    """Whether the error is Ctrl-C, or what a library made of it while it was imported."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _usage_sentence(error: Any) -> str:
    """The parser's message, and the command that lists the options."""
    sentence = " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if getattr(error, "ctx", None) else "rankwise"
    joint = "" if sentence.endswith("?") else ";"
    return f"{sentence[0].lower()}{sentence[1:]}{joint} `{path} --help` lists what there is."


def _give_up_stdout() -> None:
    """Drop output that cannot be written any more, so that it does not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMON_OPTIONS = (
    ("--config FILE.yaml", "Options from a file whose keys are the long options; the command line wins."),
    ("--json", "One JSON document on stdout, everything else on stderr."),
    ("--help", "Show this text."),
)
# The text of wider labels starts on a line of its own.
WIDEST_LABEL = 29


def typer_command(command: Command) -> type[TyperCommand]:
    """A typer command class with this module's help."""

    class Helped(TyperCommand):
        def format_help(self, ctx: Any, formatter: object) -> None:
            print_command_help(command, ctx.command_path)

    return Helped


def typer_group(commands: tuple[Command, ...], summary: str, examples: tuple[str, ...]) -> type[TyperGroup]:
    """The class of ``rankwise`` itself."""

    class Helped(TyperGroup):
        def format_help(self, ctx: object, formatter: object) -> None:
            console = _console()
            _print_head(console, "rankwise COMMAND [options]", summary, examples)
            _print_rows(console, "Commands", [(command.name, command.summary) for command in commands], 11)
            rows = [("COMMAND --help", "Its options."), ("--version", "Versions of rankwise and what it uses.")]
            # typer's own; --show-completion prints the script instead.
            rows.append(("--install-completion", "Complete commands and options with Tab in this shell from now on."))
            _print_rows(console, "More", rows, 20)

    return Helped


def print_command_help(command: Command, command_path: str) -> None:
    console = _console()
    panels = panels_of(command)
    required = [option.label for options in panels.values() for option in options if "(required)" in option.help]
    usage = " ".join([command_path, *required, "[options]"])
    _print_head(console, usage, command.summary, command.examples)
    rows = {str(title): [(option.label, option.help) for option in options] for title, options in panels.items()}
    rows["Every command"] = list(COMMON_OPTIONS)
    labels = (label for group in rows.values() for label, _ in group)
    width = max(len(label) for label in labels if len(label) <= WIDEST_LABEL)
    for title, group in rows.items():
        _print_rows(console, title, group, width)


def _console() -> Console:
    return Console(highlight=False)


def _print_head(console: Console, usage: str, summary: str, examples: Iterable[str]) -> None:
    console.print(Text.assemble(("Usage: ", "bold"), usage))
    console.print(Text(f"\n{summary}\n"))
    for example in examples:
        console.print(Text(f"  {example}", style="green"), soft_wrap=True)


def _print_rows(console: Console, title: str, rows: list[tuple[str, str]], width: int) -> None:
    console.print(Text(f"\n{title}", style="bold"))
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(min_width=width, max_width=width, overflow="fold")
    table.add_column(ratio=1)
    for label, text in rows:
        _add_row(table, label, text)
    console.print(Padding(table, (0, 0, 0, 2)))


def _add_row(table: Table, label: str, text: str) -> None:
    """A label too wide for its column gets a line of its own."""
    name, _, metavar = label.partition(" ")
    shown = Text.assemble((name, "cyan"), f" {metavar}" if metavar else "")
    if len(label) > WIDEST_LABEL:
        shown = Text.assemble((name, "cyan"))
        text = f"{metavar}\n{text}"
    table.add_row(shown, Text(text))


if __name__ == "__main__":
    sys.exit(main())

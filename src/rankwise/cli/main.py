"""``rankwise``: the commands, and the one place where every error becomes one line and an exit code.

0 done, 2 a mistake in the input, 1 a bug of rankwise, 130 interrupted. Nothing imports torch before a command runs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import gc
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from rankwise.cli import doctor, export, generate, inspect, merge, predict, preview, shared, train
from rankwise.cli.options import Command, function_of, panels_of
from rankwise.compat.system import speak_utf8
from rankwise.disk import coded_error
from rankwise.errors import (
    ConfigError,
    InternalError,
    Interrupted,
    RankwiseError,
    is_out_of_memory,
    one_line,
    out_of_memory,
)
from rankwise.options import OPTIONS, Settings, close_names
from rankwise.records import versions_of
from rankwise.training import ranks
from rankwise.verbs.output import (
    DEBUG_VARIABLE,
    Output,
    debugging,
    only_our_messages,
    print_document,
    print_message,
    shortened,
)

COMMANDS: tuple[Command, ...] = (
    preview.COMMAND,
    shared.PLAN,
    train.COMMAND,
    shared.COMPARE,
    shared.EVALUATE,
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
    if argv is None:
        gc.freeze()  # A program's imports live until its end, and collections need not look at them.
    speak_utf8()
    if sys.__stderr__ is not None and not faulthandler.is_enabled():
        # A mapped file that was cut ends the process by a signal, which says nothing by itself.
        faulthandler.enable(sys.__stderr__)
    try:
        with only_our_messages():
            code = get_command(build_app()).main(args=arguments, prog_name="rankwise", standalone_mode=False)
        return code if isinstance(code, int) else 0
    except BrokenPipeError:
        # ``rankwise ... | head``; the code is rich's.
        _give_up_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001
        # The last handler: any error becomes one line.
        return _report(_as_ours(error), error, as_json=as_json)


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
        versions = versions_of(LIBRARIES)
        print("  ".join(f"{name} {versions[name]}" for name in LIBRARIES if name in versions))
        raise typer.Exit


def _root(
    version: Annotated[bool, typer.Option("--version", is_eager=True, callback=_show_version)] = False,
) -> None:
    """Options before the command."""


def _invoke(command: Command, settings: Settings, as_json: bool) -> None:
    _refuse_several_processes(command)
    try:
        # With --json, whatever a library prints to stdout goes to stderr.
        with ranks.terminable(), contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext():
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
    if not ranks.claim_the_report():
        return error.exit_code
    kind = "interrupted" if isinstance(error, Interrupted) else "error"
    # The error may be that stdout or stderr cannot be written.
    with contextlib.suppress(OSError):
        print_message(kind, error.code, error.message)
    if as_json:
        told = {"code": error.code, "kind": type(error).__name__, "message": shortened(error.message)}
        try:
            print_document({"error": told})
        except OSError:
            _give_up_stdout()
    return error.exit_code


def _as_ours(error: BaseException) -> RankwiseError:
    """The error that the user reads. RankwiseErrors stay unchanged; usage, memory and file-system errors get a code and
    advice.
    """
    if isinstance(error, RankwiseError):
        return error
    # Outside of a command; or what a library made of it while it was imported.
    if isinstance(error, KeyboardInterrupt) or isinstance(error.__cause__, KeyboardInterrupt):
        return Interrupted("RW543", "the command was stopped by Ctrl-C or SIGTERM.")
    if hasattr(error, "format_message"):
        return ConfigError("RW120", _usage_sentence(error))
    if is_out_of_memory(error):
        return out_of_memory(error)
    if (coded := coded_error(error)) is not None:
        return coded
    advice = f"please report it with what {DEBUG_VARIABLE}=1 prints"
    return InternalError("RW900", f"a fault of rankwise: {type(error).__name__}: {one_line(error)}; {advice}.")


def _usage_sentence(error: Any) -> str:
    """The parser's message, and the command that lists the options."""
    sentence = _no_such_option(error) or " ".join(error.format_message().split()).rstrip(".")
    path = error.ctx.command_path if getattr(error, "ctx", None) else "rankwise"
    joint = "" if sentence.endswith("?") else ";"
    return f"{sentence[0].lower()}{sentence[1:]}{joint} `{path} --help` lists what there is."


def _no_such_option(error: Any) -> str | None:
    """Advice for an unknown option. The parser's own compares letters only, and suggests --help for --lr."""
    given, context = getattr(error, "option_name", None), getattr(error, "ctx", None)
    if context is None or not hasattr(error, "possibilities") or not isinstance(given, str):
        return None
    known = {flag.lstrip("-") for option in context.command.params for flag in option.opts if flag.startswith("--")}
    close = close_names(given.lstrip("-").replace("_", "-"), known, OPTIONS, cutoff=0.6)
    return f"no such option: {given}" + (
        f", did you mean {' or '.join(f'--{name}' for name in close)}?" if close else ""
    )


def _give_up_stdout() -> None:
    """Drop output that cannot be written any more, so that it does not raise again at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


COMMON_OPTIONS = (
    ("--config FILE.yaml", "Options from a file whose keys are the long options; the command line wins."),
    ("--json", "One JSON document on stdout, everything else on stderr."),
    ("--help", "Show this text."),
)
MORE_OPTIONS = (
    ("COMMAND --help", "Its options."),
    ("--version", "Versions of rankwise and what it uses."),
    # typer's own; --show-completion prints the script instead.
    ("--install-completion", "Complete commands and options with Tab in this shell from now on."),
)


def typer_command(command: Command) -> type[TyperCommand]:
    """A typer command class whose help has the options under their headings."""

    class Helped(TyperCommand):
        def format_help(self, ctx: Any, formatter: Any) -> None:
            panels = panels_of(command)
            required = [item.label for items in panels.values() for item in items if "(required)" in item.help]
            arguments = " ".join([*required, "[options]"])
            _write_head(formatter, ctx.command_path, arguments, command.summary, command.examples)
            for title, options in panels.items():
                with formatter.section(str(title)):
                    formatter.write_dl([(option.label, option.help) for option in options])
            with formatter.section("Every command"):
                formatter.write_dl(COMMON_OPTIONS)

    return Helped


def typer_group(commands: tuple[Command, ...], summary: str, examples: tuple[str, ...]) -> type[TyperGroup]:
    """The class of ``rankwise`` itself."""

    class Helped(TyperGroup):
        def format_help(self, ctx: object, formatter: Any) -> None:
            _write_head(formatter, "rankwise", "COMMAND [options]", summary, examples)
            with formatter.section("Commands"):
                formatter.write_dl([(command.name, command.summary) for command in commands])
            with formatter.section("More"):
                formatter.write_dl(MORE_OPTIONS)

    return Helped


def _write_head(formatter: Any, program: str, arguments: str, summary: str, examples: Iterable[str]) -> None:
    formatter.write_usage(program, arguments)
    formatter.write("\n")
    formatter.write_text(summary)
    formatter.write("\n" + "".join(f"  {example}\n" for example in examples))

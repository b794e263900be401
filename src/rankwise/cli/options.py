"""Command-line options from a settings table: option, YAML key and default are defined once, in the table.

Every option is text here and is checked by pydantic, so the command line and the YAML file get the same messages.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from rankwise.foreign import Fields
from rankwise.options import Panel, Settings, spelled
from rankwise.verbs.output import Document, Output

METAVARS = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """A subcommand with its settings table and its function. Importing a command loads no heavy library."""

    name: str
    settings: type[Settings]
    # Returns the document of --json; None if another process prints it.
    run: Callable[[Any, Output], Document | None]
    summary: str
    examples: Sequence[str]
    # (given options) -> settings of lower priority that replace the defaults.
    earlier: Callable[[Fields], Fields] | None = None
    # (document) -> exit code, for documents that report a mistake that stopped nothing.
    exit_code: Callable[[Document], int] = lambda _: 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A field of a settings table in the form of the command line."""

    field: str
    panel: Panel
    flag: str
    metavar: str
    help: str
    kind: Literal["switch", "value", "repeated", "argument"]

    @property
    def label(self) -> str:
        if self.kind == "argument":
            return self.metavar
        return f"--[no-]{self.flag}" if self.kind == "switch" else f"--{self.flag} {self.metavar}"


def options_of(command: Command) -> list[Option]:
    """The options of a command, in the order of its settings table."""
    return [_option(name, field) for name, field in command.settings.model_fields.items()]


def panels_of(command: Command) -> dict[Panel, list[Option]]:
    """Heading -> options under it, in the order of the help."""
    panels = {panel: [option for option in options_of(command) if option.panel is panel] for panel in Panel}
    return {panel: options for panel, options in panels.items() if options}


def function_of(command: Command, invoke: Callable[[Settings, bool], None]) -> Callable[..., None]:
    """A function whose signature typer turns into the command's options. It calls ``invoke(settings, as_json)``."""
    options = {option.field: option for option in options_of(command)}

    def call(**given: Any) -> None:
        # Not above: --help needs no YAML.
        from rankwise.options import read_settings

        as_json, config = given.pop("json"), given.pop("config")
        # typer gives an empty list for a repeatable option that is not given.
        values = {
            options[name].flag.replace("-", "_"): tuple(value) or None if isinstance(value, list) else value
            for name, value in given.items()
        }
        invoke(read_settings(command.settings, Path(config) if config else None, values, command.earlier), as_json)

    parameters = [_parameter(option) for option in options.values()]
    call.__signature__ = inspect.Signature([*parameters, *_common_parameters()])  # type: ignore[attr-defined]
    call.__annotations__ = {}
    return call


def _option(name: str, field: FieldInfo) -> Option:
    extra = field.json_schema_extra
    assert isinstance(extra, dict), f"{name} is not declared with option()"
    types_ = _plain_types(field.annotation)
    kind: Literal["switch", "value", "repeated", "argument"] = "switch" if bool in types_ else "value"
    if extra["argument"] or extra["repeated"]:
        kind = "argument" if extra["argument"] else "repeated"
    # A Python keyword cannot be a field's name, so it is the field's alias: --for.
    flag = (field.alias or name).replace("_", "-")
    metavar = str(extra["metavar"] or ("TEXT" if kind == "repeated" else _metavar(types_)))
    return Option(
        field=name, panel=Panel(str(extra["panel"])), flag=flag, metavar=metavar, help=_help(field), kind=kind
    )


def _plain_types(annotation: Any) -> list[Any]:
    """``str | Sequence[str] | None`` -> [str, Sequence]; a Literal stays as it is."""
    if get_origin(annotation) is Annotated:
        return _plain_types(get_args(annotation)[0])
    if get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for part in get_args(annotation) for kind in _plain_types(part)]
    if get_origin(annotation) is Literal:
        return [annotation]
    kind = get_origin(annotation) or annotation
    return [] if kind is type(None) else [kind]


def _metavar(kinds: Sequence[Any]) -> str:
    if Sequence in kinds:
        return "NAME,..."
    if get_origin(kinds[0]) is Literal:
        return "|".join(str(choice) for choice in get_args(kinds[0]))
    return METAVARS.get(kinds[0], "TEXT")


def _help(field: FieldInfo) -> str:
    text = field.description or ""
    if field.is_required():
        return f"{text} (required)"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default is False or default in ({}, ()):
        return text
    return f"{text} (default: {'on' if default is True else spelled(default)})"


def _parameter(option: Option) -> inspect.Parameter:
    if option.kind == "argument":
        annotation: Any = Annotated[str, typer.Argument(metavar=option.metavar)]
        return inspect.Parameter(option.field, inspect.Parameter.KEYWORD_ONLY, annotation=annotation)
    name = f"--{option.flag}/--no-{option.flag}" if option.kind == "switch" else f"--{option.flag}"
    kind: Any = {"switch": bool, "repeated": list[str]}.get(option.kind, str)
    choices = option.metavar.split("|") if "|" in option.metavar else []

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    given = typer.Option(name, metavar=option.metavar, autocompletion=complete if choices else None)
    annotation = Annotated[kind | None, given]
    return inspect.Parameter(option.field, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _common_parameters() -> list[inspect.Parameter]:
    kind, kinds = inspect.Parameter.KEYWORD_ONLY, {"config": (str | None, None), "json": (bool, False)}
    return [
        inspect.Parameter(name, kind, default=default, annotation=Annotated[own, typer.Option(f"--{name}")])
        for name, (own, default) in kinds.items()
    ]

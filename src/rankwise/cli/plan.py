"""``rankwise plan``: what fits, how fast, which method, and the command to run."""

from __future__ import annotations

import functools
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.cli.options import Command
from rankwise.cli.output import Document, Output
from rankwise.config import TrainSettings
from rankwise.disk import hold
from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject
from rankwise.options import option_words
from rankwise.planning.workload import PlanSettings
from rankwise.records import write_text
from rankwise.reports.numbers import byte_size

# Imported where they are used, since imports at the top slow down every --help.
if TYPE_CHECKING:
    from rankwise.planning.advice import Recommendation
    from rankwise.planning.plan import Plan


def run(settings: PlanSettings, output: Output) -> Document:
    from rankwise.cli import plan_view
    from rankwise.planning.plan import make_plan

    document: JsonObject = {}
    # Checked first, since a plan may take minutes.
    _check_place(settings.svg, "--svg")
    _check_place(settings.save, "--save")
    plan = make_plan(settings, functools.partial(print, file=sys.stderr, flush=True))
    command = command_of(plan.recommendation, settings.save)
    # Written before anything is printed, so that a closed pipe (`| head`) or a failed check loses no file.
    written = _write(settings, plan)
    plan_view.show(plan, command, output)
    if settings.check:
        document["check"] = _check(settings, plan, output)
    _say_written(settings, written, output)
    return {**plan.to_json(), "command": command, **document, **written}


def command_of(recommendation: Recommendation, saved: Path | None) -> str | None:
    """The ``rankwise train`` command of the recommendation; None if nothing fits."""
    if recommendation.method is None:
        return None
    own = _own_options(recommendation)
    if saved is not None:
        return f"rankwise train --config {shlex.quote(str(saved))} {own}"
    words = [word for name, value in differing(recommendation.settings).items() for word in option_words(name, value)]
    return f"rankwise train {shlex.join(words)} {own}"


def _own_options(recommendation: Recommendation) -> str:
    """The options of ``rankwise train`` that only the user knows."""
    return f"--data D{' --reward R' if recommendation.settings.get('objective') == 'grpo' else ''} --output O"


def differing(settings: Fields) -> JsonObject:
    """The settings that differ from the defaults of ``rankwise train``; model and method always."""
    named = {name: settings[name] for name in ("model", "method")}
    usual = TrainSettings.defaults() | named
    return named | {name: value for name, value in settings.items() if value != usual[name]}


def _write(settings: PlanSettings, plan: Plan) -> dict[str, str]:
    """Write the requested files. Where nothing fits there is nothing to save."""
    written: dict[str, str] = {}
    if settings.svg is not None:
        from rankwise.cli import plan_view

        with hold(settings.svg):
            write_text(settings.svg, plan_view.svg(plan))
        written["svg"] = str(settings.svg)
    if settings.save is not None and plan.recommendation.method is not None:
        with hold(settings.save):
            write_text(settings.save, as_yaml(plan))
        written["saved"] = str(settings.save)
    return written


def _say_written(settings: PlanSettings, written: Mapping[str, str], output: Output) -> None:
    if "svg" in written:
        output.line(f"{'drawn':<12}{written['svg']}")
    if "saved" in written:
        output.line(f"{'saved':<12}{written['saved']}")
    elif settings.save is not None:
        output.line(f"{'not saved':<12}nothing fits, so there is nothing to save in {settings.save}", "yellow")


def _check_place(path: Path | None, option: str) -> None:
    if path is None:
        return
    # A link, such as /dev/stdout, would itself be replaced.
    is_other = path.is_dir() or path.is_symlink()
    if is_other or not path.parent.is_dir():
        what = "is a folder or a link" if is_other else f"lies in {path.parent}, which does not exist"
        raise ConfigError("RW105", f"{option} {path} {what}; give the name of a file in a folder that exists.")


def as_yaml(plan: Plan) -> str:
    """The recommendation as a file for ``rankwise train --config``."""
    import yaml

    settings = {
        name.replace("_", "-"): list(value) if isinstance(value, tuple) else value
        for name, value in plan.recommendation.settings.items()
        if value is not None
    }
    peak = byte_size(plan.recommendation.estimate.peak_bytes)
    tight = "; it fits only without its error margin" if plan.recommendation.is_tight else ""
    head = (
        f"# Planned for {plan.hardware.name}: predicted peak {peak}{tight}.\n"
        f"# rankwise train --config THIS-FILE {_own_options(plan.recommendation)}\n"
    )
    return head + yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)


def _check(settings: PlanSettings, plan: Plan, output: Output) -> JsonObject:
    """Run three real steps on this machine, with the only requested method, else with the recommended one."""
    from rankwise.cli import plan_view
    from rankwise.planning.hardware import shared, this_machine
    from rankwise.planning.real_steps import check_method
    from rankwise.planning.workload import workload_for

    method = settings.methods[0] if len(settings.methods) == 1 else plan.changes_of
    hardware = plan.hardware if plan.hardware.kind == "machine" else shared(this_machine(), settings.devices)
    assert settings.model is not None
    with output.waiting(f"running three steps of {method}"):
        result = check_method(
            settings.model,
            method,
            workload_for(settings, hardware),
            hardware.memory_bytes,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )
    plan_view.print_lines(plan_view.check_lines(result), output)
    return result.to_json()


COMMAND = Command(
    name="plan",
    settings=PlanSettings,
    run=run,
    summary="Say what fits the memory, how long training takes and which method to take. Reads no weights.",
    examples=(
        'rankwise plan --model meta-llama/Llama-3.1-8B --gpu "RTX 4090"',
        "rankwise plan --model demo --memory 24GB --max-length 2048 --save plan.yaml",
    ),
)

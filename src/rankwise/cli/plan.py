"""``rankwise plan``: what fits, how fast, which method, and the command to run."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.cli.options import Command
from rankwise.config import TrainSettings
from rankwise.disk import hold
from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject
from rankwise.options import option_words
from rankwise.planning.workload import TRACING, PlanSettings
from rankwise.records import write_text
from rankwise.reports.numbers import byte_size
from rankwise.verbs.output import Document, Output

# Imported where they are used, since imports at the top slow down every --help.
if TYPE_CHECKING:
    from rankwise.planning.advice import Recommendation
    from rankwise.planning.plan import Plan


def run(settings: PlanSettings, output: Output) -> Document:
    from rankwise.planning.plan import make_plan
    from rankwise.verbs import plan_view

    # Checked first, since a plan may take minutes.
    place = settings.save
    # A link, such as /dev/stdout, would itself be replaced.
    if place is not None and (place.is_dir() or place.is_symlink() or not place.parent.is_dir()):
        raise ConfigError("RW105", f"--save {place} is a link, or no file in a folder that exists; give one.")
    with _progress(output) as say:
        plan = make_plan(settings, say)
    document = {**plan.to_json(), "command": command_of(plan.recommendation, settings.save)}
    # Written before anything is printed, so that a closed pipe (`| head`) or a failed check loses no file.
    if settings.save is not None and plan.recommendation.method is not None:
        with hold(settings.save):
            write_text(settings.save, as_yaml(plan))
        document["saved"] = str(settings.save)
    plan_view.show(plan, document["command"], output, why=settings.why)
    if settings.check:
        document["check"] = _check(settings, plan, output)
    if settings.save is not None:
        output.line(f"{'saved':<12}{document.get('saved', 'nothing, since nothing fits')}")
    return document


@contextmanager
def _progress(output: Output) -> Iterator[Callable[[str], None]]:
    """Shows what is traced: on a terminal in one line that changes, elsewhere only the first that takes long."""
    if output.is_terminal:
        with output.console.status("planning") as status:
            yield status.update
        return
    told: list[str] = []

    def say(line: str) -> None:
        if not told or not line.startswith(TRACING):
            print(line, file=sys.stderr, flush=True)
        told.append(line)

    yield say


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
    from rankwise.planning.hardware import shared, this_machine
    from rankwise.planning.real_steps import check_method
    from rankwise.planning.workload import workload_for
    from rankwise.verbs import plan_view

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

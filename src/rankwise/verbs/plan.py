"""``rw.plan``, and what ``rankwise plan`` does: what fits, how fast, which method, and the command to run."""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.config import TrainSettings
from rankwise.disk import hold
from rankwise.errors import ConfigError
from rankwise.foreign import Fields, JsonObject
from rankwise.options import option_words
from rankwise.planning.workload import PlanSettings
from rankwise.records import write_text
from rankwise.reports.numbers import byte_size
from rankwise.verbs.output import Output, Shown
from rankwise.verbs.settings import settings_of, takes

# Imported where they are used, since imports at the top slow down every --help.
if TYPE_CHECKING:
    from rankwise.planning.advice import Recommendation
    from rankwise.planning.plan import Plan
    from rankwise.planning.real_steps import Check

Waiting = Callable[[str], contextlib.AbstractContextManager[object]]


@takes(PlanSettings)
def plan(**options: Any) -> Planned:
    """Say what fits the memory and how long training takes, as `rankwise plan` does. The keywords are its options."""
    settings = settings_of(PlanSettings, options)
    return carry_out(settings, lambda line: None, lambda text: contextlib.nullcontext())


@dataclasses.dataclass(frozen=True, repr=False)
class Planned(Shown):
    """A plan, with everything in it in ``document``."""

    plan: Plan
    document: JsonObject
    options: PlanSettings
    check: Check | None

    @property
    def rows(self) -> list[JsonObject]:
        """A dict for each method: its peak in bytes, verdict, largest batch, tokens per second, ..."""
        return [{"method": row.estimate.method, **row.to_json()} for row in self.plan.rows]

    @property
    def settings(self) -> JsonObject:
        """The recommended keywords of ``rw.train``, without data and output."""
        return differing(self.plan.recommendation.settings) if self.plan.recommendation.method else {}

    def show(self, output: Output) -> None:
        from rankwise.verbs import plan_view

        plan_view.show(self.plan, self.document["command"], output, why=self.options.why)
        if self.check is not None:
            plan_view.print_lines(plan_view.check_lines(self.check), output)
        if self.options.save is not None:
            output.line(f"{'saved':<12}{self.document.get('saved', 'nothing, since nothing fits')}")


def carry_out(settings: PlanSettings, say: Callable[[str], None], waiting: Waiting) -> Planned:
    """Plan, save and check. ``say`` tells what is traced, ``waiting`` is a context for what takes long."""
    from rankwise.planning.plan import make_plan

    # Checked first, since a plan may take minutes.
    place = settings.save
    # A link, such as /dev/stdout, would itself be replaced.
    if place is not None and (place.is_dir() or place.is_symlink() or not place.parent.is_dir()):
        raise ConfigError("RW105", f"--save {place} is a link, or no file in a folder that exists; give one.")
    plan = make_plan(settings, say)
    document: JsonObject = {**plan.to_json(), "command": command_of(plan.recommendation, settings.save)}
    # Written before anything is printed, so that a closed pipe (`| head`) or a failed check loses no file.
    if settings.save is not None and plan.recommendation.method is not None:
        with hold(settings.save):
            write_text(settings.save, as_yaml(plan))
        document["saved"] = str(settings.save)
    check = _check(settings, plan, waiting) if settings.check else None
    return Planned(plan, document if check is None else {**document, "check": check.to_json()}, settings, check)


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
    data = "" if "data" in recommendation.settings else "--data D "
    return f"{data}{'--reward R ' if recommendation.settings.get('objective') == 'grpo' else ''}--output O"


def differing(settings: Fields) -> JsonObject:
    """The settings that differ from the defaults of ``rankwise train``; model and method always."""
    named = {name: settings[name] for name in ("model", "method")}
    usual: JsonObject = {"data": None} | TrainSettings.defaults() | named
    return named | {name: value for name, value in settings.items() if value != usual[name]}


def as_yaml(plan: Plan) -> str:
    """The recommendation as a file for ``rankwise train --config``."""
    import yaml

    settings = {
        name.replace("_", "-"): _plain(value)
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


def _plain(value: object) -> object:
    """The value as YAML's safe dumper takes it."""
    return list(value) if isinstance(value, tuple) else str(value) if isinstance(value, Path) else value


def _check(settings: PlanSettings, plan: Plan, waiting: Waiting) -> Check:
    """Run three real steps on this machine, with the only requested method, else with the recommended one."""
    from rankwise.planning.hardware import shared, this_machine
    from rankwise.planning.real_steps import check_method
    from rankwise.planning.workload import workload_for

    method = settings.methods[0] if len(settings.methods) == 1 else plan.changes_of
    hardware = plan.hardware if plan.hardware.kind == "machine" else shared(this_machine(), settings.devices)
    assert settings.model is not None
    with waiting(f"running three steps of {method}"):
        return check_method(
            settings.model,
            method,
            workload_for(settings, hardware),
            hardware.memory_bytes,
            trust_remote_code=settings.trust_remote_code,
            revision=settings.revision,
        )

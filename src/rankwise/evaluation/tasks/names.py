"""Names of all tasks: rankwise's from a list, those of other distributions from their entry points, and those of
lm-evaluation-harness from its files. Imports none of them, nor torch.

Tasks of other distributions: an entry point of the group ``rankwise.tasks`` names a task and gives its TaskType.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import re
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from rankwise.errors import ConfigError

GROUP = "rankwise.tasks"
# Tasks of the distribution `rankwise-article`, for the message if it is not installed.
ARTICLE = ("e2e", "gsm8k", "vicuna")
INSTALL_ARTICLE = "pip install ./article"
COMMONSENSE = ("boolq", "piqa", "siqa", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "openbookqa")
OWN = ("perplexity", *COMMONSENSE, *ARTICLE)
INSTALL = "pip install lm-eval"
# The names of tasks, groups and tags in a YAML file of the harness.
NAMED = re.compile(r"""^(?:task|group|tag):[ \t]*["']?([\w.:-]+)""", re.MULTILINE)


def harness_folder() -> Path:
    """The folder of the installed lm-evaluation-harness, which is not imported. Raises ConfigError (RW153)."""
    found = installed_harness()
    if found is None:
        raise ConfigError("RW153", f"this task needs lm-evaluation-harness, which is not installed; run `{INSTALL}`.")
    return found


def installed_harness() -> Path | None:
    spec = importlib.util.find_spec("lm_eval")
    return next((Path(place) for place in (spec.submodule_search_locations or ())), None) if spec else None


def check_tasks(names: Iterable[str]) -> None:
    """Raise ConfigError (RW154) for a name that is not in ``OWN``, not installed, and in no file of
    lm-evaluation-harness.

    RW153 if the harness or a task's distribution is not installed. This is much faster than the harness's own list
    of tasks. A name that occurs in a file may still not be a task; the harness reports that.
    """
    for name in names:
        if name in entries():
            continue
        if name in ARTICLE:
            raise ConfigError(
                "RW153",
                f"--task {name} is part of rankwise-article, which is not installed; run `{INSTALL_ARTICLE}` in "
                "a copy of rankwise's repository.",
            )
        if name not in OWN:
            _check_foreign(name)


def _check_foreign(name: str) -> None:
    folder = installed_harness()
    if folder is None:
        if close_tasks(name, ()):
            raise unknown_task(name, ())
        harness_folder()
        return
    known: set[str] = set()
    for file in (folder / "tasks").rglob("*.yaml"):
        text = file.read_text(encoding="utf-8", errors="replace")
        if name in text:
            return
        known.update(NAMED.findall(text))
    raise unknown_task(name, known)


@functools.cache
def retained_from(source: str | None) -> tuple[str | None, str | None]:
    """(task, data) of ``--retain``: a task of lm-evaluation-harness, as TASK=D with its data; else only data."""
    name, _, data = (source or "").partition("=")
    if source is None or Path(source).expanduser().exists() or not re.fullmatch(r"[\w.:-]+", name):
        return None, source
    if name not in COMMONSENSE:
        folder = installed_harness()
        files = () if folder is None else (folder / "tasks").rglob("*.yaml")
        texts = (file.read_text(encoding="utf-8", errors="replace") for file in files)
        if not any(name in NAMED.findall(text) for text in texts if name in text):
            return None, source
    return name, data or None


def close_tasks(name: str, known: Iterable[str]) -> list[str]:
    """At most three names like ``name``: the closest of ours and of those installed, then of ``known``."""
    ours = difflib.get_close_matches(name, dict.fromkeys((*OWN, *entries())), n=1)
    return list(dict.fromkeys([*ours, *difflib.get_close_matches(name, sorted(known), n=3)]))[:3]


def unknown_task(name: str, known: Iterable[str]) -> ConfigError:
    """The error RW154, which suggests similar names."""
    close = close_tasks(name, known)
    hint = f"; did you mean {' or '.join(close)}?" if close else "."
    return ConfigError(
        "RW154", f"there is no task {name!r}; give one of {', '.join(OWN)}, or any of lm-evaluation-harness{hint}"
    )


@functools.cache
def entries() -> Mapping[str, EntryPoint]:
    """The installed entry points by the name of their task. Nothing is imported."""
    return {entry.name: entry for entry in entry_points(group=GROUP)}

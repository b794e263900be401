"""Rewards of ``--objective grpo``: functions that score answers, from a Python file or built in, checked at every call.

A reward function has trl's signature: keyword arguments ``prompts``, ``completions``, ``completion_ids`` and each
column of the data, all lists of one length. It returns a number or None (no score) for each completion.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import importlib.util
import inspect
import itertools
import math
import re
import reprlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.data.prompts import ANSWERS
from rankwise.data.rows import Message
from rankwise.errors import ConfigError, DataError, RankwiseError, RunError, first_line
from rankwise.final_number import extract_answer
from rankwise.weights_file import sha256_of

# A reward function, which trl calls with keyword arguments.
Function = Callable[..., Any]
# What trl calls it with: columns by name.
Given = Mapping[str, Any]
# A prompt or an answer.
Said = str | Sequence[Message]
BUILT_IN = "answer, format=REGEX, length=N"
FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[^:]+)")
# The arguments that trl passes in addition to the columns of the data.
TRLS = {"prompts", "completion_ids", "trainer_state", "log_extra", "log_metric"}
# Largest number of characters of a prompt or an answer in a message.
SHOWN = 80


@dataclasses.dataclass(frozen=True)
class Reward:
    """One ``--reward``. ``sha256`` is the hash of its file, which must be the same when a run resumes."""

    spec: str
    name: str
    function: Function
    sha256: str | None = None

    @property
    def __name__(self) -> str:
        """The name under which trl logs the reward."""
        return self.name

    def __call__(self, *, prompts: Sequence[Said], completions: Sequence[Said], **columns: Any) -> list[float | None]:
        """A number or None for each completion.

        Raises RunError: RW772 where the function raises, RW773 where it does not return one value for each completion,
        RW774 for a value that is not a finite number.
        """
        given = {"prompts": prompts, "completions": completions, **columns}
        count = len(completions)
        try:
            found = self._called(given)
            # The result may be an endless generator.
            values = list(itertools.islice(found, count + 1)) if isinstance(found, Iterable) else None
        except RankwiseError:
            raise
        except (Exception, SystemExit) as error:
            raise self._raised(given, error) from error
        if values is None:
            raise self._wrong_count(f"a {type(found).__name__}", count)
        if len(values) != count:
            raise self._wrong_count("a longer list" if len(values) > count else f"a list of {len(values)}", count)
        return [self._number(value, given, place) for place, value in enumerate(values)]

    def _called(self, given: Given) -> Any:
        """The function's result. Unlike in trl, a function without ``**kwargs`` gets only the arguments it names."""
        taken = inspect.signature(self.function).parameters.values()
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken):
            given = {name: given[name] for name in (parameter.name for parameter in taken) if name in given}
        found = self.function(**given)
        return asyncio.run(found) if inspect.iscoroutine(found) else found

    def _raised(self, given: Given, error: BaseException) -> RunError:
        """RunError RW772, with the first sample for which the function raises alone, else for the whole batch."""
        count, where = len(given["completions"]), "a batch of answers"
        for place in range(count):
            one = {name: _at(value, place, count) for name, value in given.items()}
            try:
                self._called(one)
            except (Exception, SystemExit) as alone:  # noqa: BLE001  user code may raise anything
                error, where = alone, _sample(given, place)
                break
        reason = f"{type(error).__name__}: {first_line(error)}"
        return RunError(
            "RW772", f"the reward {self.spec} raised {reason}, on {where}; let it return a number for every answer."
        )

    def _wrong_count(self, found: str, count: int) -> RunError:
        return RunError(
            "RW773",
            f"the reward {self.spec} returned {found} for {count} answers; let it return a list with one number for "
            "each of `completions`.",
        )

    def _number(self, value: Any, given: Given, place: int) -> float | None:
        if value is None:
            return None
        try:
            # float would read text, too.
            number = math.nan if isinstance(value, str | bytes) else float(value)
        except Exception:  # noqa: BLE001  a tensor raises RuntimeError, an integer OverflowError
            number = math.nan
        if not math.isfinite(number):
            raise RunError(
                "RW774",
                f"the reward {self.spec} returned {reprlib.repr(value)}, which is not a finite number, for "
                f"{_sample(given, place)}; let it return a number, or None for no score.",
            )
        return number


def read_rewards(specs: Sequence[str]) -> list[Reward]:
    """The rewards that ``--reward`` names. Runs the code of the named files.

    Raises ConfigError: RW770 for a value that is neither a function in a file nor built in, RW771 for a file or a
    function that is missing, does not load, or cannot be called.
    """
    rewards = [_read(spec) for spec in specs]
    names = [reward.name for reward in rewards]
    # Names must be unique, since each is one figure in the metrics.
    return [
        dataclasses.replace(reward, name=f"{reward.name}_{place}") if names.count(reward.name) > 1 else reward
        for place, reward in enumerate(rewards, 1)
    ]


def _read(spec: str) -> Reward:
    if file := FILE.fullmatch(spec):
        return _from_file(spec, Path(file["path"]).expanduser(), file["name"])
    kind, _, value = spec.partition("=")
    if spec == "answer":
        return Reward(spec, "answer", answer)
    if kind == "format" and value:
        return Reward(spec, "format", functools.partial(format_, pattern=_pattern(spec, value)))
    if kind == "length" and re.fullmatch(r"0*[1-9]\d{0,8}", value):
        return Reward(spec, "length", functools.partial(length, tokens=int(value)))
    raise ConfigError(
        "RW770", f"--reward {spec} is neither FILE.py:NAME, a function in a Python file, nor built in: {BUILT_IN}."
    )


def _pattern(spec: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError("RW770", f"--reward {spec} holds no valid regular expression ({error}).") from None


def _from_file(spec: str, path: Path, name: str) -> Reward:
    if not path.is_file():
        raise ConfigError("RW771", f"--reward {spec}: there is no file {path}; check the path.")
    module_spec = importlib.util.spec_from_file_location(f"rankwise_reward_{path.stem}", path)
    assert module_spec is not None, "its name ends with .py"
    assert module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    # dataclasses and pickle look a module up in sys.modules.
    sys.modules[module_spec.name] = module
    try:
        module_spec.loader.exec_module(module)
        function = getattr(module, name, None)
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ConfigError("RW771", f"--reward {spec}: {path} does not load ({reason}); correct it.") from error
    if not callable(function):
        there = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        what = f"has no {name}" if function is None else f"holds {name}, which is not a function"
        raise ConfigError("RW771", f"--reward {spec}: {path} {what}; its functions are {', '.join(there) or 'none'}.")
    return Reward(spec, name, function, sha256_of(path))


def answer(completions: Sequence[Said], **columns: Any) -> list[float]:
    """1 where the final number of an answer, by GSM8K's rules, equals that of the row's own answer; else 0.

    Raises DataError (RW781) where the data have no column with the right answer, or one holds no number.
    """
    column = next((name for name in ANSWERS if name in columns), None)
    if column is None:
        there = ", ".join(sorted(set(columns) - TRLS)) or "none besides the prompts"
        raise DataError(
            "RW781",
            f"--reward answer compares with a column {' or '.join(ANSWERS)}, and the data have {there}; rename the "
            "one with the right answer.",
        )
    wanted = [extract_answer(str(reference)) for reference in columns[column]]
    for reference, number in zip(columns[column], wanted):
        if number is None:
            raise DataError("RW781", f"--reward answer found no number in `{column}`: {str(reference)[:SHOWN]!r}.")
    return [float(extract_answer(text_of(one)) == number) for one, number in zip(completions, wanted)]


def format_(completions: Sequence[Said], *, pattern: re.Pattern[str]) -> list[float]:
    """1 where ``pattern`` is found in an answer, else 0."""
    return [float(pattern.search(text_of(one)) is not None) for one in completions]


def length(completion_ids: Sequence[Sequence[int]], *, tokens: int) -> list[float]:
    """min(1, max(0, 2 - length / N)): 1 for answers of at most N tokens, falling linearly to 0 at 2 N tokens."""
    return [min(1.0, max(0.0, 2 - len(ids) / tokens)) for ids in completion_ids]


def text_of(completion: Said) -> str:
    """A completion's text. trl passes a list of messages where the prompt is one."""
    return completion if isinstance(completion, str) else "".join(str(part["content"]) for part in completion)


def _at(value: object, place: int, count: int) -> object:
    """Item ``place`` of a column; a value that is not a column, such as the trainer's state, is returned as it is."""
    return value[place : place + 1] if isinstance(value, list | tuple) and len(value) == count else value


def _sample(given: Given, place: int) -> str:
    prompt, completion = (given[name][place] for name in ("prompts", "completions"))
    asked = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return f"the answer {_short(text_of(completion))} to the prompt {_short(asked)}"


def _short(text: str) -> str:
    return repr(text if len(text) <= SHOWN else f"{text[:SHOWN]}...")

"""Templates that would take all time or memory: one coded message each, and nothing of it in this process."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tiny_tokenizers import CHATML, byte_tokenizer

from rankwise.data import Rows, bounded, chat_text, encode_rows, rows_from_records
from rankwise.data import templates as templates_module
from rankwise.errors import DataError

ROW = {"messages": [{"role": "user", "content": "10"}, {"role": "assistant", "content": "yes"}]}
REFUSED = {
    "{{ 1 / 0 }}": "division by zero",
    "{{ 1 % (messages | length - messages | length) }}": "modulo by zero",
    "{% for i in range(10**9) %}{% endfor %}": "Range too big",
    "{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}": "maximum recursion depth",
    "{% block a %}{{ self.a() }}{% endblock %}": "maximum recursion depth",
    "{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}": "maximum recursion depth",
    "{{ messages[9].content }}": "has no element 9",
    "{{ nothing.at.all }}": "'nothing' is undefined",
    "{% include 'other' %}": "no loader",
    "{{ '\\ud800' }}": "surrogates not allowed",
    "{{ raise_exception('x' * 10**7) }}": "xxx",
}
OUT_OF_BOUNDS = {
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "seconds of processor time",
    "{{ 2 ** (2 ** 40) }}": "seconds of processor time",
    "{{ 'x' * 10**10 }}": "1 GiB of memory",
    "{{ '%10000000000s' % 'x' }}": "1 GiB of memory",
    "{{ 'x' | center(10**10) }}": "1 GiB of memory",
    "{{ 'x'.ljust(10**10) }}": "1 GiB of memory",
    "{{ 'x\ny' | indent(10**10) }}": "1 GiB of memory",
    "{% set n = namespace(s='x') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}{% endfor %}": "1 GiB of memory",
    "{{ 'x' * (5 * 10**6) }}": "makes 5,000,0",
}


def rows(count: int = 3) -> Rows:
    return rows_from_records([(n, ROW) for n in range(1, count + 1)], "rows.jsonl")


def refusal(template: str) -> DataError:
    with pytest.raises(DataError) as caught:
        encode_rows(rows(), byte_tokenizer(chat_template=CHATML + template), max_length=64)
    assert len(caught.value.message) < 1000
    return caught.value


@pytest.mark.parametrize("template", REFUSED)
def test_what_a_template_raises_is_a_refusal_of_the_row(template: str) -> None:
    error = refusal(template)
    assert error.code == "RW211"
    assert error.message.startswith("rows.jsonl, line 1, line 2, line 3: the chat template refuses it: ")
    assert REFUSED[template] in error.message


@pytest.mark.parametrize("template", OUT_OF_BOUNDS)
def test_time_and_memory_are_bounded(template: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Touching a gibibyte takes its time, too.
    monkeypatch.setattr(bounded, "SECONDS", 1 if "seconds" in OUT_OF_BOUNDS[template] else 20)
    before = resource.getrusage(resource.RUSAGE_SELF)
    error = refusal(template)
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert error.code == "RW225"
    assert OUT_OF_BOUNDS[template] in error.message
    # In KiB and seconds: all of it was another process's.
    assert after.ru_maxrss - before.ru_maxrss < 50_000
    assert after.ru_utime - before.ru_utime < 1


@pytest.mark.parametrize(("letters", "most"), [(0, 50), (1, 50), (2, 60), (9, 200)])
def test_a_text_may_be_long_or_of_a_long_row(letters: int, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twenty characters for each of the row; tools that are not there count as one."""
    monkeypatch.setattr(templates_module, "MOST_CHARACTERS", 50)
    messages = [{"": "x" * letters}]
    assert templates_module._sane("y" * most, messages, None) == "y" * most
    with pytest.raises(DataError, match="RW225"):
        templates_module._sane("y" * (most + 1), messages, None)


def test_the_row_at_which_it_stopped_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = CHATML + "{% if messages[0].content == 'loop' %}" + loop + "{% endif %}"
    records = [(n, {"prompt": "loop" if n == 3 else "a", "completion": "b"}) for n in range(1, 5)]
    with pytest.raises(DataError, match=r"RW225: rows\.jsonl, line 3: the chat template takes more than 1 seconds"):
        encode_rows(rows_from_records(records, "rows.jsonl"), byte_tokenizer(chat_template=template), max_length=64)


def test_a_template_that_cannot_be_parsed_is_told_once() -> None:
    assert refusal("{% if %}").message.startswith("the chat template, line 4: Expected an expression")


def test_a_prompt_is_bounded_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    tokenizer = byte_tokenizer()
    asked = [{"role": "user", "content": "a"}]
    text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert chat_text(tokenizer, asked) == text
    with pytest.raises(DataError, match="RW211: the prompt: the chat template refuses it: division by zero"):
        chat_text(tokenizer, asked, chat_template="{{ 1 / 0 }}")
    with pytest.raises(DataError, match="RW225: the prompt: the chat template takes more than 1 GiB"):
        chat_text(tokenizer, asked, chat_template="{{ 'x' * 10**10 }}")


def test_all_rows_take_one_process_and_two_renderings_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the row, one for what stands in front of its answer, as before there were bounds; and a few more."""
    forks, calls = [], []
    fork, render = bounded._fork, templates_module.ChatRenderer._render
    monkeypatch.setattr(bounded, "_fork", lambda: forks.append(1) or fork())

    def counted(self: object, *arguments: object, **options: object) -> str:
        calls.append(1)
        return render(self, *arguments, **options)

    monkeypatch.setattr(templates_module.ChatRenderer, "_render", counted)
    encode_rows(rows(5000), byte_tokenizer(), max_length=64)
    assert len(forks) == 1
    # The child's count is lost with it; without a fork the work is done here.
    assert not calls
    monkeypatch.delattr("os.fork")
    encode_rows(rows(5000), byte_tokenizer(), max_length=64)
    assert 2 * 5000 <= len(calls) <= 2 * 5000 + 5


def test_a_child_that_is_not_needed_any_more_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    # Other tests of this process may have left children of theirs.
    children, fork = [], bounded._fork
    monkeypatch.setattr(bounded, "_fork", lambda: children.append(fork()) or children[-1])
    items = bounded.bounded(lambda: iter(range(10**9)), str)
    assert next(items) == 0
    items.close()
    [child] = children
    with pytest.raises(ChildProcessError):
        os.waitpid(child, os.WNOHANG)


def test_a_fault_in_the_child_is_told_with_its_traceback() -> None:
    def fault() -> list[int]:
        raise KeyError("ours")

    with pytest.raises(RuntimeError, match="KeyError: 'ours'"):
        list(bounded.bounded(fault, str))  # type: ignore[arg-type]


def test_processor_time_counts_and_waiting_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded, "SECONDS", 1)
    items = bounded.bounded(lambda: iter(["x" * 100_000] * 4), str)
    next(items)
    # The child waits: its pipe is full.
    time.sleep(1.5)
    assert len(list(items)) == 3


def test_a_very_long_conversation_is_named_as_a_cause(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is rendered up to each answer, which takes a good template long, too."""
    monkeypatch.setattr(bounded, "SECONDS", 0.2)

    def forever() -> Iterator[int]:
        while True:
            pass
        yield 0

    with pytest.raises(DataError, match=r"RW225: row 0: .*, or split a conversation of very many messages\."):
        list(bounded.bounded(forever, lambda number: f"row {number}"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_the_middle_of_the_fork_is_heard(number: signal.Signals) -> None:
    """Python throws away what handlers raise in the hooks of a fork, and most of the time is spent there."""
    program = f"""
import os, signal
from rankwise.data.bounded import bounded

def stop(*_):
    raise KeyboardInterrupt

signal.signal({int(number)}, stop)
parent = os.getpid()
os.register_at_fork(after_in_parent=lambda: os.kill(parent, {int(number)}))
try:
    list(bounded(lambda: iter([1]), str))
except KeyboardInterrupt:
    print("heard")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("heard\n", "")

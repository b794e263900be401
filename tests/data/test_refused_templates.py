"""Errors that a chat template raises are refusals of the row, by a code."""

from __future__ import annotations

import pytest
from tiny_tokenizers import CHATML, byte_tokenizer

from rankwise.data import chat_text, encode_rows, rows_from_records
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


def refusal(template: str) -> DataError:
    rows = rows_from_records([(n, ROW) for n in range(1, 4)], "rows.jsonl")
    with pytest.raises(DataError) as caught:
        encode_rows(rows, byte_tokenizer(chat_template=CHATML + template), max_length=64)
    assert len(caught.value.message) < 1000
    return caught.value


@pytest.mark.parametrize("template", REFUSED)
def test_what_a_template_raises_is_a_refusal_of_the_row(template: str) -> None:
    error = refusal(template)
    assert error.code == "RW211"
    assert error.message.startswith("rows.jsonl, line 1, line 2, line 3: the chat template refuses it: ")
    assert REFUSED[template] in error.message


def test_a_template_that_cannot_be_parsed_is_told_once() -> None:
    assert refusal("{% if %}").message.startswith("the chat template, line 4: Expected an expression")


def test_a_refused_prompt_is_named() -> None:
    asked = [{"role": "user", "content": "a"}]
    with pytest.raises(DataError, match="RW211: the prompt: the chat template refuses it: division by zero"):
        chat_text(byte_tokenizer(), asked, chat_template="{{ 1 / 0 }}")

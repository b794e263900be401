"""Arguments of tool calls reach the template in the form that it writes as JSON."""

from __future__ import annotations

import json

import pytest

from rankwise.data.templates import suit_arguments
from rankwise.errors import DataError

OBJECT = {"city": "Pär's"}
TEXT = json.dumps(OBJECT, ensure_ascii=False)


def quoting(arguments: object) -> str:
    return json.dumps(arguments, ensure_ascii=False)


def for_objects(arguments: object) -> str:
    if not isinstance(arguments, dict):
        raise DataError("RW211", "can only get item pairs from a mapping.")
    return " ".join(f"{key}={value}" for key, value in arguments.items())


def for_texts(arguments: object) -> str:
    if not isinstance(arguments, str):
        raise DataError("RW211", "can only concatenate str.")
    return arguments


@pytest.mark.parametrize("given", [OBJECT, TEXT])
@pytest.mark.parametrize(
    ("template", "wanted"),
    [(quoting, OBJECT), (for_objects, OBJECT), (for_texts, TEXT), (str, TEXT)],
)
@pytest.mark.parametrize("nested", [True, False])
def test_arguments_take_the_form_of_the_template(given, template, wanted, nested):
    def call(arguments):
        inner = {"name": "weather", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": inner} if nested else inner]}

    def render(messages):
        [made] = messages[0]["tool_calls"]
        return template((made["function"] if nested else made)["arguments"])

    assert suit_arguments([call(given)], render) == [call(wanted)]


@pytest.mark.parametrize("arguments", ["", "no JSON", "[1]", None, 3])
def test_what_is_no_object_stays(arguments):
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"name": "f", "arguments": arguments}]}]
    assert suit_arguments(messages, str) == messages


def test_a_call_without_an_object_that_names_its_function_stays():
    messages = [{"role": "assistant", "content": "", "tool_calls": [{"function": "f"}]}]
    assert suit_arguments(messages, str) == messages

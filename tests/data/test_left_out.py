"""What a chat template does not write of a row is found, whatever the row holds."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import trl
from tiny_tokenizers import CHATML, MARKED, byte_tokenizer, sentencepiece_tokenizer

from rankwise.data import Encoded, encode_rows, rows_from_records
from rankwise.errors import DataError, RankwiseWarning

TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
ASKED = {"role": "user", "content": "rain?"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [CALL]}
RESULT = {"role": "tool", "name": "weather", "content": "4"}
SAID = {"role": "assistant", "content": "It is 4."}
# As those of Qwen and Llama do, in short.
WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}"
    "<call>{{ call.function.name }} {{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("{{ message.content }}", "<t>{{ message.reasoning_content }}</t>{{ message.content }}")
# Writes thoughts of the last answer only, as those of Qwen 3 and DeepSeek R1 do.
LAST_THOUGHT = CHATML.replace(
    "{{ message.content }}",
    "{% if loop.last and message.reasoning_content %}<t>{{ message.reasoning_content }}</t>{% endif %}"
    "{{ message.content.split('</t>')[-1] }}",
)


def encoded(template: str, *turns: dict[str, Any], **more: Any) -> Encoded:
    rows = rows_from_records([(1, {"messages": list(turns), **more})], "rows.jsonl")
    return encode_rows(rows, byte_tokenizer(chat_template=template), max_length=2048)


def refusal(template: str, *turns: dict[str, Any], **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        encoded(template, *turns, **more)
    return str(caught.value)


def without(template: str, role: str) -> str:
    """Writes nothing of the turns of ``role``, its own header included."""
    return template.replace(
        "{% for message in messages %}", f"{{% for message in messages if message.role != '{role}' %}}"
    )


def test_tools_and_calls_that_a_template_uses_are_rendered() -> None:
    for tools in ([TOOL], json.dumps([TOOL])):
        found = encoded(WITH_TOOLS, ASKED, CALLED, RESULT, SAID, tools=tools)
        text = byte_tokenizer().decode(found.dataset[0]["input_ids"])
        assert json.dumps(TOOL) in text
        assert '<call>weather {"city": "Oslo"}<|im_end|>' in text
        trained = byte_tokenizer().decode([label for label in found.dataset[0]["labels"] if label != -100])
        assert trained == '<call>weather {"city": "Oslo"}<|im_end|>It is 4.<|im_end|>'


@pytest.mark.parametrize(
    ("template", "turns", "tools", "lost"),
    [
        (CHATML, (ASKED, CALLED, RESULT, SAID), [TOOL], "leaves out `tools`, `tool_calls` of message 2. Give"),
        (
            without(CHATML, "tool"),
            (ASKED, SAID, {**RESULT, "content": "four"}, SAID),
            None,
            "`content` of message 3. Give",
        ),
        (
            CHATML.replace("message.content", "message.content[:5]"),
            (ASKED, SAID),
            None,
            "leaves out the `content` of message 2",
        ),
        (
            CHATML,
            (ASKED, {**SAID, "reasoning_content": "4, so 4"}),
            None,
            "leaves out the `reasoning_content` of message 2",
        ),
        (
            LAST_THOUGHT,
            (ASKED, {**SAID, "content": "<t>so</t>It is 4."}),
            None,
            "leaves out the `content` of message 2",
        ),
        (MARKED, (ASKED, CALLED, RESULT, SAID), [TOOL], "leaves out `tools`, `tool_calls` of message 2. Give"),
    ],
)
def test_what_is_left_out_is_named(template: str, turns: Any, tools: Any, lost: str) -> None:
    message = refusal(template, *turns, tools=tools)
    assert message.startswith("RW221: rows.jsonl, line 1: the chat template ")
    assert lost in message


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3_training", "llama3_1", "gptoss_training", "lfm2_2_5", "glm4moe"])
def test_templates_of_known_models_write_tools_and_calls(name: str, recwarn: pytest.WarningsRecorder) -> None:
    template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    called = {**CALLED, "tool_calls": [{**CALL, "id": "abcdef123"}]}
    tool = {"type": "function", "function": {**TOOL["function"], "description": 'says "rain"'}}
    messages = [ASKED, called, {**RESULT, "content": '4 "x"\n'}, SAID]
    rows = rows_from_records([(1, {"messages": messages, "tools": [tool]})], "rows.jsonl")
    tokenizer = byte_tokenizer(chat_template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": re.findall(r"<\|\w+\|>", template)})
    assert encode_rows(rows, tokenizer, max_length=2048).report.rows == 1
    said = [str(item.message) for item in recwarn if item.category is RankwiseWarning]
    assert said == []


@pytest.mark.parametrize("between", ["", "\n"])
def test_a_template_may_mark_the_stop_token_by_itself(between: str) -> None:
    marked = "{% endgeneration %}" + between + "{% generation %}<|im_end|>{% endgeneration %}"
    template = MARKED.replace(
        "{% endgeneration %}{% else %}{{ message.content }}{% endif %}<|im_end|>",
        f"{marked}{{% else %}}{{{{ message.content }}}}<|im_end|>{{% endif %}}",
    )
    found = encoded(template, ASKED, SAID, ASKED, SAID)
    text = byte_tokenizer().decode(found.dataset[0]["input_ids"])
    assert text.count("It is 4.") == 2
    assert text.count("<|im_end|>") == 4
    trained = byte_tokenizer().decode([label for label in found.dataset[0]["labels"] if label != -100])
    assert trained.replace("\n", "") == "It is 4.<|im_end|>It is 4.<|im_end|>"


def test_text_in_parts_is_one_text() -> None:
    parts = [{"type": "text", "text": "It is"}, {"type": "text", "text": " 4."}]
    assert encoded(CHATML, ASKED, {**SAID, "content": parts}).dataset[0] == encoded(CHATML, ASKED, SAID).dataset[0]


def test_tools_beside_a_prompt_go_to_the_template_too() -> None:
    rows = rows_from_records([(1, {"prompt": "rain?", "completion": "4", "tools": json.dumps([TOOL])})], "rows.jsonl")
    tokenizer = byte_tokenizer(chat_template=WITH_TOOLS)
    [example] = encode_rows(rows, tokenizer, max_length=2048).dataset
    assert json.dumps(TOOL) in tokenizer.decode(example["input_ids"])
    with pytest.raises(DataError, match=r"RW221: .* leaves out `tools`\. "):
        encode_rows(rows, byte_tokenizer(), max_length=2048)


def test_calls_in_sharegpt_turns_are_calls() -> None:
    turns = [{"from": "human", "value": "rain?"}, {"from": "gpt", "value": "Let me see.", "tool_calls": [CALL]}]
    rows = rows_from_records([(1, {"conversations": turns})], "rows.jsonl")
    with pytest.raises(DataError, match=r"RW221: .* leaves out `tool_calls` of message 2\. "):
        encode_rows(rows, byte_tokenizer(), max_length=256)


def test_a_drop_that_depends_on_the_words_is_found() -> None:
    template = CHATML.replace("{{ message.content }}", "{{ '' if 'secret' in message.content else message.content }}")
    turns = [({"role": "user", "content": text}, SAID) for text in ("open", "secret", "open")]
    rows = rows_from_records([(n, {"messages": list(pair)}) for n, pair in enumerate(turns, 1)], "rows.jsonl")
    with pytest.raises(DataError, match=r"RW221: rows\.jsonl, line 2: .* `content` of message 1\. "):
        encode_rows(rows, byte_tokenizer(chat_template=template), max_length=256)


@pytest.mark.parametrize("tokenizer", [byte_tokenizer, sentencepiece_tokenizer])
@pytest.mark.parametrize(
    "template", [CHATML, MARKED, THINKING, CHATML.replace("message.content", "message.content|trim")]
)
def test_nothing_is_said_where_all_is_written(template: str, tokenizer: Any, recwarn: pytest.WarningsRecorder) -> None:
    turns = ({"role": "system", "content": ""}, {"role": "user", "content": " a\n"}, {**SAID, "name": "bot", "id": "7"})
    rows = rows_from_records([(1, {"messages": list(turns)})], "rows.jsonl")
    assert encode_rows(rows, tokenizer(chat_template=template), max_length=512).report.rows == 1
    assert not [item for item in recwarn if item.category is RankwiseWarning]

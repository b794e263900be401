"""What ``rankwise generate`` answers: prompts and conversations."""

from __future__ import annotations

import json
import shutil

import pytest

from rankwise.data import chat_text
from rankwise.models import load_tokenizer
from rankwise.verbs.settings import GenerateSettings
from rankwise.verbs.speaker import Conversation, load_speaker

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "weather", "arguments": {}}}]}
TOOL_TEMPLATE = (
    "{{ tools | tojson if tools else '' }}{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}"
    "{{ m.tool_calls | tojson if m.tool_calls else '' }}</s>{% endfor %}"
)


@pytest.fixture
def seen(monkeypatch):
    """The texts that the model is to continue."""
    texts = []

    def note(*arguments, **more):
        texts.append(chat_text(*arguments, **more))
        return texts[-1]

    monkeypatch.setattr("rankwise.data.chat_text", note)
    return texts


@pytest.fixture
def generate(rankwise, model_folder):
    return lambda *arguments: rankwise("generate", "--model", model_folder, "--max-new-tokens", 1, *arguments)


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


def test_prompts_are_answered_in_order(generate):
    done = generate("--prompt", "zero", "--prompt", " two ", "--json")
    assert done.code == 0, done.stderr
    assert [answer["prompt"] for answer in done.document["answers"]] == ["zero", " two "]
    assert all(isinstance(answer["base"], str) for answer in done.document["answers"])


def test_a_system_message_stands_before_each_prompt(generate, seen):
    done = generate("--system", "Be brief.", "--prompt", "a", "--prompt", "b", "--json")
    assert seen == [f"<s>system: Be brief.</s><s>user: {prompt}</s><s>assistant: " for prompt in "ab"]
    assert done.document["answers"][0]["messages"] == chat(("system", "Be brief."), ("user", "a"))


@pytest.mark.parametrize("form", ["list", "object", "lines"])
def test_a_conversation_is_continued(form, generate, seen, tmp_path):
    one = chat(("user", "Hi"), ("assistant", "Hello"), ("user", "Who?"))
    text = "<s>user: Hi</s><s>assistant: Hello</s><s>user: Who?</s><s>assistant: "
    name, content, count = {
        "list": ("a.json", one, 1),
        "object": ("a.json", {"messages": one}, 1),
        "lines": ("a.jsonl", f"{json.dumps(one)}\n\n{json.dumps({'messages': one})}\n", 2),
    }[form]
    done = generate("--messages", write(tmp_path / name, content), "--json")
    assert done.code == 0, done.stderr
    assert seen == [text] * count
    assert done.document["answers"][0]["prompt"] == "Who?"
    assert done.document["answers"][0]["messages"] == one


def test_held_out_rows_are_asked_without_their_answer(generate, seen, tmp_path):
    rows = [chat(("user", "Hi"), ("assistant", "Hello")), [*chat(("user", "Rain?")), CALL]]
    file = write(tmp_path / "held-out.jsonl", "".join(json.dumps({"messages": row}) + "\n" for row in rows))
    done = generate("--messages", file, "--json")
    assert seen == [f"<s>user: {prompt}</s><s>assistant: " for prompt in ("Hi", "Rain?")]
    assert [one["expected"] for one in done.document["answers"]] == ["Hello", json.dumps(CALL["tool_calls"])]
    assert "Hi\n  data:  Hello\n" in generate("--messages", file).stdout


def test_tools_and_calls_go_to_the_template(generate, seen, tmp_path):
    messages = [*chat(("user", "Rain?")), CALL, *chat(("tool", "sunny"))]
    file = write(tmp_path / "a.json", {"messages": messages, "tools": TOOLS})
    template = write(tmp_path / "tools.jinja", TOOL_TEMPLATE)
    assert generate("--messages", file, "--chat-template", template).code == 0
    assert seen[0].startswith(json.dumps(TOOLS))
    assert json.dumps(CALL["tool_calls"]) in seen[0]
    done = generate("--messages", file)
    assert done.code == 2
    assert f"error RW221: {file}: the chat template leaves out `tools`" in done.stderr


@pytest.mark.parametrize(
    ("template", "code"),
    [
        ("{% for m in messages if m.role != 'system' %}{{ m.content }}{% endfor %}", "RW221"),
        ("{{ raise_exception('no system') if messages[0].role == 'system' }}{{ messages[0].content }}", "RW211"),
    ],
)
def test_a_template_without_system_messages_is_refused(template, code, generate, tmp_path):
    file = write(tmp_path / "t.jinja", template)
    assert generate("--prompt", "a", "--chat-template", file).code == 0
    done = generate("--prompt", "a", "--system", "Be brief.", "--chat-template", file)
    assert (done.code, f"error {code}: the prompt: " in done.stderr) == (2, True)


def test_a_base_model_has_no_place_for_a_conversation(rankwise, model_folder, tmp_path):
    file = write(tmp_path / "a.json", chat(("user", "Hi")))
    plain = tmp_path / "plain"
    shutil.copytree(model_folder, plain)
    (plain / "chat_template.jinja").unlink()
    for more in (("--system", "x", "--prompt", "y"), ("--messages", file)):
        done = rankwise("generate", "--model", plain, *more)
        assert (done.code, f"error RW121: only a chat template can write {more[0]}, and" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("content", "code", "said"),
    [
        ("[", "RW203", "invalid JSON"),
        ("[" * 100_000, "RW203", "nested too deeply"),
        ("", "RW203", "invalid JSON"),
        ("3", "RW203", "expected a list of messages or an object with `messages`, found '3'"),
        ("{}", "RW203", "expected a list of messages in `messages`"),
        (chat(("user", "a"), ("assistant", "b")), "RW203", "to answer at the end, found `assistant`"),
        (chat(("boss", "a")), "RW203", "'boss'"),
        (chat(("user", None)), "RW203", "`content` of message 1"),
        ([{"role": "user", "content": "a"}, 3], "RW203", "as message 2"),
        ({"messages": chat(("user", "a")), "tools": 3}, "RW203", "`tools`"),
        (chat(("system", "own"), ("user", "a")), "RW121", "system message of its own"),
    ],
)
def test_what_is_no_conversation_is_named(content, code, said, generate, tmp_path):
    file = write(tmp_path / "a.json", content)
    done = generate("--messages", file, *(("--system", "x") if code == "RW121" else ()))
    assert done.code == 2
    assert done.stderr.startswith(f"error {code}: {file}")
    assert said in done.stderr


def test_a_bad_line_is_named(generate, tmp_path):
    file = write(tmp_path / "a.jsonl", "\n".join([json.dumps(chat(("user", "a"))), "", "{"]))
    assert generate("--messages", file).stderr.startswith(f"error RW203: {file}, line 3: invalid JSON")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ((), "RW121"),
        (("--system", "x"), "RW121"),
        (("--messages", "{tmp}"), "RW201"),
        (("--messages", "{tmp}/latin.json"), "RW205"),
        (("--system", "", "--prompt", "x"), "RW103"),
    ],
)
def test_what_cannot_be_answered_has_a_code(arguments, code, generate, tmp_path):
    (tmp_path / "latin.json").write_bytes("né".encode("latin-1"))
    done = generate(*(argument.format(tmp=tmp_path) for argument in arguments))
    assert done.code == 2
    assert done.stderr.startswith(f"error {code}: ")


def test_the_tokens_are_those_of_the_template_alone(model_folder):
    """Text and ids of transformers' own rendering."""
    tokenizer = load_tokenizer(str(model_folder))
    messages = chat(("user", "Hi"))
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert tokenizer(chat_text(tokenizer, messages), add_special_tokens=False)["input_ids"] == ids


def test_an_answer_ends_where_the_template_ends_a_turn(model_folder, monkeypatch, tmp_path):
    """That is often another token than the tokenizer's end of a text."""
    template = write(tmp_path / "t.jinja", "{% for m in messages %}{{ m['content'] }}<pad>{% endfor %}")
    settings = GenerateSettings(model=str(model_folder), chat_template=template, device="cpu")
    speaker, _ = load_speaker(settings, str(model_folder), None)
    given = {}
    monkeypatch.setattr(speaker.model, "generate", lambda **more: given.update(more) or more["input_ids"])
    speaker.say(Conversation(tuple(chat(("user", "Hi")))))
    assert given["eos_token_id"] == [0, 2]


def test_the_models_own_generation_settings_change_no_answer(model_folder, rankwise, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(model_folder, folder)
    own = json.loads((folder / "generation_config.json").read_text())
    write(folder / "generation_config.json", own | {"top_k": 1, "repetition_penalty": 3.0, "no_repeat_ngram_size": 1})
    for temperature in (0, 2):
        rest = ("--prompt", "x", "--temperature", temperature, "--max-new-tokens", 12, "--json")
        found = [rankwise("generate", "--model", name, *rest).document["answers"] for name in (model_folder, folder)]
        assert found[0] == found[1]

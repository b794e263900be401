"""``rankwise schema``: a file that ``--config`` takes validates, and one that it refuses does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rankwise.cli import main as cli
from rankwise.cli.options import options_of
from rankwise.cli.schema import file_schema
from rankwise.errors import ConfigError
from rankwise.settings_file import read_settings, read_settings_file

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VERBS = {verb.name: verb for verb in cli.VERBS}
NEEDED = {"model": "demo", "data": "rows.jsonl", "output": "runs/first"}


@pytest.fixture(scope="module")
def is_valid():
    validator = pytest.importorskip("jsonschema", reason="the package jsonschema is not installed").Draft202012Validator

    def check(verb: str, content: object) -> bool:
        schema = file_schema(VERBS[verb])
        validator.check_schema(schema)
        return validator(schema).is_valid(content)

    return check


@pytest.mark.parametrize("verb", cli.VERBS, ids=lambda verb: verb.name)
def test_a_schema_has_the_keys_of_its_verb_in_both_spellings(verb):
    schema = file_schema(verb)
    keys = {option.flag for option in options_of(verb)}
    assert set(schema["properties"]) == keys | {key.replace("-", "_") for key in keys}
    assert schema["additionalProperties"] is False
    for key in keys:
        assert not {"panel", "metavar", "argument", "repeated"} & set(schema["properties"][key])


def test_the_schema_is_printed_alone_with_json_and_without(rankwise):
    plain, asked = rankwise("schema"), rankwise("schema", "train", "--json")
    assert plain.document == asked.document == file_schema(VERBS["train"])
    assert plain.document["properties"]["batch-size"]["maximum"] == 2**16
    assert "pydantic" not in plain.stdout


def test_an_unknown_verb_names_close_ones(rankwise):
    done = rankwise("schema", "trian")
    assert done.code == 2
    assert "RW793: 'trian' is not a verb of rankwise; the closest are train" in done.stderr


GOOD = """
method: dora
learning-rate: 2e-4
lora_dropout: 0.05
target-modules: q_proj,v_proj
rank-pattern: {q_proj: 4}
alpha-pattern: q_proj=8
layers-to-transform: 0,1
enable-lora: {c_attn: [true, false, true]}
packing: true
max-steps: 20
chat-template:
"""
WRONG = [
    "max-step: 20",
    "max-steps: 0",
    "max-steps: many",
    "learning-rate: fast",
    "method: lara",
    "packing: 7",
    "lora-dropout: 1.5",
    "target-modules: {q_proj: 1}",
    "rank-pattern: [1, 2]",
    "devices: [0, 1]",
]


@pytest.mark.parametrize("line", WRONG)
def test_what_config_refuses_the_schema_refuses(line, is_valid):
    content = yaml.safe_load(line)
    with pytest.raises(ConfigError):
        read_settings(VERBS["train"].settings, None, {**NEEDED, **{k.replace("-", "_"): v for k, v in content.items()}})
    assert not is_valid("train", {**NEEDED, **content})


def test_what_config_takes_the_schema_takes(is_valid, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(GOOD)
    settings = read_settings(VERBS["train"].settings, file, NEEDED)
    assert settings.learning_rate == 2e-4
    assert is_valid("train", yaml.safe_load(GOOD))
    assert is_valid("train", settings.model_dump(mode="json"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_validate(path, is_valid):
    content = read_settings_file(path)
    assert is_valid("train", content)
    assert not is_valid("train", {**content, "no_such_key": 1})

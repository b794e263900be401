"""The options of ``train``: the command line and the YAML file say the same in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from rankwise.config import TrainSettings
from rankwise.data.objectives import formats_of
from rankwise.errors import ConfigError
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.options import option_words, read_settings, spelled
from rankwise.training.learning import LEARNING

NEEDED = {"model": "m", "data": "d", "output": "o"}
SPELLINGS: dict[str, tuple[str, list[Any], Any]] = {
    "target names": ("target_modules", ["q_proj, v_proj", ["q_proj", "v_proj"]], ("q_proj", "v_proj")),
    "one target": ("target_modules", ["q_proj", ["q_proj"]], ("q_proj",)),
    "no target": ("target_modules", ["", []], ()),
    "stacked experts": (
        "target_parameters",
        ["experts.gate_up_proj,experts.down_proj", ["experts.gate_up_proj", "experts.down_proj"]],
        ("experts.gate_up_proj", "experts.down_proj"),
    ),
    "target expression": ("target_modules", [r".*\.(q|v)_proj"], r".*\.(q|v)_proj"),
    "all targets": ("target_modules", ["all-linear"], "all-linear"),
    "whole modules": ("modules_to_save", ["lm_head", ["lm_head"]], ("lm_head",)),
    "whole modules with dots": ("modules_to_save", ["model.norm,lm_head"], ("model.norm", "lm_head")),
    "layers": ("layers_to_transform", ["0,3", [0, 3]], (0, 3)),
    "one layer": ("layers_to_transform", ["3", 3, [3]], (3,)),
    "ranks": ("rank_pattern", ["q_proj=4, v_proj=8", {"q_proj": 4, "v_proj": 8}], {"q_proj": 4, "v_proj": 8}),
    "expression with an equals sign": ("rank_pattern", ["a(?=b)c=4"], {"a(?=b)c": 4}),
    "alphas": ("alpha_pattern", ["q_proj=0.5", {"q_proj": 0.5}], {"q_proj": 0.5}),
    "parts": (
        "enable_lora",
        ["c_attn=1:0:1", {"c_attn": [True, False, True]}, {"c_attn": "1:0:1"}],
        {"c_attn": (True, False, True)},
    ),
    "nothing": ("rank_pattern", ["", {}], {}),
}


@pytest.mark.parametrize("case", SPELLINGS)
def test_a_file_takes_what_the_command_line_takes(case: str, tmp_path: Path) -> None:
    name, spellings, expected = SPELLINGS[case]
    for spelling in spellings:
        file = tmp_path / "run.yaml"
        file.write_text(yaml.safe_dump({name.replace("_", "-"): spelling}), encoding="utf-8")
        assert getattr(read_settings(TrainSettings, file, NEEDED), name) == expected
        assert getattr(read_settings(TrainSettings, None, {**NEEDED, name: spelling}), name) == expected
    again = read_settings(TrainSettings, None, {**NEEDED, name: spelled(expected)})
    assert getattr(again, name) == expected


def test_a_number_is_spelled_as_it_is():
    assert [spelled(value) for value in (0.0002, 1e-9, 3, 0.1234567891)] == ["0.0002", "1e-09", "3", "0.1234567891"]
    assert option_words("fast", False) == ["--no-fast"]
    assert option_words("target_modules", ["q", "v"]) == ["--target-modules", "q,v"]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("rank_pattern", "q_proj", "--rank-pattern is 'q_proj': write NAME=VALUE"),
        ("rank_pattern", "q_proj=", "NAME=VALUE"),
        ("rank_pattern", "q_proj=four", "--rank-pattern is 'four': input should be a valid integer"),
        ("alpha_pattern", "q_proj=x", "--alpha-pattern is 'x'"),
        ("enable_lora", "c_attn=1:2", "--enable-lora is '2'"),
        ("layers_to_transform", "0,a", "--layers-to-transform is 'a'"),
        ("layers_to_transform", "0,-1", "--layers-to-transform is '-1': input should be greater than or equal to 0."),
        ("modules_to_save", 3.5, "--modules-to-save is 3.5"),
        ("bias", "some", "--bias is 'some'"),
        ("quant_type", "int4", "--quant-type is 'int4'"),
        ("learning_rate", -1, "--learning-rate is -1: give a number above 0"),
    ],
)
def test_a_wrong_value_is_named(name: str, value: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_settings(TrainSettings, None, {**NEEDED, name: value})
    assert caught.value.code == "RW103"
    assert said in caught.value.message
    assert caught.value.message.count(" is ") == 1


def test_each_objective_has_a_row_with_options_and_formats_that_exist() -> None:
    assert {*OBJECTIVES} == {*get_args(ObjectiveName)} == {*LEARNING}
    for name, facts in OBJECTIVES.items():
        assert {*facts.options} <= {*TrainSettings.model_fields}
        assert (formats_of(name) is None) == facts.of_demonstrations
        assert ("loss_type" in facts.options) == bool(facts.losses)

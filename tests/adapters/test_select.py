"""Names that an adapter's settings select: short ways give what PEFT's rules give, and many names cost little."""

from __future__ import annotations

import itertools
import random
import re
import time

import pytest

from rankwise.adapters.select import Names, matches, matches_pattern, warn_of_idle
from rankwise.errors import ConfigError
from rankwise.lora_config import LoraConfig

PARTS = ("q_proj", "q", "proj", "layers", "0", "10", "o-proj", "layersx0")


def names() -> list[str]:
    found = [".".join(parts) for count in (1, 2, 3) for parts in itertools.product(PARTS, repeat=count)]
    return random.Random(0).sample(found, 150)


def test_a_key_of_letters_and_dots_matches_as_the_expression_does():
    keys = [*names(), "pr.j", "layers.0", ".", "..", "q_proj.", ".q_proj", "-proj"]
    for key, name in itertools.product(keys, names()):
        assert matches_pattern(key, name) == (re.match(rf"(.*\.)?({key})$", name) is not None), (key, name)


def test_a_long_list_selects_what_its_names_select_one_by_one():
    wanted = names()[:60]
    for name in names():
        assert matches(name, wanted) == any(re.fullmatch(rf"(.*\.)?{re.escape(key)}", name) for key in wanted), name


def test_thousands_of_names_take_no_second():
    many = [f"layer_{number}_proj" for number in range(20_000)]
    settings = {"modules_to_save": many, "exclude_modules": many, "rank_pattern": dict.fromkeys(many, 4)}
    there = Names(modules=names(), adaptable=names(), parameters=(), stacks=())
    began = time.process_time()
    config = LoraConfig(target_modules=["q_proj", *many], **settings)
    with pytest.warns(UserWarning, match=r"'layer_9_proj' and 19,990 more") as caught:
        warn_of_idle(config, there, ["q_proj"], targets=True)
    assert all(len(str(warning.message)) < 3000 for warning in caught)
    assert not any(matches(name, many) for name in 10 * names())
    assert time.process_time() - began < 4


def test_a_closing_bracket_too_many_is_no_regular_expression():
    with pytest.raises(ConfigError, match="not a regular expression"):
        LoraConfig(rank_pattern={"a)": 2})

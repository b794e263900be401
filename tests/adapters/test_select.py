"""Names that an adapter's settings select, by PEFT's rules."""

from __future__ import annotations

import itertools
import random
import re

import pytest

from rankwise.adapters.select import matches
from rankwise.errors import ConfigError
from rankwise.lora_config import LoraConfig

PARTS = ("q_proj", "q", "proj", "layers", "0", "10", "o-proj", "layersx0")


def names() -> list[str]:
    found = [".".join(parts) for count in (1, 2, 3) for parts in itertools.product(PARTS, repeat=count)]
    return random.Random(0).sample(found, 150)


def test_a_long_list_selects_what_its_names_select_one_by_one():
    wanted = names()[:60]
    for name in names():
        assert matches(name, wanted) == any(re.fullmatch(rf"(.*\.)?{re.escape(key)}", name) for key in wanted), name


def test_a_closing_bracket_too_many_is_no_regular_expression():
    with pytest.raises(ConfigError, match="not a regular expression"):
        LoraConfig(rank_pattern={"a)": 2})

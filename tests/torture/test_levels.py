"""Operators at every instruction-set level this processor has, and a run that goes on at another level."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from levels import DTYPES, LEVELS, LOSS_SHARE, Runs, bound, errors_of, errors_of_adapted_layers, given_to, operators

pytestmark = pytest.mark.skipif(not LEVELS, reason="no native library")


def test_every_operator_has_a_case() -> None:
    assert set(given_to(torch.float32)) == set(operators())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*operators(), "adapted layers"])
def test_an_operator_keeps_its_bound_at_every_level(name: str, dtype: torch.dtype) -> None:
    found = errors_of_adapted_layers(dtype) if name == "adapted layers" else errors_of(name, dtype)
    assert set(found) == {"reference", *LEVELS}
    assert {level: found[level] for level in LEVELS if found[level] > bound(name, found["reference"], dtype)} == {}


@pytest.mark.slow
def test_a_run_goes_on_at_another_level(tmp_path: Path) -> None:
    runs = Runs(tmp_path)
    runs.prepare_base()
    for pair in ((LEVELS[-1], LEVELS[0]), (LEVELS[0], LEVELS[-1])):
        assert runs.differences("qdora", "bfloat16", pair) < LOSS_SHARE

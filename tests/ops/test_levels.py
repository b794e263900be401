"""Operators at every instruction-set level that this processor has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from levels import DTYPES, LEVELS, bound, errors_of, errors_of_adapted_layers, given_to, operators, results

from rankwise.ops import table

pytestmark = pytest.mark.skipif(not LEVELS, reason="no native library")


def test_every_operator_has_a_case() -> None:
    assert set(given_to(torch.float32)) == set(operators())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*operators(), "adapted layers"])
def test_an_operator_keeps_its_bound_at_every_level(name: str, dtype: torch.dtype) -> None:
    found = errors_of_adapted_layers(dtype) if name == "adapted layers" else errors_of(name, dtype)
    assert set(found) == {"reference", *LEVELS}
    assert {level: found[level] for level in LEVELS if found[level] > bound(name, found["reference"], dtype)} == {}


@pytest.mark.parametrize("name", operators())
def test_a_reference_makes_its_tensors_where_its_arguments_lie(name: str) -> None:
    """Here a tensor made without a device is not on the CPU; with arguments on a card it would be."""
    run, arguments = getattr(table.OPERATORS[name].reference, name), given_to(torch.float32)[name]

    def elsewhere(*given: Any) -> Any:
        with torch.device("meta"):
            return run(*given)

    pairs = zip(results(elsewhere, name, arguments), results(run, name, arguments), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)

"""Tables of cases, thinned: the whole table is long."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest


def long(cases: Sequence[Sequence[Any]]) -> list[Any]:
    """The cases, to be run by `make test-all` alone."""
    return [pytest.param(*case, marks=pytest.mark.long) for case in cases]


def thinned(axes: Mapping[str, Sequence[Any]]) -> pytest.MarkDecorator:
    """``parametrize`` over the product of ``axes``, whose names may be several: ``{"T,N": [(1, 2), ...]}``.

    Each two values of different axes meet in a case that always runs, of two axes every third pair; the others are
    long.
    """
    least = min(3, *map(len, axes.values())) if len(axes) == 2 else min(map(len, axes.values()))
    names = [name for key in axes for name in key.split(",")]
    cases = []
    for numbered in itertools.product(*(list(enumerate(axis)) for axis in axes.values())):
        values = [part for key, (_, value) in zip(axes, numbered) for part in (value if "," in key else [value])]
        marks = [pytest.mark.long] if sum(number for number, _ in numbered) % least else []
        words = [getattr(value, "__name__", str(value)) for value in values]
        cases.append(pytest.param(*values, marks=marks, id="-".join(words)))
    return pytest.mark.parametrize(names, cases)

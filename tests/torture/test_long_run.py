"""The short form of `long_run.py`, and that it finds what grows."""

from __future__ import annotations

import pytest
from long_run import Sample, growth, many_switches


def test_adapters_are_switched_without_growth() -> None:
    found = many_switches(switches=400)
    assert found["faults"] == []


@pytest.mark.parametrize(
    ("last", "said"),
    [
        ((640, 20, 4), "resident memory grew from 600.0 to 640.0 MB"),
        ((600, 21, 4), "handles"),
        ((600, 20, 5), "threads"),
    ],
)
def test_what_grows_is_found(last: tuple[int, int, int], said: str) -> None:
    samples = [Sample(100_000_000, 3, 1)] * 10 + [Sample(600_000_000, 20, 4)] * 80
    assert growth([*samples, *[samples[-1]] * 10])["faults"] == []
    (fault,) = growth([*samples, *[Sample(last[0] * 1_000_000, *last[1:])] * 10])["faults"]
    assert fault.startswith(said)

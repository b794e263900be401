"""What `export --verify` makes of a server's numbers. Real servers are in `test_gguf.py` and need one installed."""

from __future__ import annotations

import dataclasses

import pytest

from rankwise.errors import RunError
from rankwise.export.proof import Answers, Proof, _difference, _judge

PROVEN = Proof("server", 2, 24, base_difference=0.04, difference=0.05, effect=0.9, equal_texts=2, changed_texts=1)


def judged(**changes: float) -> None:
    _judge(dataclasses.replace(PROVEN, **changes))


def test_an_adapter_may_differ_twice_as_much_as_its_base() -> None:
    judged()
    judged(difference=0.08)
    with pytest.raises(RunError, match=r"RW738.*0\.081 nats a token over 24 tokens, and by 0\.04 without"):
        judged(difference=0.081)
    with pytest.raises(RunError, match="RW738"):
        judged(difference=float("nan"))


def test_what_differs_by_rounding_alone_is_exact() -> None:
    judged(base_difference=0.0, difference=1e-3)
    with pytest.raises(RunError, match="RW738"):
        judged(base_difference=0.0, difference=1.1e-3)


@pytest.mark.parametrize("without", [{"changed_texts": 0}, {"effect": 0.05}, {"effect": 0.01}])
def test_a_server_that_answers_as_without_the_adapter_proves_nothing(without: dict[str, float]) -> None:
    with pytest.raises(RunError, match=r"RW738.*answers as without"):
        judged(**without)


def test_a_difference_is_the_mean_over_all_tokens() -> None:
    one, other = Answers([], [[-1.0, -2.0], [-3.0]]), Answers([], [[-1.5, -2.0], [-1.0]])
    assert _difference(one, other) == pytest.approx((0.5 + 0.0 + 2.0) / 3)

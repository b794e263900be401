"""Which optimizers a plan refuses without a CUDA card: those that the trainer refuses there."""

from __future__ import annotations

import pytest

from rankwise.errors import ConfigError
from rankwise.planning.optimizers import RULES, check_device
from rankwise.training.memory_savers import check_memory_savers


def refuses(check, *arguments, **more) -> bool:
    try:
        check(*arguments, **more)
    except ConfigError as error:
        return error.code == "RW116" and "CUDA cards only" in error.message
    return False


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("optimizer", RULES)
def test_plan_and_train_refuse_the_same(optimizer, device):
    assert refuses(check_device, optimizer, device, "it") == refuses(
        check_memory_savers, optimizer, device, activation_offloading=False
    )
    check_device(optimizer, "cuda", "a card")

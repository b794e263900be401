"""Canaries of ``compat.accelerate``."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from torch import nn

from rankwise.compat.accelerate import hook_again, loads_weights, only_moves_inputs


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))


def test_hooks_of_a_device_map_move_inputs_and_do_nothing_else():
    dispatched = dispatch_model(model(), {"0": "cpu", "1": "cpu"}, force_hooks=True)
    assert only_moves_inputs(dispatched[0])
    assert not loads_weights(dispatched[0])
    # The root's gives outputs back on the device of the inputs.
    assert not only_moves_inputs(dispatched)
    plain = model()
    assert not only_moves_inputs(plain[0])
    plain[0].forward = lambda x: x
    assert not only_moves_inputs(plain[0])


def test_a_hook_is_bound_to_the_copy():
    dispatched = dispatch_model(model(), {"0": "cpu", "1": "cpu"}, force_hooks=True)
    copied = copy.copy(dispatched[0])
    hook_again(copied)
    assert copied.forward.args == (copied,)
    assert only_moves_inputs(copied)
    assert dispatched[0].forward.args == (dispatched[0],)


@pytest.mark.filterwarnings("ignore")
def test_offloaded_modules_are_told_apart():
    offloaded = cpu_offload(model(), execution_device=torch.device("cpu"))
    assert loads_weights(offloaded[0])
    assert not only_moves_inputs(offloaded[0])

"""What optimizers hold by the plan, and which it refuses without a CUDA card: those that the trainer refuses there."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import ConfigError
from rankwise.planning.step import new_optimizer
from rankwise.planning.workload import RULES, Workload, check_device
from rankwise.training.optimizers import check_memory_savers, implementation_of


def refuses(check, *arguments, **more) -> bool:
    try:
        check(*arguments, **more)
    except ConfigError as error:
        return error.code == "RW116" and "CUDA GPUs only" in error.message
    return False


@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("optimizer", RULES)
def test_plan_and_train_refuse_the_same(optimizer, device):
    assert refuses(check_device, optimizer, device, "it") == refuses(
        check_memory_savers, optimizer, device, activation_offloading=False
    )
    check_device(optimizer, "cuda", "a card")


@pytest.mark.parametrize("shape", [(4095,), (64, 64), (4097,), (100, 300)])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "AdamW32bit"])
def test_states_of_bitsandbytes_are_as_large_as_planned(name, shape):
    """Values, and the scales of each moment; the tables of 256 values are shared by all parameters."""
    optimizers = pytest.importorskip("bitsandbytes.optim")
    parameter = torch.nn.Parameter(torch.zeros(shape))
    # Not paged, since pages are made on a card.
    optimizer = getattr(optimizers, name.removeprefix("Paged"))([parameter])
    optimizer.fill_qmap()
    optimizer.init_state(optimizer.param_groups[0], parameter, 0, 0)
    held = optimizer.state[parameter].items()
    found = sum(value.nbytes for key, value in held if torch.is_tensor(value) and "qmap" not in key)
    ours = {"AdamW8bit": "adamw_8bit", "PagedAdamW8bit": "paged_adamw_8bit", "Lion8bit": "lion_8bit"}
    assert RULES[ours.get(name, "paged_adamw_32bit")].state(shape, 4) == found


@pytest.mark.parametrize(("device", "copies"), [("cuda", False), ("cpu", True)])
def test_adamw_on_a_card_is_fused_and_holds_no_copies(device, copies):
    """As `train` runs it."""
    workload = Workload(device_type=device)
    assert bool(new_optimizer(workload, torch.nn.Linear(3, 4)).defaults["fused"]) is not copies
    assert implementation_of(workload.optimizer, device) == ("adamw_torch" if copies else "adamw_torch_fused")

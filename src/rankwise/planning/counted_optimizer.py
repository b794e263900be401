"""Optimizers in a trace: torch's own where they run on fake tensors, else a stand-in of the same size."""

from __future__ import annotations

from collections.abc import Callable

import torch

from rankwise.compat.torch import own_part
from rankwise.planning.optimizers import rule_of, state_bytes
from rankwise.planning.workload import Workload


def new_optimizer(workload: Workload, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW as the device runs it (fused on a GPU), or a stand-in for an optimizer that torch does not have."""
    if workload.optimizer == "adamw_torch":
        return torch.optim.AdamW(parameters, fused=workload.device_type == "cuda")
    return CountedOptimizer(parameters, workload.optimizer)


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state that exists from the second step on."""
    if isinstance(optimizer, CountedOptimizer):
        optimizer.step()
        return
    for parameter in (item for group in optimizer.param_groups for item in group["params"]):
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = {"step": torch.ones(()), **moments}


class CountedOptimizer(torch.optim.Optimizer):
    """Holds as many bytes of state for each parameter as the rule of ``name`` gives, and its copies during the step."""

    def __init__(self, parameters: list[torch.nn.Parameter], name: str) -> None:
        super().__init__(parameters, {})
        self.name = name

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        copies = []
        for group in self.param_groups:
            for parameter in group["params"]:
                self._keep(parameter)
                if rule_of(self.name).copies:
                    copies.append(torch.empty_like(parameter))

    def _keep(self, parameter: torch.Tensor) -> None:
        size, _ = state_bytes(self.name, [(tuple(own_part(parameter).shape), parameter.element_size())])
        if size and not self.state[parameter]:
            self.state[parameter]["bytes"] = torch.empty(size, dtype=torch.uint8)

"""Options that save accelerator memory, and the devices on which each works: paged and 8-bit optimizers, offloading."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from rankwise.errors import ConfigError

# rankwise's optimizer, in addition to those of transformers.
OFFLOADED = "adamw_offload"
_BITSANDBYTES_WORDS = ("paged", "bnb", "8bit", "lion_32bit", "ademamix")
_TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")


class OffloadedAdamW(torch.optim.Optimizer):
    """AdamW whose moments live in CPU memory: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2 (Kingma and Ba 2015).

    A step copies each parameter's gradient to the CPU and its new value back, one parameter after the other, so that
    the accelerator holds no optimizer state. On a CPU the result equals that of ``torch.optim.AdamW``, bit for bit.
    """

    def __init__(
        self,
        params: torch.optim.optimizer.ParamsT,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        return loss

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        value = parameter.detach().cpu()
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(value)
            state["exp_avg_sq"] = torch.zeros_like(value)
        # Loading a state dict moves the moments to the parameter's device.
        moments = {name: state[name].cpu() for name in ("exp_avg", "exp_avg_sq", "step")}
        state.update(moments)
        adamw(
            [value],
            [parameter.grad.cpu()],  # type: ignore[union-attr]
            [state["exp_avg"]],
            [state["exp_avg_sq"]],
            [],
            [state["step"]],
            foreach=False,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        if parameter.device.type != "cpu":
            parameter.copy_(value)


def check_memory_savers(optimizer: str, device_type: str, *, activation_offloading: bool) -> None:
    """Raise ConfigError (RW116) for an optimizer or for offloading that cannot run on this device."""
    if optimizer in _TORCHAO and importlib.util.find_spec("torchao") is None:
        raise ConfigError("RW116", f'--optimizer {optimizer} needs torchao: pip install "rankwise[cuda]".')
    if _is_bitsandbytes(optimizer):
        if device_type != "cuda":
            raise ConfigError(
                "RW116",
                f"--optimizer {optimizer} runs on CUDA cards only, and this run is on {device_type}; use adamw_torch, "
                f"or {OFFLOADED}, which keeps the optimizer's state in CPU memory on any accelerator.",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError(
                "RW116",
                f'--optimizer {optimizer} needs bitsandbytes: pip install "rankwise[cuda]"; without it, {OFFLOADED} '
                "keeps the optimizer's state in CPU memory.",
            )
    if activation_offloading and device_type == "cpu":
        raise ConfigError(
            "RW116",
            "--activation-offloading moves activations from an accelerator to CPU memory, and this run is on the CPU; "
            "use --gradient-checkpointing.",
        )


def _is_bitsandbytes(optimizer: str) -> bool:
    # GaLore's and APOLLO's 8-bit variants need packages of their own, which transformers checks.
    ours = optimizer in _TORCHAO or optimizer.startswith(("galore", "apollo"))
    return not ours and any(word in optimizer for word in _BITSANDBYTES_WORDS)

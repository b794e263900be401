"""Optimizers and schedules by the names that transformers gives them, and LoRA+'s groups of parameters.

LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 3):  B's learning rate is ``ratio`` times A's.

| group | parameters | rate |
|---|---|---|
| lora_A | A, and weights of modules that train whole | lr |
| lora_B | B, DoRA's m, biases and other vectors | ratio x lr |
| embedding | A and B of adapted embeddings | 1e-6, for any lr |

Groups and the embedding's rate are those of the paper's code and of PEFT's ``create_loraplus_optimizer``.
"""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from rankwise.adapters.lora import EmbeddingLora
from rankwise.errors import ConfigError
from rankwise.options import OPTIMIZERS, close_names

TORCHAO = ("adamw_torch_4bit", "adamw_torch_8bit")
# AdamW, Lion and RMSprop of bitsandbytes.optim: with 8-bit states where the name says so, else with 32 bits.
BITSANDBYTES = (
    *("adamw_8bit", "adamw_bnb_8bit", "paged_adamw", "paged_adamw_8bit", "paged_adamw_32bit"),
    *("lion_8bit", "lion_32bit", "paged_lion_8bit", "paged_lion_32bit"),
    *("rmsprop_bnb", "rmsprop_bnb_8bit", "rmsprop_bnb_32bit"),
)
NAMES = (
    *("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop", "adafactor"),
    *(*TORCHAO, *BITSANDBYTES),
)
# transformers' others need parameters for which `rankwise train` has no options, or follow evaluations.
SCHEDULES = (
    *("linear", "cosine", "cosine_with_restarts", "polynomial"),
    *("inverse_sqrt", "constant", "constant_with_warmup"),
)
BETAS, EPSILON = (0.9, 0.999), 1e-8
EMBEDDING_RATE = 1e-6
# Names of parameters without weight decay, as in transformers' Trainer.
UNDECAYED = re.compile(r"bias|layernorm|rmsnorm|(?:^|[._])norm(?:$|\.)")
# The parameters of one group and its options.
Group = dict[str, Any]


def check_names(optimizer: str, schedule: str) -> None:
    """Raise ConfigError: RW110 for an optimizer, RW111 for a schedule that does not exist."""
    _check_name("RW110", "--optimizer", optimizer, NAMES)
    _check_name("RW111", "--lr-scheduler-type", schedule, SCHEDULES)


def _check_name(code: str, option: str, name: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        close = close_names(name, names, OPTIMIZERS, cutoff=0.4) or names
        raise ConfigError(code, f"{option} is {name!r}, which does not exist; the closest are {', '.join(close)}.")


def check_memory_savers(optimizer: str, device_type: str, *, activation_offloading: bool) -> None:
    """Raise ConfigError (RW116) for an optimizer or for offloading that cannot run on this device."""
    if optimizer in TORCHAO and importlib.util.find_spec("torchao") is None:
        raise ConfigError("RW116", f"--optimizer {optimizer} needs torchao; run `pip install torchao`.")
    if optimizer in BITSANDBYTES:
        if device_type != "cuda":
            raise ConfigError(
                "RW116",
                f"--optimizer {optimizer} runs on CUDA GPUs only, and this run is on {device_type}; use adamw_torch.",
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ConfigError("RW116", f"--optimizer {optimizer} needs bitsandbytes; run `pip install bitsandbytes`.")
    if activation_offloading and device_type == "cpu":
        raise ConfigError(
            "RW116",
            "--activation-offloading moves activations from an accelerator to CPU memory, and this run is on the CPU; "
            "use --gradient-checkpointing.",
        )


def implementation_of(optimizer: str, device_type: str) -> str:
    """The name of the optimizer that runs. On a GPU, adamw_torch becomes the fused AdamW: one kernel, without copies of
    the trained tensors.
    """
    return "adamw_torch_fused" if (optimizer, device_type) == ("adamw_torch", "cuda") else optimizer


def make_optimizer(
    name: str, model: nn.Module, *, rate: float, weight_decay: float, loraplus_ratio: float | None = None
) -> Optimizer:
    """The optimizer of everything in ``model`` that trains."""
    device_type = next(parameter.device.type for parameter in model.parameters() if parameter.requires_grad)
    if loraplus_ratio is None:
        decaying = decaying_names(model)
        named = [(key, parameter) for key, parameter in model.named_parameters() if parameter.requires_grad]
        groups: list[Group] = [
            {"params": [tensor for key, tensor in named if key in decaying], "weight_decay": weight_decay},
            {"params": [tensor for key, tensor in named if key not in decaying], "weight_decay": 0.0},
        ]
    else:
        groups = loraplus_groups(model, rate=rate, ratio=loraplus_ratio, weight_decay=weight_decay)
    adam: dict[str, Any] = {"lr": rate, "betas": BETAS, "eps": EPSILON}
    if name in TORCHAO:
        from torchao import optim

        kind = {"adamw_torch_4bit": optim.AdamW4bit, "adamw_torch_8bit": optim.AdamW8bit}[name]
        return kind(groups, **adam, block_size=256)
    if name in BITSANDBYTES:
        return _of_bitsandbytes(name, model, groups, rate)
    if name == "adafactor":
        from transformers import Adafactor

        return Adafactor(groups, lr=rate, scale_parameter=False, relative_step=False)
    if name.startswith("adamw"):
        is_fused = implementation_of(name, device_type) == "adamw_torch_fused"
        return torch.optim.AdamW(groups, **adam, fused=is_fused or None)
    return {"sgd": torch.optim.SGD, "adagrad": torch.optim.Adagrad, "rmsprop": torch.optim.RMSprop}[name](
        groups, lr=rate
    )


def make_schedule(name: str, rate: float, warmup_steps: int, total_steps: int) -> Callable[[int], float]:
    """The factor of the highest ``rate`` after a number of steps, as in transformers' schedule of that name. The usual
    ones are written here: its module imports PEFT, if that is installed, which takes seconds.
    """
    if name not in ("linear", "cosine", "constant", "constant_with_warmup"):
        from transformers import get_scheduler

        optimizer = torch.optim.SGD([torch.zeros(1)], lr=rate)
        return get_scheduler(name, optimizer, warmup_steps, total_steps).lr_lambdas[0]

    def factor(step: int) -> float:
        if step < warmup_steps and name != "constant":
            return step / max(1, warmup_steps)
        if name.startswith("constant"):
            return 1.0
        left = (total_steps - step) / max(1, total_steps - warmup_steps)
        if name == "linear":
            return max(0.0, left)
        done = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        return max(0.0, 0.5 * (1 + math.cos(math.pi * done)))

    return factor


def set_rates(optimizer: Optimizer, rates: Iterable[float]) -> None:
    """Set the learning rate of each group; torchao's optimizers keep it as a tensor."""
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def _of_bitsandbytes(name: str, model: nn.Module, groups: list[Group], rate: float) -> Optimizer:
    from bitsandbytes import optim

    kind = next(kind for kind in ("AdamW", "Lion", "RMSprop") if kind.lower() in name)
    bits = 8 if name.endswith("8bit") else 32
    options: dict[str, Any] = {"lr": rate, "optim_bits": bits}
    if kind != "RMSprop":
        options |= {"betas": BETAS, "is_paged": name.startswith("paged")}
    if kind == "AdamW":
        options["eps"] = EPSILON
    optimizer: Optimizer = getattr(optim, kind)(groups, **options)
    if bits == 8:
        # Embeddings are unstable with 8-bit states.
        manager = optim.GlobalOptimManager.get_instance()  # type: ignore[attr-defined]
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                manager.register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer


def decaying_names(model: nn.Module) -> set[str]:
    """The names of the parameters with weight decay: all but biases and norms."""
    norms = {
        f"{name}.{key}".removeprefix(".")
        for name, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for key, _ in module.named_parameters()
    }
    return {name for name, _ in model.named_parameters() if not UNDECAYED.search(name.lower())} - norms


def loraplus_groups(model: nn.Module, *, rate: float, ratio: float, weight_decay: float) -> list[Group]:
    """The optimizer's non-empty parameter groups, each with its name under ``group``; the first's rate is logged."""
    embedded = {id(p) for module in model.modules() if isinstance(module, EmbeddingLora) for p in module.parameters()}
    decaying = decaying_names(model)
    rates = {"lora_A": rate, "lora_B": rate * ratio, "embedding": EMBEDDING_RATE}
    groups: dict[tuple[str, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.dim() == 1
        group = "lora_B" if is_vector or name.endswith("lora_B") else "lora_A"
        group = "embedding" if id(parameter) in embedded and not is_vector else group
        groups.setdefault((group, weight_decay if name in decaying else 0.0), []).append(parameter)
    return [
        {"params": parameters, "lr": rates[group], "weight_decay": decay, "group": group}
        for (group, decay), parameters in sorted(
            groups.items(), key=lambda item: (item[0][0] == "embedding", item[0][0])
        )
    ]

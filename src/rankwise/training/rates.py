"""LoRA+ (Hayou et al. 2024, arXiv 2402.12354, section 3):  B's learning rate is ``ratio`` times A's.

| group | parameters | rate |
|---|---|---|
| lora_A | A, and weights of modules that train whole | lr |
| lora_B | B, DoRA's m, biases and other vectors | ratio x lr |
| embedding | A and B of adapted embeddings | 1e-6, for any lr |

Groups and the embedding's rate are those of the paper's code and of PEFT's ``create_loraplus_optimizer``.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer
from transformers import Trainer

from rankwise.adapters.lora import EmbeddingLora
from rankwise.errors import ConfigError

EMBEDDING_RATE = 1e-6
# The parameters of one group and its options; an optimizer's class and its arguments.
Group = dict[str, Any]
Chosen = tuple[type[Optimizer], dict[str, Any]]


def loraplus_groups(model: nn.Module, *, rate: float, ratio: float, weight_decay: float) -> list[Group]:
    """The optimizer's non-empty parameter groups, each with its name under ``group``."""
    embedded = {id(p) for module in model.modules() if isinstance(module, EmbeddingLora) for p in module.parameters()}
    # The method uses the model only, not the Trainer.
    decaying = set(Trainer.get_decay_parameter_names(None, model))  # type: ignore[arg-type]
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
        for (group, decay), parameters in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def with_groups(chosen: Chosen, groups: list[Group]) -> Chosen:
    """An optimizer's class and arguments, with these groups. Raises ConfigError (RW786) where it makes its own."""
    optimizer, options = chosen
    own = {"params", "model", "optimizer_dict"} & options.keys()
    if own or not isinstance(optimizer, type):
        raise ConfigError(
            "RW786",
            "--loraplus-ratio sets a rate for each group of parameters, and this --optimizer makes its own groups; "
            "take adamw_torch.",
        )
    return optimizer, {**options, "params": groups}

"""What the tests of adapters do with a tiny model, and with it in PEFT."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import rankwise as rw

IDS = torch.tensor([[1, 5, 9, 14, 33, 60, 96, 2], [1, 7, 7, 8, 90, 41, 3, 2]])


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def step(model: nn.Module, rate: float = 0.1) -> None:
    """Move every trainable parameter away from where it is."""
    model(input_ids=IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.sign(parameter.grad) * rate + 0.01)
                parameter.grad = None


def read_from_peft(theirs: nn.Module, base: Callable[[], nn.Module], folder: Path) -> nn.Module:
    """A model of ours with the adapter of PEFT's, whose logits are the same."""
    theirs.save_pretrained(folder)
    model = base()
    rw.load_adapter(model, folder)
    torch.testing.assert_close(logits(model), logits(theirs.eval()), rtol=1e-5, atol=2e-5)
    return model

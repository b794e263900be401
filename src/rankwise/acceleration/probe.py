"""Run a model once before training to test a property. An error of the model is a result, too."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import nn

from rankwise.errors import RankwiseError, is_out_of_memory

Answer = TypeVar("Answer")


def probe(model: nn.Module, ask: Callable[[], Answer], *, grad: bool = False) -> tuple[Answer | None, str | None]:
    """(result of ``ask`` with the model in evaluation mode, None), or (None, why the model cannot run it).

    ``grad``: with gradients enabled, as in a training step. RankwiseErrors and out-of-memory errors are raised.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.set_grad_enabled(grad):
            return ask(), None
    except Exception as error:
        if isinstance(error, RankwiseError) or is_out_of_memory(error):
            raise
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    finally:
        for module, mode in modes:
            module.training = mode

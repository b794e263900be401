"""trl's output head in a trace holds what trl's own function holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from trl.kernels import chunked_logprob
from trl.trainer import utils

from rankwise.planning import trl_head
from rankwise.planning.head import TRL_TILE
from rankwise.planning.tracker import StorageTracker


def peaks(loss: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype, *, trains: bool) -> dict[str, int]:
    """{phase: bytes} for 5,000 positions and 40,000 tokens: two tiles each way, the last ones not full."""
    hidden = torch.zeros(5000, 24, dtype=dtype, requires_grad=True)
    weight = torch.zeros(40_000, 24, dtype=torch.float32 if trains else dtype, requires_grad=trains)
    with StorageTracker() as tracker, torch.autocast("cpu", torch.bfloat16, enabled=trains):
        tracker.see_all([hidden, weight], "weights")
        tracker.enter("forward")
        value = loss(hidden, weight)
        tracker.enter("backward")
        value.backward()
    return {phase: sum(terms.values()) for phase, terms in tracker.peaks().items()}


def real(hidden: Tensor, weight: Tensor) -> Tensor:
    return trl_head.sum_of_losses(hidden, weight, torch.zeros(len(hidden), dtype=torch.long))


def standing_in(hidden: Tensor, weight: Tensor) -> Tensor:
    return trl_head.Held.apply(hidden, weight).sum()


@pytest.mark.parametrize(("dtype", "trains"), [(torch.bfloat16, False), (torch.float32, False), (torch.bfloat16, True)])
def test_it_holds_what_trls_function_does(dtype: torch.dtype, trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # On a card kernels turn a tile into sums and gradients where it lies, and products add to float32.
    def nothing(*_: Any, **__: Any) -> None: ...

    for name in ("_forward_tile", "_backward_tile", "_addmm_fp32"):
        monkeypatch.setattr(chunked_logprob, name, nothing)
    assert (chunked_logprob.TOKEN_CHUNK_SIZE, utils._CHUNKED_LOGPROB_CHUNK_SIZE) == TRL_TILE
    wanted, found = (peaks(loss, dtype, trains=trains) for loss in (real, standing_in))
    assert wanted.keys() == {"forward", "backward"}
    for phase in wanted:
        # Sums a position: trl makes some of them anew, and keeps the targets.
        assert found[phase] == pytest.approx(wanted[phase], abs=12 * 8 * 5000), phase

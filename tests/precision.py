"""The bound of a result in low precision: PyTorch's own error in the same dtype, and a rounding."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

import rankwise as rw


def merged_in_float64(model: nn.Module) -> nn.Module:
    """A copy with its adapter merged in float32."""
    # nn.Module's own methods: transformers refuses them for a quantized model.
    copied = nn.Module.float(copy.deepcopy(model))
    rw.merge_adapter(copied)
    return nn.Module.double(copied)


def assert_as_exact(
    found: Sequence[Tensor],
    plain: Sequence[Tensor],
    exact: Sequence[Tensor],
    slack: float = 1.1,
    dtype: torch.dtype | None = None,
) -> None:
    """``|found - exact| <= slack |plain - exact| + a rounding of exact``, of each tensor's norm; and of its largest
    element with twice the slack.

    ``exact`` comes from float64 or float32, ``plain`` from PyTorch's own steps in ``dtype``, else that of ``found``.
    """
    for n, (ours, theirs, true) in enumerate(zip(found, plain, exact, strict=True)):
        one = torch.finfo(dtype or ours.dtype).eps
        # The root mean square of a rounding to 16 bits; in float32 the order of a sum counts for more.
        rounding = 4 * one if one < 1e-6 else one / 4
        true = true.double()
        error, allowed = ours.double() - true, theirs.double() - true
        assert error.norm() <= slack * allowed.norm() + rounding * true.norm() + 1e-30, (
            n, float(error.norm()), float(allowed.norm()), float(true.norm()),
        )  # fmt: skip
        if error.numel():
            worst, bound = error.abs().max(), allowed.abs().max()
            assert worst <= 2 * slack * bound + 4 * rounding * true.abs().max() + 1e-30, (n, float(worst), float(bound))

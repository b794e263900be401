"""16-bit copies of A and B for a card: equal to casts, made anew when a step was taken, all in one launch."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from rankwise.constants import ALIGNED
from rankwise.ops import rounded as module
from rankwise.ops.branch import Branch, Frozen
from rankwise.ops.rounded import rounded


def branches(*ranks: int, K: int = 6, N: int = 5) -> list[Branch]:
    def random(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape))

    return [Branch(frozen=Frozen(torch.randn(N, K)), scale=1.0, A=random(r, K), B=random(N, r)) for r in ranks]


class Copies(TorchDispatchMode):
    """How many tensors each launch of copies took."""

    def __init__(self) -> None:
        super().__init__()
        self.of: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._foreach_copy_.default:
            self.of.append(len(args[0]))
        return func(*args, **(kwargs or {}))


def assert_are_casts(made: Sequence[Branch], dtype: torch.dtype) -> None:
    found = rounded(made, dtype)
    assert found.A.dtype is dtype
    for branch, columns, B in zip(made, found.columns, found.B):
        r = branch.A.shape[0]
        assert columns.start % ALIGNED == 0
        assert torch.equal(found.A[columns][:r], branch.A.to(dtype))
        assert torch.equal(B[:, :r], branch.B.to(dtype))
        assert not found.A[columns][r:].any()
        assert not B[:, r:].any()
        assert B.shape[1] == columns.stop - columns.start


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("ranks", [(8,), (4,), (16, 3, 9)])
def test_copies_are_casts_with_zeros_behind(ranks: tuple[int, ...], dtype: torch.dtype) -> None:
    made = branches(*ranks)
    assert_are_casts(made, dtype)
    assert rounded(made, dtype).has_zeros == any(r % ALIGNED for r in ranks)


@pytest.mark.parametrize("fused", [False, True])
def test_copies_follow_an_optimizer_and_writes(fused: bool) -> None:
    made = branches(4, 8)
    before = rounded(made, torch.bfloat16)
    optimizer = torch.optim.AdamW([made[0].A, made[1].B], fused=fused)
    for tensor in (made[0].A, made[1].B):
        tensor.grad = torch.randn_like(tensor)
    optimizer.step()
    assert_are_casts(made, torch.bfloat16)
    with torch.no_grad():
        made[1].A.add_(1)
    assert_are_casts(made, torch.bfloat16)
    made[0].B.data = torch.randn_like(made[0].B)
    assert_are_casts(made, torch.bfloat16)
    # The memory stays where it is: a step on a card makes none anew.
    assert rounded(made, torch.bfloat16).A.data_ptr() == before.A.data_ptr()


def test_one_launch_copies_what_all_layers_need() -> None:
    first, second, other = branches(4, 8), branches(16), branches(16)
    for made in (first, second, other):
        rounded(made, torch.bfloat16)
    optimizer = torch.optim.SGD([tensor for made in (first, second) for one in made for tensor in (one.A, one.B)], 0.1)
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = torch.ones_like(tensor)
    optimizer.step()
    with Copies() as copies:
        for made in (first, second, other, first):
            rounded(made, torch.bfloat16)
    # A and B of four branches; those of the third layer too, since a step may have written past their versions.
    assert copies.of == [8]
    for made in (first, second, other):
        assert_are_casts(made, torch.bfloat16)


def test_layers_that_share_an_input_later_get_one_stack() -> None:
    made = branches(8, 8)
    for one in made:
        assert_are_casts([one], torch.bfloat16)
    assert_are_casts(made, torch.bfloat16)
    assert_are_casts(made[:1], torch.bfloat16)


def test_copies_go_with_what_they_are_of() -> None:
    gc.collect()
    before = len(module._kept)
    made = branches(4, 8)
    rounded(made, torch.bfloat16)
    assert len(module._kept) == before + 3
    del made
    gc.collect()
    assert len(module._kept) == before


def test_what_inference_mode_made_is_copied_and_not_kept() -> None:
    with torch.inference_mode():
        made = branches(4)
        before = len(module._kept)
        assert_are_casts(made, torch.bfloat16)
        made[0].A.add_(1)
        assert_are_casts(made, torch.bfloat16)
    assert len(module._kept) == before


def test_copies_made_under_inference_mode_serve_a_later_step() -> None:
    made = branches(4)
    with torch.inference_mode():
        rounded(made, torch.bfloat16)
    found: Tensor = rounded(made, torch.bfloat16).A
    assert not found.is_inference()
    with torch.no_grad():
        made[0].A.add_(1)
    assert_are_casts(made, torch.bfloat16)

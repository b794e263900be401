"""Products of rows by expert, as a loop and in the one kernel that cards have."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from precision import assert_as_exact
from rankwise.ops import experts as operators
from rankwise.ops.experts import RowsByExpert, add_grouped, are_aligned, grouped, grouped_outer, inverse

EXPERTS = torch.tensor([0, 0, 0, 2, 2, 3, 3, 3, 3, 5])
E, K, N = 6, 16, 24


@pytest.fixture(params=["loop", "kernel"])
def way(request, monkeypatch):
    if request.param == "kernel":
        if not hasattr(F, "grouped_mm"):
            pytest.skip("this PyTorch has no grouped_mm")
        monkeypatch.setattr(operators, "one_kernel", are_aligned)
    return request.param


def factors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    made = torch.randn(len(EXPERTS), K), torch.randn(E, K, N), torch.randn(len(EXPERTS), N)
    return tuple(tensor.to(dtype) for tensor in made)  # type: ignore[return-value]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_meet_the_matrix_of_their_expert(way, dtype):
    x, W, y = factors(dtype)
    rows, before = RowsByExpert(EXPERTS, E), y.clone()
    plain, exact = (
        torch.stack([row.to(of) @ W[n].to(of) for row, n in zip(x, EXPERTS)]) for of in (dtype, torch.float64)
    )
    transposed = W.transpose(1, 2).contiguous().transpose(1, 2)
    assert_as_exact([grouped(x, W, rows), grouped(x, transposed, rows)], [plain] * 2, [exact] * 2)
    assert add_grouped(y, x, W, rows, 0.5) is y
    assert_as_exact([y], [before + 0.5 * plain], [before.double() + 0.5 * exact])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_outer_products_of_each_expert_s_rows(way, dtype):
    x, _, y = factors(dtype)
    found = grouped_outer(x, y, RowsByExpert(EXPERTS, E))
    plain, exact = (
        [x[n == EXPERTS].T.to(of) @ y[n == EXPERTS].to(of) for n in range(E)] for of in (dtype, torch.float64)
    )
    assert_as_exact(list(found), plain, exact)
    assert not found[1].any()


def test_a_permutation_is_undone():
    order, x = torch.randperm(9), torch.randn(9)
    assert torch.equal(x[order][inverse(order)], x)


def test_the_ends_are_those_of_the_sizes():
    rows = RowsByExpert(EXPERTS, E)
    assert rows.sizes == [3, 0, 2, 4, 0, 1]
    assert rows.ends.tolist() == [3, 3, 5, 9, 9, 10]
    assert rows.ends.dtype is torch.int32


@pytest.mark.parametrize(("rank", "fits"), [(1, False), (4, False), (8, True), (12, False), (16, True)])
def test_the_kernel_is_given_whole_16_bytes_alone(rank, fits):
    x, A = torch.empty(10, 32, dtype=torch.bfloat16), torch.empty(6, rank, 32, dtype=torch.bfloat16)
    U = torch.empty(10, rank, dtype=torch.bfloat16)
    assert are_aligned(x, A.transpose(1, 2)) is fits
    assert are_aligned(U, A) is fits
    assert are_aligned(U.T, x) is fits

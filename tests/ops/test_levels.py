"""Operators at every instruction-set level that this processor has."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from marks import LEVELS
from rankwise import ops
from rankwise.models.device import cpu_flags
from rankwise.ops import reference as specification
from rankwise.ops import table
from rankwise.ops.branch import Branch, Frozen
from rankwise.ops.cpu import native
from rankwise.ops.low_rank_linear import low_rank_linear

pytestmark = pytest.mark.skipif(not LEVELS, reason="no native library")
DTYPES = (torch.float32, torch.bfloat16)
# Rows, columns in and out, rank, heads; no multiples of a register, and enough rows for tiles.
T, K, N, R = 70, 192, 130, 7
# An operator may err by what the reference errs in the same dtype, by one rounding of its result, and by float32's
# rounding along a sum, each of the largest number in the result.
SUM = 2e-6
# Attention multiplies in the dtype of its rows: the probabilities and their gradient are rounded too.
ROUNDINGS = {"attention_forward": 2, "attention_backward": 3}
# Held against the reference, which has no float64 for them.
OF_CODES = ("quantize_4bit", "quantize_absmax", "dequantize_4bit", "dequantize_absmax", "row_norms_4bit")

Given = tuple[Any, ...]


def operators() -> list[str]:
    """Those that the native library has; a card alone fuses the others."""
    return [name for name, operator in table.OPERATORS.items() if operator.choose is not table._for_card]


def given_to(dtype: torch.dtype) -> dict[str, Given]:
    """Arguments for each operator, the same at every call."""
    draw = torch.Generator().manual_seed(0)

    def some(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=draw).to(kind)

    weight = ops.quantize_weight(some(N, K), "nf4", 64, True)
    assert weight.nested_absmax is not None
    assert weight.offset is not None
    x, y, gate, up, dout = some(T, K), some(T, N), some(T, N), some(T, N), some(T, N)
    gain, bias = some(N, kind=torch.float32).abs() + 0.5, some(N)
    A, B, w = some(R, K, kind=torch.float32), some(N, R, kind=torch.float32), some(K)
    q, k, v = some(2, T, 4, 32), some(2, T, 2, 32), some(2, T, 2, 32)
    out, lse = specification.attention_forward(q, k, v, None, None, 0.2)
    targets = torch.randint(0, N, (T,), generator=draw)
    turns = some(2, T, 32), some(2, T, 32)
    absmax = some(N * K // 64, kind=torch.float32).abs()
    rstd = specification.rms_norm(x, w, 1e-5, 0, True)[1]
    heads = q.transpose(1, 2)
    return {
        "low_rank_add_": (y, some(T, R), B.to(dtype), 0.5, gain, bias),
        "scaled_grad": (dout, y, gain),
        "rms_norm": (x, w, 1e-5, 0, True),
        "rms_norm_backward": (some(T, K), x, w, rstd, 0, some(T, K)),
        "glu": (gate, up, "silu"),
        "glu_backward": (dout, gate, up, "silu", True),
        "rope": (heads, *turns, False),
        "rope_": (heads, *turns, True),
        "cross_entropy_": (4 * y, targets, 0.01, 0.1, None, 1.0, True, True, True),
        "row_cross": (some(N, K), A, B),
        "dropout": (x, 0.1, 3),
        "dropout_add_": (x, some(T, K), 0.1, 3),
        "quantize_4bit": (some(N, K), "nf4", 64),
        "dequantize_4bit": (weight, dtype),
        "quantize_absmax": (absmax,),
        "dequantize_absmax": (weight.absmax, weight.nested_absmax, weight.offset),
        "linear_4bit": (x, weight, bias),
        "linear_4bit_input_grad": (dout, weight),
        "row_norms_4bit": (weight, dtype),
        "row_cross_4bit": (weight, A, B, dtype),
        "attention_forward": (q, k, v, None, None, 0.2),
        "attention_backward": (some(2, T, 4, 32), q, k, v, out, lse, None, None, 0.2),
    }


def results(run: Callable[..., Any], name: str, arguments: Given) -> list[Tensor]:
    """All that comes back, and what has become of the first argument where the operator writes into it."""
    writes = name.endswith("_")
    copied = [argument.clone() if writes and isinstance(argument, Tensor) else argument for argument in arguments]
    found = run(*copied)
    parts = list(found) if isinstance(found, tuple) else [found]
    parts = [torch.as_tensor(part) for part in parts if part is not None and part is not copied[0]]
    return [*parts, *([copied[0]] if writes else [])]


def doubled(argument: Any) -> Any:
    if argument in DTYPES:
        return torch.float64
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument


def error(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest, relative to the largest number of its result."""
    return max(
        float((one.double() - true.double()).abs().max() / true.double().abs().max().clamp(min=1e-30))
        for one, true in zip(found, exact, strict=True)
    )


def errors_of(name: str, dtype: torch.dtype) -> dict[str, float]:
    """Against float64, of the reference and of each level; where codes decide, or norms of them, against the
    reference."""
    arguments, reference = given_to(dtype)[name], getattr(specification, name)
    plain = results(reference, name, arguments)
    exact = plain if name in OF_CODES else results(reference, name, tuple(map(doubled, arguments)))
    found = {"reference": error(plain, exact)}
    for level in at_levels():
        found[level] = error(results(lambda *given: table.run(name, *given), name, arguments), exact)
    return found


def errors_of_adapted_layers(dtype: torch.dtype) -> dict[str, float]:
    """A 4-bit layer and a dense one with their branches, outputs and gradients; no operator, but sums of products."""
    draw = torch.Generator().manual_seed(0)
    x, weight = torch.randn(T, K, generator=draw).to(dtype), torch.randn(N, K, generator=draw).to(dtype)
    A, B = torch.randn(R, K, generator=draw), torch.randn(N, R, generator=draw)
    m, gain = torch.rand(N, generator=draw) + 0.5, torch.rand(N, generator=draw) + 0.5
    packed = ops.quantize_weight(weight, "nf4", 64, True)

    def run(as_: torch.dtype) -> list[Tensor]:
        dense, of_4_bits = weight.to(as_), ops.dequantize_weight(packed, dtype).to(as_)
        frozen = (dense, of_4_bits if as_ is torch.float64 else packed)
        numbers = torch.float64 if as_ is torch.float64 else torch.float32
        leaves = [part.to(numbers, copy=True).requires_grad_() for part in (A, B, m) for _ in frozen]
        rows = x.to(as_, copy=True).requires_grad_()
        branches = [
            Branch(
                frozen=Frozen(part),
                scale=0.5,
                A=leaves[n],
                B=leaves[2 + n],
                bias=None,
                m=leaves[4 + n],
                gain=gain.to(numbers),
            )
            for n, part in enumerate(frozen)
        ]
        ys = low_rank_linear(rows, branches, None)
        grads = torch.autograd.grad(sum((y.to(numbers) ** 2).sum() for y in ys), [rows, *leaves])  # type: ignore[arg-type]
        return [y.detach() for y in ys] + list(grads)

    exact = run(torch.float64)
    ops.set_implementation("reference")
    found = {"reference": error(run(dtype), exact)}
    ops.set_implementation("auto")
    return found | {level: error(run(dtype), exact) for level in at_levels()}


def at_levels() -> Iterator[str]:
    """Each level in turn, in force."""
    try:
        for level in LEVELS:
            native.set_level(level)
            with warnings.catch_warnings():
                # Where a level has no kernel, plain PyTorch runs and a message says so.
                warnings.simplefilter("ignore")
                yield level
    finally:
        native.set_level(None)


def bound(name: str, reference: float, dtype: torch.dtype) -> float:
    # Beyond that nothing is compared any more.
    assert reference < 2 * torch.finfo(dtype).eps + SUM, (name, reference)
    return reference + ROUNDINGS.get(name, 1) * torch.finfo(dtype).eps / 2 + SUM


def test_levels_are_those_of_the_processor() -> None:
    """A set: AVX-512 does not imply AVX-VNNI."""
    if not (flags := cpu_flags()):
        pytest.skip("the system does not list the processor's instruction sets")
    with_avx512 = {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"}
    needed = {
        "portable": set(),
        "avx2": {"avx2", "fma", "f16c"},
        "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
        "avx512": with_avx512,
        "avx512_bf16": {*with_avx512, "avx512_bf16", "avx512_vnni"},
        "amx": {*with_avx512, "avx512_bf16", "avx512_vnni", "amx_tile", "amx_bf16", "amx_int8"},
    }
    assert tuple(name for name in native.LEVELS if needed[name] <= flags) == LEVELS
    assert [native.level() for _ in at_levels()] == list(LEVELS)


def test_every_operator_has_a_case() -> None:
    assert set(given_to(torch.float32)) == set(operators())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", [*operators(), "adapted layers"])
def test_an_operator_keeps_its_bound_at_every_level(name: str, dtype: torch.dtype) -> None:
    found = errors_of_adapted_layers(dtype) if name == "adapted layers" else errors_of(name, dtype)
    assert set(found) == {"reference", *LEVELS}
    assert {level: found[level] for level in LEVELS if found[level] > bound(name, found["reference"], dtype)} == {}


@pytest.mark.parametrize("name", operators())
def test_a_reference_makes_its_tensors_where_its_arguments_lie(name: str) -> None:
    """Here a tensor made without a device is not on the CPU; with arguments on a card it would be."""
    run, arguments = getattr(specification, name), given_to(torch.float32)[name]

    def elsewhere(*given: Any) -> Any:
        with torch.device("meta"):
            return run(*given)

    pairs = zip(results(elsewhere, name, arguments), results(run, name, arguments), strict=True)
    assert all(torch.equal(found, wanted) for found, wanted in pairs)

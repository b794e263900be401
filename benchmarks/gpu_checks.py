"""Every kernel that a training step uses, judged against float64 on the device that will be timed.

The error of a result may not be above that of plain PyTorch in the same dtype plus a rounding; codes, scales and
dropout masks are equal to the bit.

Legend: T = rows, K = in features, N = out features, r = rank.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rankwise import ops
from rankwise.ops import reference, table
from rankwise.ops.branch import Branch, Dropout, Frozen
from rankwise.ops.low_rank_linear import low_rank_linear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = (((256, 1024), 64), ((33, 320), 64), ((130, 4096), 4096), ((5, 65), 32), ((9, 33), 64), ((7,), 64))
# (T, N, r) of the element-wise parts; the last ones loop in every kernel.
TRAINING_SHAPES = ((5, 48, 8), (33, 320, 16), (128, 1024, 16), (700, 5120, 16))
# (T, N, K, r) of layers, and of what a step on a card fuses.
LAYERS = ((4, 96, 64, 8), (65, 320, 256, 16), (70, 200, 128, 4))
CARD_SHAPES = ((5, 48, 64, 3), (700, 320, 1088, 16), (3000, 4096, 4096, 16), (300, 520, 256, 96))
# One below a tile of columns, and Llama's.
VOCABULARIES = (1000, 128256)


def check_group(name: str, device: str, *, quick: bool = False) -> tuple[int, list[str]]:
    """Of a group of `gpu_jobs.CHECKS` the number of comparisons that passed, and what failed. On a card the Triton
    kernels have to run."""
    passed, failed = 0, []
    ops.set_implementation("triton" if device == "cuda" else "auto")
    for check in GROUPS[name](device, quick):
        try:
            passed += check()
        except Exception as error:  # noqa: BLE001  one kernel that cannot run must not hide the others
            failed.append(f"{type(error).__name__}: {error}".splitlines()[0])
    ops.set_implementation("auto")
    return passed, failed


def _weight_checks(device: str, quick: bool) -> Iterator[Any]:
    for (shape, block_size), quant_type, double, dtype in itertools.product(
        WEIGHTS[1:2] if quick else WEIGHTS, ("nf4", "fp4"), (False, True), _dtypes(quick)
    ):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype).to(device)
        yield lambda w=w, kind=quant_type, size=block_size, double=double: check_weight(w, kind, size, double)


def _elementwise_checks(device: str, quick: bool) -> Iterator[Any]:
    for shape, dtype in itertools.product(TRAINING_SHAPES[:1] if quick else TRAINING_SHAPES, _dtypes(quick)):
        yield lambda shape=shape, dtype=dtype: check_elementwise(*shape, dtype, device)


def _card_checks(device: str, quick: bool) -> Iterator[Any]:
    for shape, dtype in itertools.product(CARD_SHAPES[:1] if quick else CARD_SHAPES, _dtypes(quick)):
        yield lambda shape=shape, dtype=dtype: check_card(*shape, dtype, device)


def _layer_checks(device: str, quick: bool) -> Iterator[Any]:
    for shape, dtype, dora, p in itertools.product(LAYERS, _dtypes(quick), (False, True), (0.0, 0.1)):
        for four_bits in (False, True):
            yield lambda shape=shape, dtype=dtype, dora=dora, p=p, four_bits=four_bits: check_layer(
                *shape, dtype, device, dora=dora, p=p, four_bits=four_bits
            )


def _loss_checks(device: str, quick: bool) -> Iterator[Any]:
    for V, dtype in itertools.product((40,) if quick else VOCABULARIES, _dtypes(quick)):
        yield lambda V=V, dtype=dtype: check_loss(V, dtype, device)


def _dtypes(quick: bool) -> tuple[torch.dtype, ...]:
    return DTYPES[:2] if quick else DTYPES


GROUPS: dict[str, Callable[[str, bool], Iterator[Any]]] = {
    "weights": _weight_checks,
    "elementwise": _elementwise_checks,
    "card": _card_checks,
    "layers": _layer_checks,
    "loss": _loss_checks,
}


# --- 4-bit weights ---


def check_weight(w: Tensor, quant_type: str, block_size: int, double: bool) -> int:
    """Codes and values equal the CPU reference to the bit; products and norms are judged against float64."""
    what = f"{tuple(w.shape)} {w.dtype} {quant_type} block {block_size} double {double}"
    codes, absmax = ops.quantize_4bit(w, quant_type, block_size)
    expected = reference.quantize_4bit(w.cpu(), quant_type, block_size)
    assert torch.equal(codes.cpu(), expected[0]), f"codes differ: {what}"
    assert torch.equal(absmax.cpu(), expected[1]), f"scales differ: {what}"
    packed = ops.quantize_weight(w, quant_type, block_size, double)
    values = ops.dequantize_weight(packed)
    fields = {field.name: getattr(packed, field.name) for field in dataclasses.fields(packed)}
    on_cpu = {name: part.cpu() if isinstance(part, Tensor) else part for name, part in fields.items()}
    plain = reference.dequantize_4bit(ops.PackedWeight(**on_cpu), w.dtype)
    assert torch.equal(values.cpu(), plain), f"values differ: {what}"
    return 3 + (check_products(values, packed, what) if w.dim() == 2 else 0)


def check_products(w: Tensor, packed: ops.PackedWeight, what: str) -> int:
    norms = ops.row_norms_4bit(packed)
    torch.testing.assert_close(norms.double(), w.double().norm(dim=1), rtol=3e-6, atol=0, msg=f"norms: {what}")
    A, B = torch.randn(5, w.shape[1], device=w.device), torch.randn(w.shape[0], 5, device=w.device)
    exact = ((w.double() @ A.double().T) * B.double()).sum(1)
    assert_as_good(ops.row_cross_4bit(packed, A, B), reference.row_cross(w, A, B), exact, f"cross: {what}")
    for T in (1, 2, 16, 17):
        x = torch.randn(T, w.shape[1], device=w.device).to(w.dtype).requires_grad_()
        bias = torch.randn(w.shape[0], device=w.device).to(w.dtype)
        y = ops.linear_4bit(x, packed, bias)
        grad = torch.randn_like(y)
        y.backward(grad)
        truth = x.double() @ w.double().T + bias.double()
        assert_as_good(y, functional.linear(x, w, bias), truth, f"product of {T} rows: {what}")
        assert_as_good(x.grad, grad @ w, grad.double() @ w.double(), f"input gradient of {T} rows: {what}")
    return 10


# --- element-wise parts of a step ---


def check_elementwise(T: int, N: int, r: int, dtype: torch.dtype, device: str) -> int:
    """Each function of ``rankwise.ops.elementwise`` as it runs on ``device``, against its specification in float64."""
    count = 0
    for name, arguments in _elementwise_calls(T, N, r, dtype, device):
        what = f"{name} {T} x {N} {dtype}"
        ours = _tensors(table.run(name, *_copied(arguments)))
        plain = _tensors(getattr(reference, name)(*_copied(arguments)))
        truth = _tensors(getattr(reference, name)(*_copied(arguments, torch.float64)))
        for found, allowed, true in zip(ours, plain, truth, strict=True):
            assert_as_good(found, allowed, true, what)
            count += 1
    return count + check_dropout(T, N, dtype, device)


def _elementwise_calls(
    T: int, N: int, r: int, dtype: torch.dtype, device: str
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    generator = torch.Generator().manual_seed(1)

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    x, y, z, w, u, B = made(T, N), made(T, N), made(T, N), made(N), made(T, r), made(N, r)
    g = made(N, dtype=torch.float32).abs() + 0.5
    yield "low_rank_add_", (y, u, B, 2.0, None, None)
    yield "low_rank_add_", (y, u, B, 2.0, g, w)
    yield "scaled_grad", (y, z, g)
    for offset, cast_first in ((0, True), (1, False)):
        yield "rms_norm", (x, w, 1e-6, offset, cast_first)
    rstd = torch.rsqrt(x.float().square().mean(-1) + 1e-6)
    yield "rms_norm_backward", (y, x, w, rstd, 0, z)
    for act in ("silu", "gelu_tanh", "gelu"):
        yield "glu", (x, y, act)
        yield "glu_backward", (z, x, y, act, True)
    q, angles = made(1, 2, T, 16), made(1, T, 16, dtype=torch.float32)
    for inverse in (False, True):
        yield "rope", (q, angles.cos().to(dtype), angles.sin().to(dtype), inverse)
    A = made(r, 1000, dtype=torch.float32)
    yield "row_cross", (made(N, 1000), A, made(N, r, dtype=torch.float32))
    targets = torch.randint(0, N, (T,), generator=generator)
    targets[0] = -100
    targets = targets.to(device)
    yield "cross_entropy_", (x, targets, 1.0, 0.0, None, 1.0, False, True, False)
    yield "cross_entropy_", (x, targets, 0.5, 0.1, 30.0, 2.0, False, False, False)


def check_dropout(T: int, N: int, dtype: torch.dtype, device: str) -> int:
    """The mask is the same everywhere."""
    x = torch.randn(T, N, generator=torch.Generator().manual_seed(2)).to(dtype)
    ours, plain = table.run("dropout", x.to(device), 0.1, 7), reference.dropout(x, 0.1, 7)
    assert torch.equal(ours.cpu(), plain), f"dropout differs: {T} x {N} {dtype}"
    return 1


def _copied(arguments: tuple[Any, ...], dtype: torch.dtype | None = None) -> list[Any]:
    """Copies, since some functions write into their arguments; floating-point ones in ``dtype``."""
    return [
        argument
        if not isinstance(argument, Tensor)
        else argument.to(dtype if dtype is not None and argument.is_floating_point() else argument.dtype, copy=True)
        for argument in arguments
    ]


def _tensors(result: Any) -> list[Tensor]:
    found = result if isinstance(result, tuple) else (result,)
    return [tensor for tensor in found if tensor is not None]


# --- what a step on a card fuses ---


def check_card(T: int, N: int, K: int, r: int, dtype: torch.dtype, device: str) -> int:
    """The gradients of a branch, DoRA's gain and its product with a 4-bit weight, against float64."""
    generator = torch.Generator().manual_seed(4)

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    what = f"{T} x {K} -> {N}, rank {r}, {dtype}"
    dy, y, U, B, A = made(T, N), made(T, N), made(T, r), made(N, r), made(r, K, dtype=torch.float32)
    g, m = (made(N, dtype=torch.float32).abs() + 0.5 for _ in range(2))
    count = 0
    for gain, folded, out in ((None, False, None), (g, False, y), (g, True, y)):
        arguments = (torch.empty_like(U), dy, U, B, 0.5, gain, folded, out, None if out is None else m)
        results = []
        for run, given in (
            (functools.partial(table.run, "low_rank_grads_"), _copied(arguments)),
            (reference.low_rank_grads_, _copied(arguments)),
            (reference.low_rank_grads_, _copied(arguments, torch.float64)),
        ):
            found = run(*given)
            results.append([given[0], *_tensors(found)])
        for ours, plain, truth in zip(*results, strict=True):
            # dz is rounded before it is multiplied, which float64 does not do.
            assert_as_good_on_average(ours, plain, truth, f"low_rank_grads_ {what}")
            count += 1
    W = made(N, K)
    packed = ops.quantize_weight(W, double_quant=True) if K % 64 == 0 else None
    squared = W.float().square().sum(1)
    exact = m.double() / (W.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
    found = table.run("adapted_gain", W, squared, A, B.float(), m, 0.5)
    assert_as_good(found, reference.adapted_gain(W, squared, A, B.float(), m, 0.5), exact, f"gain {what}")
    if packed is not None:
        dense = ops.dequantize_weight(packed)
        squared = dense.float().square().sum(1)
        found = table.run("adapted_gain_4bit", packed, squared, A, B.float(), m, 0.5, dtype)
        exact = m.double() / (dense.double() + 0.5 * B.double() @ A.double()).norm(dim=1)
        plain = reference.adapted_gain(dense, squared, A, B.float(), m, 0.5)
        assert_as_good(found, plain, exact, f"gain of 4 bits {what}")
        exact = g.double()[:, None] * ops.dequantize_weight(packed, torch.float32).double()
        plain = reference.dequantize_gained_4bit(packed, g, dtype)
        assert_as_good(ops.dequantize_weight(packed, dtype, g), plain, exact, f"weight with a gain {what}")
        count += 2
    return count + 1


# --- the loss ---


def check_loss(V: int, dtype: torch.dtype, device: str) -> int:
    """The loss over V tokens and its gradient, chunked as in a step, against float64."""
    generator = torch.Generator().manual_seed(5)
    logits = (4 * torch.randn(6, V, generator=generator)).to(dtype).to(device)
    targets = torch.tensor([0, V - 1, -100, V // 2, V // 3, 7], device=device)
    count = 0
    for smoothing, softcap in ((0.0, None), (0.1, 30.0)):
        options = (2.0**-10, smoothing, softcap, 1.0, True, True, False)
        ours, plain, truth = logits.clone(), logits.clone(), logits.double()
        found = table.run("cross_entropy_", ours, targets, *options)
        reference.cross_entropy_(plain, targets, *options)
        exact = reference.cross_entropy_(truth, targets, *options)
        assert_as_good(ours, plain, truth, f"gradient of the loss over {V} tokens {dtype}")
        for sum_, right in zip(found[:2], exact[:2]):
            torch.testing.assert_close(sum_, right, rtol=2e-6, atol=1e-4, msg=f"loss over {V} tokens {dtype}")
        count += 3
    return count


# --- whole layers ---


def check_layer(
    T: int, N: int, K: int, r: int, dtype: torch.dtype, device: str, *, dora: bool, p: float, four_bits: bool
) -> int:
    """The operator under LoRA and DoRA with its gradients, against the formula through autograd."""
    generator = torch.Generator().manual_seed(3)

    def made(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    W, dropout = made(N, K), Dropout(p, 11) if p else None
    frozen = Frozen(ops.quantize_weight(W)) if four_bits else Frozen(W)
    W = frozen.dense(dtype)
    gain = made(N, dtype=torch.float32).abs() + 0.5 if dora else None
    # Numbers of `dtype`, kept in float32: whether an implementation rounds A and B makes no difference.
    inputs = {"x": made(T, K), "A": made(r, K).float(), "B": made(N, r).float()}
    if dora:
        inputs["m"] = made(N, dtype=torch.float32).abs() + 0.5
    dy = made(T, N)

    def ours(x: Tensor, A: Tensor, B: Tensor, m: Tensor | None = None) -> Tensor:
        return low_rank_linear(x, (Branch(frozen=frozen, scale=2.0, A=A, B=B, bias=None, m=m, gain=gain),), dropout)[0]

    def plain(x: Tensor, A: Tensor, B: Tensor, m: Tensor | None = None) -> Tensor:
        mask = reference.keep_mask(x, p, 11) / (1 - p) if p else torch.ones_like(x)
        z = functional.linear(x, W.to(x.dtype))
        z = z + 2.0 * ((x * mask.to(x.dtype)) @ A.to(x.dtype).T) @ B.to(x.dtype).T
        if m is None or gain is None:
            return z
        return (z * (m * (gain / m).detach())).to(x.dtype)

    found, allowed = _with_gradients(ours, inputs, dy), _with_gradients(plain, inputs, dy)
    rounded = {name: tensor.to(dtype).double() for name, tensor in inputs.items()}
    truth = _with_gradients(plain, rounded | ({"m": inputs["m"].double()} if dora else {}), dy.double())
    kind = f"{' of 4 bits' if four_bits else ''}{' with gain' if dora else ''}{' with dropout' if p else ''}"
    what = f"layer {T} x {K} -> {N} {dtype}{kind}"
    for name in found:
        assert_as_good_on_average(found[name], allowed[name], truth[name], f"{name} of a {what}")
    return len(found)


def _with_gradients(function: Any, inputs: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    leaves = {name: tensor.detach().clone().requires_grad_() for name, tensor in inputs.items()}
    y = function(**leaves)
    grads = torch.autograd.grad(y, list(leaves.values()), dy)
    return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads)}}


def assert_as_good(ours: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """The error against float64 is not above that of plain PyTorch and a rounding of the float32 sum."""
    error, allowed = (ours.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    # One rounding of the result more: the order of two roundings is not an error.
    unit = torch.finfo(ours.dtype).eps if ours.is_floating_point() else 0.0
    slack = (1e-5 + unit) * (1 + truth.abs().max())
    assert error <= allowed + slack, f"{what}: error {error:.3g}, plain PyTorch's {allowed:.3g}"


def assert_as_good_on_average(ours: Tensor, plain: Tensor, truth: Tensor, what: str) -> None:
    """As `assert_as_good` by the norm of the error: several roundings in a row, where the largest error is chance."""
    error, allowed = (float((result.double() - truth).norm() / truth.norm()) for result in (ours, plain))
    assert error <= 1.25 * allowed + 1e-6, f"{what}: error {error:.3g} of the result, plain PyTorch's {allowed:.3g}"

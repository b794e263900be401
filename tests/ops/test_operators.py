"""The public 4-bit functions: shapes, gradients, PyTorch's own checks, choice of implementation, bad input."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from precision import assert_as_exact
from rankwise import ops
from rankwise.errors import QuantizationError, RankwiseWarning
from rankwise.ops import reference, selection, table
from rankwise.ops.cpu import attention as native_attention
from rankwise.ops.cpu import elementwise as native_elementwise
from rankwise.ops.cpu import four_bit as native_four_bit
from tables import thinned

OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.fixture(params=["auto", "reference"])
def chosen(request: pytest.FixtureRequest):
    ops.set_implementation(request.param)
    yield request.param
    ops.set_implementation("auto")


def make(N: int = 6, K: int = 128, nested: bool = True, dtype: torch.dtype = torch.float32):
    """x (5, K), bias (N,), a packed weight, and the dense weight that it stands for."""
    generator = torch.Generator().manual_seed(0)
    weight = ops.quantize_weight(torch.randn(N, K, generator=generator), double_quant=nested)
    x, bias = torch.randn(5, K, generator=generator).to(dtype), torch.randn(N, generator=generator).to(dtype)
    return x, bias, weight, ops.dequantize_weight(weight, dtype)


@pytest.mark.parametrize("name", table.OPERATORS)
def test_the_native_function_of_an_operator_has_the_signature_of_the_reference(name: str) -> None:
    """What a card alone fuses has a Triton function instead."""
    native = [module for module in (native_four_bit, native_elementwise, native_attention) if name in vars(module)]
    if not native:
        pytest.importorskip("triton")
        native = [importlib.import_module("rankwise.ops.triton.elementwise")]
    wanted, found = (list(inspect.signature(getattr(module, name)).parameters) for module in (reference, native[-1]))
    assert found == wanted


@pytest.mark.parametrize(
    ("shape", "block_size", "expected"),
    [
        ((8, 128), 64, (8, 64)),
        ((8, 96), 64, (384, 1)),
        ((3, 3), 64, (5, 1)),
        ((2, 2, 64), 64, (128, 1)),
        ((0, 64), 64, (0, 32)),
    ],
)
def test_packed_shape(chosen: str, shape: tuple[int, ...], block_size: int, expected: tuple[int, int]) -> None:
    packed, absmax = ops.quantize_4bit(torch.randn(shape), block_size=block_size)
    assert packed.shape == expected
    assert absmax.shape == (-(-torch.Size(shape).numel() // block_size),)


@thinned(
    {
        "rows": [(), (5,), (2, 3), (0,), (70,)],
        "nested": [False, True],
        "dtype": [torch.float32, torch.bfloat16, torch.float16],
    }
)
def test_linear_and_gradients(chosen: str, dtype: torch.dtype, nested: bool, rows: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    _, bias, weight, W = make(nested=nested, dtype=dtype)
    x = torch.randn(*rows, 128).to(dtype).requires_grad_()
    bias.requires_grad_()
    y = ops.linear_4bit(x, weight, bias)
    grad = torch.randn_like(y)

    def in_torch(of: torch.dtype) -> list[torch.Tensor]:
        leaves = [part.detach().to(of, copy=True).requires_grad_() for part in (x, bias)]
        y = functional.linear(leaves[0], W.to(of), leaves[1])
        return [y.detach(), *torch.autograd.grad(y, leaves, grad.to(of))]

    assert_as_exact([y, *torch.autograd.grad(y, (x, bias), grad)], in_torch(dtype), in_torch(torch.float64))


def test_transforms_and_forward_mode(chosen: str) -> None:
    x, bias, weight, W = make()

    def product(x: torch.Tensor) -> torch.Tensor:
        return ops.linear_4bit(x, weight, bias)

    def back(y: torch.Tensor) -> torch.Tensor:
        return ops.linear_4bit_input_grad(y, weight)

    for jacobian in (torch.func.jacrev, torch.func.jacfwd):
        torch.testing.assert_close(jacobian(product)(x[0]), W)
        torch.testing.assert_close(jacobian(back)(bias), W.T)
    torch.testing.assert_close(torch.func.vmap(product)(x), functional.linear(x, W, bias), rtol=1e-5, atol=1e-4)
    with torch.autograd.forward_ad.dual_level():
        y = product(torch.autograd.forward_ad.make_dual(x, x))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, x @ W.T, rtol=1e-5, atol=1e-4)
    with pytest.raises(QuantizationError, match="RW606"):
        torch.func.vmap(product)(x[:, :-1])


def test_backward_keeps_no_dense_weight() -> None:
    x, _, weight, _ = make(N=64, K=1024)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ops.linear_4bit(x.requires_grad_(), weight, None).sum()
    assert {tensor.data_ptr() for tensor in kept} <= {tensor.data_ptr() for tensor in weight.tensors.values()}
    assert len(kept) == 4


def test_only_needed_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    x, bias, weight, _ = make()
    monkeypatch.setattr(reference, "linear_4bit_input_grad", None)
    ops.set_implementation("reference")
    try:
        ops.linear_4bit(x, weight, bias.requires_grad_()).sum().backward()
    finally:
        ops.set_implementation("auto")
    assert bias.grad is not None


def test_a_trace_holds_the_product(chosen: str) -> None:
    x, bias, weight, W = make()
    traced = torch.jit.trace(lambda x: ops.linear_4bit(x, weight, bias), x)
    torch.testing.assert_close(traced(-x), functional.linear(-x, W, bias), rtol=1e-5, atol=1e-4)


def test_autocast_and_bias_dtype() -> None:
    x, bias, weight, W = make()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.linear_4bit(x, weight, bias)
        expected = functional.linear(x, W, bias)
    assert y.dtype == torch.bfloat16
    assert_as_exact([y], [expected], [functional.linear(x.double(), W.double(), bias.double())])


def test_inputs_that_are_not_contiguous(chosen: str) -> None:
    _, _, weight, W = make(N=8)
    wide, spread = torch.randn(128, 5), torch.zeros(16)
    spread[::2] = bias = torch.randn(8)
    y = ops.linear_4bit(wide.t(), weight, spread[::2])
    torch.testing.assert_close(y, functional.linear(wide.t(), W, bias))
    transposed = torch.randn(128, 8)
    assert torch.equal(ops.quantize_4bit(transposed.t())[0], ops.quantize_4bit(transposed.t().contiguous())[0])
    strided = dataclasses.replace(weight, codes=weight.codes.t().contiguous().t())
    assert torch.equal(ops.dequantize_weight(strided), W)


def test_opcheck() -> None:
    x, bias, weight, _ = make()
    parts, scales = weight.parts, (weight.absmax, weight.nested_absmax, weight.offset)
    operators = torch.ops.rankwise
    samples = [
        (operators.quantize_4bit, (torch.randn(4, 96), "fp4", 64)),
        (operators.dequantize_4bit, (*parts, torch.bfloat16)),
        (operators.quantize_absmax, (torch.rand(300),)),
        (operators.dequantize_absmax, scales),
        (operators.linear_4bit, (x.clone().requires_grad_(), *parts, bias.clone().requires_grad_())),
        (operators.linear_4bit_input_grad, (torch.randn(5, 6).requires_grad_(), *parts)),
        (operators.row_norms_4bit, (*parts, torch.float32)),
    ]
    for operator, arguments in samples:
        torch.library.opcheck(operator.default, arguments, test_utils=OPCHECKS)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str) -> None:
    x, bias, weight, _ = make()

    def step(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return ops.linear_4bit(x, weight, bias).relu() * ops.row_norms_4bit(weight)

    x, bias = x.requires_grad_(), bias.requires_grad_()
    found, expected = torch.compile(step, backend=backend, fullgraph=True)(x, bias), step(x, bias)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.sum(), x), torch.autograd.grad(expected.sum(), x))


def test_fake_tensors() -> None:
    with FakeTensorMode():
        w = torch.empty(4096, 11008, dtype=torch.bfloat16)
        weight = ops.quantize_weight(w, double_quant=True)
        x = torch.empty(2, 7, 11008, dtype=torch.bfloat16, requires_grad=True)
        y = ops.linear_4bit(x, weight)
        y.sum().backward()
        dense = ops.dequantize_weight(weight, torch.float16)
        norms = ops.row_norms_4bit(ops.quantize_weight(w))
    assert weight.codes.shape == (4096, 5504)
    assert weight.nested_absmax is not None
    assert weight.nested_absmax.shape == (2752,)
    assert (y.shape, y.dtype) == ((2, 7, 4096), torch.bfloat16)
    assert x.grad.shape == x.shape
    assert (dense.shape, dense.dtype) == ((4096, 11008), torch.float16)
    assert (norms.shape, norms.dtype) == ((4096,), torch.float32)


def test_no_columns(chosen: str) -> None:
    weight, bias = ops.quantize_weight(torch.empty(3, 0)), torch.randn(3)
    assert torch.equal(ops.linear_4bit(torch.empty(2, 0), weight, bias), bias.expand(2, 3))
    assert torch.equal(ops.row_norms_4bit(weight), torch.zeros(3))


def test_no_rows(chosen: str) -> None:
    weight = ops.quantize_weight(torch.empty(0, 64))
    x, bias = torch.randn(3, 64, requires_grad=True), torch.zeros(0, requires_grad=True)
    ops.linear_4bit(x, weight, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.shape == (0,)
    assert torch.equal(x.grad, torch.zeros(3, 64))  # type: ignore[arg-type]


class TestChoice:
    @pytest.fixture(autouse=True)
    def _restore(self):
        yield
        ops.set_implementation("auto")

    def test_names(self) -> None:
        ops.set_implementation("reference")
        assert ops.implementation(torch.empty(1)) == "reference"
        with pytest.raises(QuantizationError, match="RW607.*'fast'.*auto, reference, native, triton"):
            ops.set_implementation("fast")

    def test_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ops.set_implementation(None)
        monkeypatch.setenv("RANKWISE_OPS", "reference")
        assert ops.implementation(torch.empty(1)) == "reference"
        ops.set_implementation(None)
        monkeypatch.setenv("RANKWISE_OPS", "quick")
        with pytest.raises(QuantizationError, match="RW607.*quick"):
            ops.implementation(torch.empty(1))

    def test_a_missing_library_is_said_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rankwise.ops.cpu.native.library_path", lambda: None)
        ops.set_implementation(None)
        with pytest.warns(RankwiseWarning, match="RW608.*plain PyTorch.*compiler"):
            ops.quantize_4bit(torch.randn(4, 64))
        ops.set_implementation("auto")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            ops.quantize_4bit(torch.randn(4, 64))
        assert ops.implementation(torch.empty(1)) == "reference"

    def test_a_forced_one_is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("rankwise.ops.cpu.native.library_path", lambda: None)
        ops.set_implementation("native")
        with pytest.raises(QuantizationError, match="RW607.*'native' was forced"):
            ops.quantize_4bit(torch.randn(4, 64))

    def test_a_library_that_does_not_load(self, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
        broken = tmp_path / "_native.so"
        broken.write_bytes(b"not a library")
        monkeypatch.setattr("rankwise.ops.cpu.native.library_path", lambda: broken)
        ops.set_implementation("native")
        with pytest.raises(QuantizationError, match="RW607.*does not load"):
            ops.quantize_4bit(torch.randn(4, 64))


def test_fake_tensors_are_where_they_are_said_to_be() -> None:
    real = torch.ones(2)
    with FakeTensorMode():
        fake = torch.ones(2)
    for device in ("cpu", "cuda"):
        with selection.fakes_as(device):
            assert selection.is_on_card(fake) is selection.takes_triton(fake) is (device == "cuda")
            assert not selection.is_on_card(real)
    assert not selection.is_on_card(fake)


class TestBadInput:
    @pytest.mark.parametrize("quant_type", ["nf5", "", "NF4"])
    def test_type(self, quant_type: str) -> None:
        with pytest.raises(QuantizationError, match="RW615.*nf4, fp4"):
            ops.quantize_4bit(torch.randn(4, 64), quant_type)

    @pytest.mark.parametrize("block_size", [0, -64, 16, 48, 65, 8192])
    def test_block_size(self, block_size: int) -> None:
        with pytest.raises(QuantizationError, match="RW615.*power of two"):
            ops.quantize_4bit(torch.randn(4, 64), block_size=block_size)

    def test_not_finite(self, chosen: str) -> None:
        w = torch.randn(4, 100)
        w[2, 17] = float("nan")
        with pytest.raises(QuantizationError, match="RW603.*nan at flat index 217"):
            ops.quantize_4bit(w)

    @pytest.mark.parametrize("fault", ["packed", "absmax", "nested_absmax", "offset", "dtype", "missing"])
    def test_buffers(self, chosen: str, fault: str) -> None:
        x, bias, weight, _ = make()
        name = {"packed": "codes", "dtype": "absmax", "missing": "offset"}.get(fault, fault)
        good = getattr(weight, name)
        broken = {
            "packed": lambda: good.view(-1)[:-1],
            "absmax": lambda: good[:-1],
            "dtype": good.float,
            "missing": lambda: None,
        }.get(fault, lambda: torch.cat([good.view(-1)] * 2))
        weight = dataclasses.replace(weight, **{name: broken()})
        for call in (
            lambda: ops.linear_4bit(x, weight, bias),
            lambda: ops.dequantize_weight(weight),
            lambda: ops.row_norms_4bit(weight),
        ):
            with pytest.raises(QuantizationError, match="RW606.*do not hold a 4-bit weight"):
                call()

    def test_products_that_do_not_fit(self, chosen: str) -> None:
        x, bias, weight, _ = make()
        with pytest.raises(QuantizationError, match=r"RW606.*\(5, 127\).*must be 128"):
            ops.linear_4bit(x[:, 1:], weight)
        with pytest.raises(QuantizationError, match=r"RW606.*bias of shape \(5,\)"):
            ops.linear_4bit(x, weight, bias[1:])
        with pytest.raises(QuantizationError, match="RW606.*two dimensions"):
            ops.row_norms_4bit(dataclasses.replace(weight, shape=(2, 3, 128)))
        with pytest.raises(QuantizationError, match="RW605"):
            ops.linear_4bit(x.double(), weight)


def test_double_quantized_scales_that_do_not_fit_are_refused() -> None:
    codes, nested_absmax, offset = ops.quantize_absmax(torch.rand(600))
    assert ops.dequantize_absmax(codes, nested_absmax, offset).shape == (600,)
    broken = [
        (codes.float(), nested_absmax, offset),
        (codes, nested_absmax[:2], offset),
        (codes, nested_absmax.double(), offset),
        (codes, nested_absmax, torch.rand(2)),
        (codes.view(2, 300), nested_absmax, offset),
    ]
    for each in broken:
        with pytest.raises(QuantizationError, match="RW606"):
            ops.dequantize_absmax(*each)

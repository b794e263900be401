"""`Linear4bit` on its own: values, dtypes, state, copies, sharding, compilation."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from marks import at_some_level
from rankwise.quantization import Linear4bit
from rankwise.quantization.config import from_bitsandbytes, to_bitsandbytes
from tables import thinned

pytestmark = at_some_level

SHAPES = [(128, 48), (64, 1), (96, 33), (7, 5), (31, 3)]  # (in, out)
FORMATS = [
    {"quant_type": quant_type, "block_size": block_size, "double_quant": double_quant}
    for quant_type in ("nf4", "fp4")
    for block_size in (32, 64, 256)
    for double_quant in (False, True)
]


def linear(in_features: int, out_features: int, dtype: torch.dtype = torch.float32, bias: bool = True) -> nn.Linear:
    torch.manual_seed(in_features)
    return nn.Linear(in_features, out_features, bias=bias, dtype=dtype)


def state_bytes(layer: nn.Module) -> dict[str, bytes]:
    return {
        name: tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for name, tensor in layer.state_dict().items()
    }


@thinned({"shape": SHAPES, "weight_format": FORMATS, "dtype": [torch.float32, torch.bfloat16, torch.float16]})
def test_forward_is_the_product_with_the_dequantized_weight(shape, weight_format, dtype):
    dense = linear(*shape, dtype)
    layer = Linear4bit.from_linear(dense, **weight_format)
    W = layer.dequantize()
    assert W.shape == dense.weight.shape
    assert W.dtype == dtype
    assert layer.weight.dim() == 2
    assert layer.weight.dtype == torch.uint8
    x = torch.randn(3, shape[0], dtype=dtype)
    expected = F.linear(x.double(), W.double(), dense.bias.double())
    tolerance = 4 * torch.finfo(dtype).eps * (x.double().abs() @ W.double().abs().T + 1)
    assert ((layer(x).double() - expected).abs() <= tolerance).all()
    assert ((layer.product(x).double() - (expected - dense.bias.double())).abs() <= tolerance).all()
    torch.testing.assert_close(layer.row_norms(), W.float().norm(dim=1), rtol=1e-5, atol=1e-6)


def test_the_packed_weight_has_a_row_per_output_where_rows_are_whole_blocks():
    assert Linear4bit(128, 48, block_size=64).weight.shape == (48, 64)
    assert Linear4bit(96, 48, block_size=64).weight.shape == (48 * 96 // 2, 1)


def test_nf4_of_normal_weights_has_the_known_error():
    torch.manual_seed(0)
    W = torch.randn(1024, 1024)
    error = (Linear4bit.from_weight(W).dequantize() - W).abs().mean()
    assert 0.0722 < error < 0.0734


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_cast_changes_what_it_computes_in_and_never_what_it_stores(cast, double_quant):
    layer = Linear4bit.from_linear(linear(96, 33), double_quant=double_quant)
    stored = {name: bits for name, bits in state_bytes(layer).items() if name != "bias"}
    model = nn.Sequential(layer, nn.Linear(33, 2)).to(cast)
    assert {name: bits for name, bits in state_bytes(layer).items() if name != "bias"} == stored
    assert (layer.dtype, layer.bias.dtype, model[1].weight.dtype) == (cast, cast, cast)
    if cast is not torch.float64:
        assert layer.dequantize().dtype == cast
        assert model(torch.randn(2, 96, dtype=cast)).dtype == cast


def test_compute_dtype_is_used_inside_only():
    dense = linear(128, 48)
    layer = Linear4bit.from_linear(dense, compute_dtype=torch.bfloat16)
    x = torch.randn(4, 128)
    expected = Linear4bit.from_linear(dense)(x.bfloat16()).float()
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), expected)


def test_autocast_decides_the_dtype():
    layer = Linear4bit.from_linear(linear(128, 48))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.randn(4, 128)).dtype == torch.bfloat16


def test_gradients_reach_the_input_and_not_the_weight():
    layer = Linear4bit.from_linear(linear(96, 33))
    x = torch.randn(5, 96, requires_grad=True)
    layer(x).square().sum().backward()
    W, b = layer.dequantize(), layer.bias.detach()
    torch.testing.assert_close(x.grad, 2 * F.linear(x.detach(), W, b) @ W, rtol=1e-4, atol=1e-5)
    assert layer.weight.grad is None
    assert not layer.weight.requires_grad


@pytest.mark.parametrize("weight_format", FORMATS[:4], ids=lambda f: "-".join(map(str, f.values())))
@pytest.mark.parametrize("assign", [False, True])
def test_state_goes_through_a_file_exactly(weight_format, assign):
    layer = Linear4bit.from_linear(linear(96, 33), **weight_format)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = Linear4bit(96, 33, bias=True, **weight_format)
    other.load_state_dict(torch.load(file, weights_only=True), assign=assign)
    assert state_bytes(other) == state_bytes(layer)


@pytest.mark.parametrize("name", ["weight", "absmax"])
def test_a_state_of_the_wrong_dtype_is_refused(name):
    layer = Linear4bit.from_linear(linear(128, 48))
    state = layer.state_dict()
    state[name] = state[name].bfloat16()
    with pytest.raises(RuntimeError, match=f"RW606.*{name} is torch.bfloat16"):
        Linear4bit(128, 48, bias=True).load_state_dict(state)


def test_a_dense_state_is_refused():
    with pytest.raises(RuntimeError, match="RW606"):
        Linear4bit(128, 48, bias=True).load_state_dict(linear(128, 48).state_dict())


def test_a_copy_is_independent():
    layer = Linear4bit.from_linear(linear(128, 48), double_quant=True)
    twin = copy.deepcopy(layer)
    layer.weight.zero_()
    layer.absmax.zero_()
    assert twin.dequantize().abs().sum() > 0
    assert twin.double_quant
    assert "double_quant=True" in repr(twin)


@pytest.mark.parametrize("double_quant", [False, True])
def test_it_compiles_without_a_break_and_equals_eager(double_quant):
    layer = Linear4bit.from_linear(linear(128, 48), double_quant=double_quant)
    x = torch.randn(3, 128, requires_grad=True)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    (g,) = torch.autograd.grad(y.square().sum(), x)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(y, layer(x))
    assert torch.equal(g, expected)


def test_it_runs_on_fake_and_meta_tensors():
    with FakeTensorMode():
        layer = Linear4bit.from_linear(nn.Linear(128, 48), double_quant=True)
        assert layer(torch.randn(3, 128)).shape == (3, 48)
        assert layer.dequantize().shape == (48, 128)
    meta = Linear4bit(128, 48, bias=True, device="meta")
    assert meta.weight.is_meta
    assert meta.absmax.is_meta
    assert not meta.to_empty(device="cpu").weight.is_meta


def test_fsdp2_shards_it_by_row_and_computes_the_same(tmp_path):
    from torch import distributed
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    layer = Linear4bit.from_linear(linear(128, 48))
    model, x = nn.Sequential(layer, nn.Linear(48, 2)), torch.randn(3, 128)
    expected = model(x)
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        assert isinstance(layer.weight, DTensor)
        assert layer.weight.to_local().shape == (48, 64)
        assert torch.equal(model(x), expected)
        model(x).sum().backward()
    finally:
        distributed.destroy_process_group()


def test_it_equals_the_layer_that_bitsandbytes_serialized(shared):
    stored = load_file(shared / "numeric" / "linear4bit_nf4_plain.safetensors")
    reference = {name.removeprefix("reference."): stored[name] for name in stored if name.startswith("reference.")}
    layer = Linear4bit.from_weight(reference["original_weight"])
    written = to_bitsandbytes("weight", layer.packed)
    assert all(torch.equal(stored[name], tensor) for name, tensor in written.items())
    assert set(written) == {name for name in stored if name.startswith("weight")}
    read = Linear4bit.of(from_bitsandbytes(stored))
    assert torch.equal(read.dequantize(), reference["dequant"])
    torch.testing.assert_close(read(reference["x"]), reference["y"])

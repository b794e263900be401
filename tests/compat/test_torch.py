"""Canaries of ``compat.torch``: each test is named after what it watches, and checks what the source relies on."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from rankwise.compat import torch as compat


def test_FakeTensorMode_gives_shapes_without_values():
    with compat.FakeTensorMode() as mode:
        made = torch.empty(3, 4) @ torch.empty(4, 5)
        assert compat.fake_mode() is mode
    assert compat.is_fake(made)
    assert made.shape == (3, 5)
    assert made.fake_device == torch.device("cpu")
    assert compat.fake_mode() is None


def test_FakeTensor_is_made_of_a_meta_tensor():
    with compat.FakeTensorMode() as mode:
        made = compat.FakeTensor(mode, torch.empty(2, device="meta"), torch.device("cpu"))
        assert made.device.type == "cpu"
        with compat.in_kernel_invocation_manager(mode):
            assert made.device.type == "meta"


def test_DispatchMode_sees_every_operation():
    seen = []

    class Mode(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        torch.ones(2).add(1)
    assert torch.ops.aten.add.Tensor in seen
    assert all(isinstance(func, compat.OpOverload) for func in seen)
    assert not hasattr(Mode.__torch_dispatch__, "__wrapped__")


def test_tree_iter_finds_what_is_nested():
    assert list(compat.tree_iter(((1, [2]), {"a": 3}))) == [1, 2, 3]


def test_StorageWeakRef_tells_storages_apart():
    a, b = torch.zeros(2), torch.zeros(2)
    ref = compat.StorageWeakRef
    assert ref(a.untyped_storage()) == ref(a[1:].untyped_storage())
    assert ref(a.untyped_storage()) != ref(b.untyped_storage())


def test_WeakTensorKeyDictionary_lets_its_keys_go():
    notes, kept, gone = compat.WeakTensorKeyDictionary(), torch.zeros(1), torch.zeros(1)
    notes[kept] = notes[gone] = "note"
    del gone
    assert len(notes) == 1
    assert notes.get(kept) == "note"
    assert notes.get(kept.clone()) is None


def test_nobody_watches_a_plain_call():
    assert not compat.is_watched()
    assert compat.transform_interpreter() is None


def test_maybe_a_transform_of_torch_func_watches_peek_interpreter_stack():
    found = []

    def f(x: Tensor) -> Tensor:
        found.append((compat.is_watched(), compat.transform_interpreter() is not None))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    assert found == [(True, True)]


def test_len_torch_dispatch_stack_counts_a_fake_mode():
    with compat.FakeTensorMode():
        assert compat.is_watched()


def test_get_tracing_state_sees_a_trace():
    found = []

    def f(x: Tensor) -> Tensor:
        found.append(compat.is_watched())
        return x + 1

    torch.jit.trace(f, torch.ones(2), check_trace=False)
    assert found == [True]


def test_current_level_of_forward_ad_tells_of_tangents():
    assert not compat.has_tangents()
    with forward_ad.dual_level():
        assert compat.has_tangents()
        assert compat.is_watched()


def test_DisableFuncTorch_and_disable_current_modes_make_plain_tensors():
    made = []

    def f(x: Tensor) -> Tensor:
        with compat.plain_tensors():
            made.append(torch.ones(2))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    with compat.FakeTensorMode(), torch.inference_mode(), compat.plain_tensors():
        made.append(torch.ones(2))
    for tensor in made:
        assert type(tensor) is Tensor
        assert not tensor.is_inference()
        assert tensor.tolist() == [1, 1]


def test_current_graph_task_id_tells_a_backward_pass():
    found = []
    x = torch.ones(2, requires_grad=True)
    y = x * 2
    y.register_hook(lambda grad: found.append(compat.in_backward_pass()))
    assert not compat.in_backward_pass()
    y.sum().backward()
    assert found == [True]


def test_cdata_of_a_storage_identifies_it_without_memory():
    a = torch.empty(2, device="meta")
    b = torch.empty(2, device="meta")
    assert compat.storage_address(a.untyped_storage()) == compat.storage_address(a[1:].untyped_storage())
    assert compat.storage_address(a.untyped_storage()) != compat.storage_address(b.untyped_storage())


def test_storage_Use_Count_counts_tensors_and_storages():
    tensor = torch.zeros(4)
    storage = tensor.untyped_storage()
    assert compat.storage_users(storage) == 2
    view = tensor[1:]
    assert compat.storage_users(storage) == 3
    del view
    assert compat.storage_users(storage) == 2


def test_version_counts_writes():
    tensor = torch.zeros(2)
    view = tensor[:1]
    tensor.add_(1)
    assert compat.writes_to(tensor) == compat.writes_to(view) == 1
    tensor.data.add_(1)
    assert compat.writes_to(tensor) == 1
    with torch.inference_mode():
        assert compat.writes_to(torch.zeros(2)) == 0


def test_version_is_shared_with_an_alias_that_holds_nothing():
    output = torch.zeros(3)
    counter = output.detach()
    counter.data = output.new_empty(0)
    output.add_(1)
    assert compat.writes_to(counter) == 1


def test_foreach_copy_converts_dtypes_and_fills_views():
    whole = torch.zeros(4, dtype=torch.bfloat16)
    compat.copy_each([whole[:1], whole[1:3]], [torch.ones(1), torch.full((2,), 2.0)])
    assert whole.tolist() == [1, 2, 2, 0]


def test_base_is_what_a_view_shows():
    tensor = torch.zeros(2, 3)
    assert compat.viewed(tensor.view(3, 2).t()) is tensor
    assert compat.viewed(tensor) is None


def test_unsafe_view_is_no_view_to_autograd():
    class Shaped(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return compat.unsafe_view(x * 2, (6,))

        @staticmethod
        def backward(ctx, grad):
            return grad.view(2, 3)

    y = Shaped.apply(torch.ones(2, 3, requires_grad=True))
    y.add_(1)
    assert y.tolist() == [3] * 6


@pytest.mark.parametrize(
    ("operator", "overload", "call"),
    [
        (compat.local_scalar, "default", lambda: torch.ones(()).item()),
        (
            compat.grouped_mm,
            "default",
            lambda: nn.functional.grouped_mm(
                torch.ones(8, 8, dtype=torch.bfloat16),
                torch.ones(1, 8, 8, dtype=torch.bfloat16),
                offs=torch.tensor([8], dtype=torch.int32),
            ),
        ),
        (compat.unsafe_view, "default", lambda: torch.ones(2, 1, 3) @ torch.ones(3, 4)),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_private_operators_run_where_the_dry_run_expects_them(operator, overload, call):
    seen = []

    class Mode(compat.DispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Mode():
        call()
    assert getattr(operator, overload) in seen


def test_schemas_say_what_operations_return():
    aten = torch.ops.aten
    some = (aten.mul.Tensor, aten.split.Tensor, aten.mul_.Tensor, aten._foreach_mul_.Scalar, aten.t_.default)
    assert [compat.returned_by(func) for func in some] == ["new", "views", "first", "nothing", "other"]


def test_parameters_buffers_and_modules_of_a_module_are_live_dictionaries():
    module = nn.BatchNorm1d(2, affine=False)
    assert set(compat.own_buffers(module)) == {"running_mean", "running_var", "num_batches_tracked"}
    linear = nn.Linear(2, 3, bias=False)
    assert set(compat.own_parameters(linear)) == {"weight", "bias"}
    compat.own_parameters(linear)["weight"] = nn.Parameter(torch.zeros(3, 2))
    assert not linear.weight.any()
    assert compat.own_modules(nn.Sequential(linear)) == {"0": linear}


def test_a_shallow_copy_with_own_parts_leaves_the_original_alone():
    module = nn.Sequential(nn.Linear(2, 2))
    module.register_parameter("own", nn.Parameter(torch.ones(1)))
    copied = copy.copy(module)
    compat.with_own_parts(copied)
    copied.own = nn.Parameter(torch.zeros(1))
    copied.add_module("1", nn.ReLU())
    assert module.own.item() == 1
    assert len(module) == 1


REGISTER = {
    "register_forward_hook": lambda *_: None,
    "register_forward_pre_hook": lambda *_: None,
    "register_full_backward_hook": lambda *_: None,
    "register_full_backward_pre_hook": lambda *_: None,
}


@pytest.mark.parametrize(("place", "register"), enumerate(REGISTER))
def test_hooks_around_a_module_are_four_collections(place, register):
    module = nn.Linear(1, 1)
    handle = getattr(module, register)(REGISTER[register])
    assert [len(hooks) for hooks in compat.hooks_around(module)] == [int(index == place) for index in range(4)]
    handle.remove()
    assert not any(compat.hooks_around(module))


def test_shared_hooks_are_all_that_a_module_keeps_of_them():
    old, new, calls = nn.Linear(1, 1), nn.Linear(1, 1), []
    handle = old.register_forward_hook(lambda module, args, kwargs, y: calls.append(kwargs), with_kwargs=True)
    compat.share_hooks(new, old)
    new(input=torch.ones(1, 1))
    assert [list(kwargs) for kwargs in calls] == [["input"]]
    handle.remove()
    new(torch.ones(1, 1))
    assert len(calls) == 1
    # A collection that torch adds would not be shared.
    assert {name for name in vars(nn.Module()) if "_hook" in name and "state_dict" not in name} == {*compat._HOOKS}


def test_module_apply_and_load_from_state_dict_take_what_ours_take():
    """Ours override both: the precision of scales and magnitudes, and wrong dtypes in a state dict."""
    module = nn.Linear(1, 1)
    module._apply(lambda tensor: tensor.double(), recurse=True)
    assert module.weight.dtype is torch.float64
    errors: list[str] = []
    module._load_from_state_dict({"weight": torch.zeros(2, 2)}, "", {}, True, [], [], errors)
    assert "size mismatch" in errors[0]


def test__lazy_init_makes_the_root_of_sharded_units():
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

    assert callable(FSDPModule._get_fsdp_state)
    assert callable(FSDPState._lazy_init)


def test_propagate_tensor_meta_non_cached_makes_whole_tensors_apart():
    from torch.distributed.tensor import Shard, distribute_tensor

    resized, apart = [], []

    @contextlib.contextmanager
    def noted():
        apart.append(True)
        yield

    with compat.fake_processes(4) as mesh, compat.shards_seen(resized.append, noted):
        tensor = distribute_tensor(torch.ones(8, 6), mesh, [Shard(0)], src_data_rank=None)
        assert compat.shard_of(tensor).shape == (2, 6)
        assert torch.cosh(tensor).shape == (8, 6)
        storage = torch.ones(3).untyped_storage()
        storage.resize_(0)
    assert apart
    assert resized == [storage]
    storage.resize_(4)
    assert resized == [storage]


def test_a_sharded_module_is_of_a_class_of_its_own_and_whole_while_gathered():
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    expected = model[0].weight.detach().clone()
    assert not compat.is_unit(model)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        assert compat.is_unit(model)
        assert compat.class_of(model) is nn.Sequential
        assert compat.is_sharded(model[0].weight)
        assert torch.equal(compat.own_part(model[0].weight), expected)
        assert torch.equal(compat.own_rows(expected, model[0].weight), expected)
        assert torch.equal(compat.rows_of_all(expected, model[0].weight), expected)
        with compat.gathered(model, "0"):
            assert not compat.is_sharded(model[0].weight)
            assert torch.equal(model[0].weight, expected)
        assert compat.is_sharded(model[0].weight)
    finally:
        distributed.destroy_process_group()


def test__int_mm_multiplies_int8_in_int32():
    ones = torch.full((32, 32), 127, dtype=torch.int8)
    assert (compat.int_mm(ones, ones) == 32 * 127**2).all()

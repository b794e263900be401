"""The weights that train, their files, and the states of their optimizers, in one process or in shards (FSDP2).

Weights are an adapter in PEFT's format or a whole model. In shards, each process keeps some rows of every weight, and a
layer's weights are gathered only while the layer runs. A unit is one decoder layer; the modules outside of the layers
(embedding, last norm, head) form one more unit. Packed 4-bit weights are sharded by row as uint8, and so are their
first-level scales; second-level scales, 1/256 as many, are replicated. Adapters are small, and replicated too: one
all-reduce of their gradients ends a step, and adapters, their optimizer and their checkpoints are the same as without
sharding. With ``full``, gradients and optimizer states are shards as the weights are. The operators see gathered
weights: FSDP2 gathers into the same tensor each time, so that a weight saved in a forward pass is whole again in the
backward pass. The memory plan traces the same code over fake processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, StateDict
from transformers import PreTrainedModel

from rankwise.adapters import adapter_parameters, has_adapter, load_tensors, save_adapter
from rankwise.adapters.folder import WEIGHTS_FILE
from rankwise.adapters.select import module_names
from rankwise.compat.torch import begin_sharded, class_of, is_sharded, is_unit, own_buffers, own_part, own_rows
from rankwise.compat.transformers import decoder_layers, is_converted_by_parts
from rankwise.errors import ConfigError, RunError, one_line
from rankwise.methods import guest_of
from rankwise.quantization.experts import four_bit_stacks
from rankwise.quantization.targets import four_bit_layers
from rankwise.training import ranks

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def save_weights(model: nn.Module, folder: Path, gathered: dict[str, Tensor] | None = None) -> None:
    """Write the active adapter, what an installed distribution added, or the whole model (method full).

    ``gathered``: the state of a model whose shards train (``whole_weights``).
    """
    if has_adapter(model):
        save_adapter(model, folder)
    elif (guest := guest_of(model)) is not None:
        guest.save(model, folder)
    else:
        model.save_pretrained(folder, state_dict=gathered)  # type: ignore[operator]


def load_weights(model: nn.Module, folder: Path) -> None:
    """Copy what ``save_weights`` wrote into the model's parameters, bit for bit.

    Raises RunError (RW517) if the tensors do not fit this model.
    """
    try:
        if has_adapter(model):
            load_tensors(model, safetensors.torch.load_file(folder / WEIGHTS_FILE))
        elif (guest := guest_of(model)) is not None:
            guest.load_weights(model, folder)
        else:
            _load_model(model, folder)
    except (OSError, KeyError, RuntimeError, ValueError, safetensors.SafetensorError) as error:
        raise RunError("RW517", f"the weights in {folder} do not fit this run: {one_line(error)}.") from None


def check_written(model: nn.Module, folder: Path) -> None:
    """Load what ``save_weights`` wrote of an adapter into the model again, which must not change a bit of it.

    Raises RunError (RW551). A whole model, which would need its memory twice, is not read again.
    """
    if not has_adapter(model) and guest_of(model) is None:
        return
    trained: str | None = weights_digest(model)
    try:
        load_weights(model, folder)
    except RunError:
        trained = None
    if weights_digest(model) != trained:
        raise RunError(
            "RW551",
            "the adapter that was written differs from the trained one when it is read again; check the disk, and "
            "continue with --resume.",
        )


def trainable_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of everything that trains; names as in the adapter's file if there is an adapter."""
    named = adapter_parameters(model).items() if has_adapter(model) else model.named_parameters()
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def weights_digest(model: nn.Module) -> str:
    """The sha256 of the bytes of all trained tensors that are not shards."""
    digest = hashlib.sha256()
    for parameter in trainable_tensors(model).values():
        if not is_sharded(parameter):
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def checkpoint_bytes(model: nn.Module) -> int:
    """The approximate size of a checkpoint: the trained weights and two float32 moments of each."""
    return sum(value.numel() * (value.element_size() + 8) for value in trainable_tensors(model).values())


@torch.no_grad()
def _load_model(model: nn.Module, folder: Path) -> None:
    # from_pretrained reads every layout that save_pretrained writes: split files, tied weights, renamed experts.
    options = {"dtype": "auto", "local_files_only": True, "use_safetensors": True}
    stored: Any = class_of(model).from_pretrained(folder, **options)  # type: ignore[attr-defined]
    values = dict(stored.named_parameters())
    for unit in filter(is_unit, model.modules()):
        # After a forward pass without a backward pass, the model's parameters are gathered copies of its shards.
        unit.reshard()  # type: ignore[operator]
    for name, parameter in model.named_parameters():
        if values[name].shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(values[name].shape)} and the model has {tuple(parameter.shape)}")
        value = own_rows(values[name], parameter) if is_sharded(parameter) else values[name]
        own_part(parameter).copy_(value)


def mesh_of_all(device_type: str) -> DeviceMesh:
    """A one-dimensional mesh of all processes."""
    import torch.distributed as dist

    return dist.device_mesh.init_device_mesh(device_type, (dist.get_world_size(),))


def shard(model: PreTrainedModel, mesh: DeviceMesh, *, trains_all: bool) -> None:
    """Shard every frozen weight, or every weight with ``trains_all``, by rows over the processes.

    Raises ConfigError (RW148) for a model that does not declare its layers.
    """
    from torch.distributed.fsdp import fully_shard

    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            "RW148", f"--strategy fsdp shards by layer, and {type(model).__name__} does not declare layers; take ddp."
        )
    for module in model.modules():
        # FSDP2 shards parameters only, so the scales become one.
        if (scales := own_buffers(module).pop("absmax", None)) is not None:
            module.register_parameter("absmax", nn.Parameter(scales, requires_grad=False))

    def is_apart(name: str, parameter: nn.Parameter) -> bool:
        # Vectors stay replicated: together they are less than a thousandth of a model.
        return parameter.requires_grad or (parameter.dim() < 2 and not name.endswith(".absmax"))

    apart = {parameter for name, parameter in model.named_parameters() if is_apart(name, parameter)}
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, ignored_params=set() if trains_all else apart)


def shard_before_loading(
    model: PreTrainedModel, device_type: str, trained_whole: Sequence[str], *, trains_all: bool
) -> None:
    """``shard`` a model on the meta device, so that only this process's rows of each weight are read.

    ``trained_whole``: modules_to_save, of which every process trains a whole copy. A model whose weights are not stored
    row by row as it uses them, or whose tied weights would be parted, stays unsharded, and is sharded after loading.
    """
    layers = (layer for _, layer in four_bit_layers(model))
    in_rows = all(layer.packed.rows_are_blocks and not layer.was_conv1d for layer in layers)
    if not in_rows or any(four_bit_stacks(model)) or is_converted_by_parts(model):
        return
    modules = dict(model.named_modules())
    trained = [modules[name] for name in module_names(modules, trained_whole)]
    if _parts_tied_weights(model, trained, trains_all=trains_all):
        return
    model.requires_grad_(trains_all)
    for module in trained:
        for parameter in module.parameters():
            parameter.requires_grad_(parameter.is_floating_point())
    shard(model, mesh_of_all(device_type), trains_all=trains_all)


def _parts_tied_weights(model: PreTrainedModel, trained: Sequence[nn.Module], *, trains_all: bool) -> bool:
    """Whether embedding and head, which loading ties, would be two weights for FSDP2: one of them would stay sharded
    where the other trains whole, or would not see the optimizer's steps, where FSDP2 pads the rows of each.
    """
    if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
        return False
    ends: tuple[Any, ...] = model.get_input_embeddings(), model.get_output_embeddings()
    return any(module in ends for module in trained) or (trains_all and len(ends[0].weight) % ranks.count() > 0)


@contextmanager
def gathered_for_tests(model: Any) -> Iterator[None]:
    """A context in which the parts of a sharded model can be called for tests: one layer of each kind is gathered, and
    so is everything outside of the layers.
    """
    if not is_unit(model):
        yield
        return
    kinds: set[type] = set()
    shown = []
    with roots_gathered(model):
        for layer in filter(is_unit, model.modules()):
            found = {type(module) for module in layer.modules()}
            if layer is not model and not found <= kinds:
                layer.unshard()
                shown.append(layer)
                kinds |= found
        yield
        for layer in shown:
            layer.reshard()


@contextmanager
def roots_gathered(model: Any) -> Iterator[None]:
    """A context in which modules outside of the layers stay gathered, so that parts of a sharded model can be called
    without the model's forward.
    """
    if not is_unit(model):
        yield
        return
    begin_sharded(model)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


def whole(tensor: Any) -> Tensor:
    """The whole tensor of a shard, or the tensor itself. Every process must call this."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def whole_weights(model: nn.Module) -> dict[str, Tensor] | None:
    """The state dict of a model whose shards train, gathered in the writing process; None for any other model.

    Every process must call this. Tied weights stay one tensor.
    """
    if not any(parameter.requires_grad and is_sharded(parameter) for parameter in model.parameters()):
        return None
    state = model.state_dict(keep_vars=True)
    found: dict[int, Tensor] = {}
    for tensor in state.values():
        if id(tensor) not in found:
            gathered = whole(tensor.detach())
            found[id(tensor)] = gathered.cpu() if ranks.is_writer() else gathered.new_empty(0)
    return {name: found[id(tensor)] for name, tensor in state.items()}


def whole_state(optimizer: Optimizer) -> StateDict:
    """An optimizer's state dict without shards, gathered in the writing process. Every process must call this."""

    def gathered(value: Any, parameter: Any) -> Any:
        if not is_sharded(value):
            return value
        found = whole(value)
        return found.cpu() if ranks.is_writer() else None

    return _with_moments(optimizer.state_dict(), optimizer, gathered)


def sharded_state(state: StateDict, optimizer: Optimizer) -> StateDict:
    """The inverse of ``whole_state``: the moments of sharded parameters become shards."""
    from torch.distributed.tensor import DTensor

    def shards(value: Any, like: Any) -> Any:
        if not is_sharded(like) or not isinstance(value, Tensor) or value.shape != like.shape:
            return value
        rows = own_rows(value, like)
        return DTensor.from_local(
            rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
        )

    return _with_moments(state, optimizer, shards)


def _with_moments(state: StateDict, optimizer: Optimizer, change: Callable[[Any, Any], Any]) -> StateDict:
    """The state with ``change(value, parameter)`` of each moment."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    # In a file, the numbers of parameters are text.
    numbered = {int(index): moments for index, moments in state["state"].items()}
    changed = {
        index: {name: change(value, parameters[index]) for name, value in moments.items()}
        for index, moments in numbered.items()
    }
    return {**state, "state": changed}


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Replace each gradient by its mean over all processes. For shards, FSDP2 has done this already."""
    import torch.distributed as dist

    replicated = [parameter for parameter in parameters if not is_sharded(parameter)]
    for parameter in replicated:
        if parameter.grad is None:
            # Another process may have routed tokens to this expert.
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in replicated if parameter.grad is not None]
    if not grads:
        return
    flat = torch.cat([grad.flatten().float() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))

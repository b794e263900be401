"""FSDP2 of a prepared model: each process keeps some rows of every weight, which are gathered while a layer runs.

The memory plan traces the same code over fake processes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from rankwise.compat.torch import is_sharded, own_buffers
from rankwise.compat.transformers import decoder_layers
from rankwise.errors import ConfigError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from transformers import PreTrainedModel


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

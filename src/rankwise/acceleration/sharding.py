"""FSDP2 of a prepared model: each process keeps its rows of the weights, and a layer's are whole only while it runs.

The memory plan traces the same over processes that are not there.
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
    """All processes, one beside the other."""
    import torch.distributed as dist

    return dist.device_mesh.init_device_mesh(device_type, (dist.get_world_size(),))


def shard(model: PreTrainedModel, mesh: DeviceMesh, *, trains_all: bool) -> None:
    """Keep this process's rows of every weight that does not train, with ``trains_all`` of every weight.

    Raises ConfigError (RW148) for a model of unknown layers.
    """
    from torch.distributed.fsdp import fully_shard

    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            "RW148", f"--strategy fsdp shards by layer, and {type(model).__name__} does not say which; take ddp."
        )
    for module in model.modules():
        # FSDP2 shards parameters alone.
        if (scales := own_buffers(module).pop("absmax", None)) is not None:
            module.register_parameter("absmax", nn.Parameter(scales, requires_grad=False))

    def is_apart(name: str, parameter: nn.Parameter) -> bool:
        # Vectors stay whole: together they are less than a thousandth of a model.
        return parameter.requires_grad or (parameter.dim() < 2 and not name.endswith(".absmax"))

    apart = {parameter for name, parameter in model.named_parameters() if is_apart(name, parameter)}
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, ignored_params=set() if trains_all else apart)


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the mean over all processes. FSDP2 has done so for shards."""
    import torch.distributed as dist

    grads = [p.grad for p in parameters if p.grad is not None and not is_sharded(p.grad)]
    if not grads:
        return
    flat = torch.cat([grad.flatten().float() for grad in grads])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))

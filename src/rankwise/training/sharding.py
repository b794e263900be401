"""FSDP2 for frozen weights: each process keeps its rows of them, and a layer's are whole only while the layer runs.

A unit is one decoder layer; what lies outside of the layers (embedding, last norm, head) is a unit of its own. Packed
4-bit weights are sharded by row as they are, uint8. Their scales are buffers, 1/64 byte a weight where they are
double-quantized, and replicated. What trains is replicated too: it is small, so that one sum of its gradients ends a
step, and adapters, their optimizer and their checkpoints are those of any other run. The operators see the gathered
weights: FSDP2 gathers into the same tensor each time, so that what a forward pass has saved is whole again in its
backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.compat.torch import begin_sharded
from rankwise.compat.transformers import decoder_layers, leave_unwrapped
from rankwise.errors import ConfigError
from rankwise.training import ranks


def shard(model: Any, device_type: str) -> None:
    """Keep this process's part of every frozen weight. Raises ConfigError (RW148) for a model of unknown layers."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    layers = decoder_layers(model)
    if not layers:
        raise ConfigError(
            "RW148", f"--strategy fsdp shards by layer, and {type(model).__name__} does not say which; take ddp."
        )
    mesh = init_device_mesh(device_type, (ranks.count(),))
    trained = {parameter for parameter in model.parameters() if parameter.requires_grad}
    for module in (*layers, model):
        fully_shard(module, mesh=mesh, ignored_params=trained)
    leave_unwrapped(model)


def is_sharded(model: nn.Module) -> bool:
    if ranks.count() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(model, FSDPModule)


def local(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    if ranks.count() == 1:
        return tensor
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@contextmanager
def roots_gathered(model: Any) -> Iterator[None]:
    """Within this context parts of a sharded model may be called past its own forward, which would gather its root."""
    if not is_sharded(model):
        yield
        return
    begin_sharded(model)
    model.unshard()
    try:
        yield
    finally:
        model.reshard()


@torch.no_grad()
def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Make each gradient the mean over all processes."""
    import torch.distributed as dist

    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([grad.flatten().float() for grad in grads])
    dist.all_reduce(flat)
    flat /= ranks.count()
    for grad, mean in zip(grads, flat.split([grad.numel() for grad in grads]), strict=True):
        grad.copy_(mean.view(grad.shape))

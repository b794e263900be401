"""Gradient checkpointing that does not fragment a CPU's heap.

torch's checkpointing records the graph of a block that will be recomputed. The graph's nodes, hundreds of small
objects, lie between the large tensors that the block frees. For an aligned allocation, glibc needs a few bytes more
than a hole of the same size, so the next block takes new memory: each block enlarges the heap by several times what is
kept. Here a block first runs without a graph. Its output is copied into memory that was allocated before the first
block ran: B L h elements, read and written once for each block.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rankwise.acceleration.replace import Undo, class_forward, replace_forward
from rankwise.compat.torch import Ctx, hooks_around, tree_iter
from rankwise.compat.transformers import checkpointing_by, checkpointing_of, collects_outputs, is_collecting_hook
from rankwise.ops.selection import is_traced

# The supported options of torch's checkpointing.
UNDERSTOOD = {"use_reentrant", "preserve_rng_state"}


class Places:
    """Memory for the outputs of the blocks of one model."""

    def __init__(self, blocks: int) -> None:
        self._blocks = blocks
        self._waiting: dict[int, Tensor] = {}

    def take(self, index: int, hidden: Tensor) -> Tensor:
        """The place for the output of block ``index``, which has its input's shape. Where needed, places for all
        later blocks are made.
        """
        place = self._waiting.pop(index, None)
        if place is not None and (place.shape, place.dtype) == (hidden.shape, hidden.dtype):
            return place
        later = range(index + 1, self._blocks)
        place = torch.empty_like(hidden, requires_grad=False)
        self._waiting = {number: torch.empty_like(hidden, requires_grad=False) for number in later}
        return place


def replace_checkpointing(model: nn.Module, undo: Undo) -> None:
    """Use this module's checkpointing for every block that transformers may checkpoint."""
    stacks: dict[str, list[nn.Module]] = defaultdict(list)
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and "forward" not in module.__dict__:
            stacks[name.rpartition(".")[0]].append(module)
    for blocks in stacks.values():
        places = Places(len(blocks))
        for index, block in enumerate(blocks):
            replace_forward(block, _block_forward, undo, rankwise_place=(places, index))


def _block_forward(self: GradientCheckpointingLayer, *args: Any, **kwargs: Any) -> Any:
    plain = class_forward(self)
    if not _can_run_again(self, args, kwargs):
        return plain(*args, **kwargs)
    # transformers passes the block's function and has already handled caches.
    with checkpointing_by(self, functools.partial(_run, self, checkpointing_of(self))):
        return plain(*args, **kwargs)


def _can_run_again(block: GradientCheckpointingLayer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a block's gradients depend only on its hidden states and own parameters, and no hook sees the block.

    In a container, such as Gemma 3n's ``shared_kv_states``, a block may leave keys and values for later blocks.
    """
    if not (block.gradient_checkpointing and block.training and torch.is_grad_enabled()) or is_traced():
        return False
    if "rankwise_place" not in block.__dict__:
        return False
    if not args or not isinstance(args[0], Tensor) or args[0].device.type != "cpu":
        return False
    torchs = checkpointing_of(block)
    if getattr(torchs, "func", torchs) is not checkpoint or not set(getattr(torchs, "keywords", ())) <= UNDERSTOOD:
        return False
    others = tree_iter((args[1:], kwargs))
    if any(isinstance(other, Tensor) and other.requires_grad for other in others):
        return False
    if any(isinstance(given, MutableMapping) for given in (*args, *kwargs.values())):
        return False
    return not any(_is_watched(module) for module in block.modules() if module is not block)


def _is_watched(module: nn.Module) -> bool:
    """Whether a hook sees the module's call.

    transformers leaves its hooks, which collect outputs, on the modules. Such a hook counts only while outputs are
    collected.
    """
    after_forward, *others = hooks_around(module)
    if any(others):
        return True
    if after_forward and collects_outputs():
        return True
    return not all(map(is_collecting_hook, after_forward.values()))


def _run(block: Any, torchs: Callable[..., Any], function: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    """Called in place of torch's ``checkpoint(function, hidden, *args)``."""
    places, index = block.rankwise_place
    trained = [parameter for parameter in block.parameters() if parameter.requires_grad]
    keeps_rng = getattr(torchs, "keywords", {}).get("preserve_rng_state", True)
    state = _State(keeps_rng)
    place = places.take(index, hidden)
    out = _RunAgain.apply(lambda x: function(x, *args), [place], state, hidden, *trained)
    if out is not None:
        return out
    # The block returns more than one tensor, or one of a different shape.
    del block.__dict__["rankwise_place"]
    with state.restored():
        return torchs(function, hidden, *args)


class _State:
    """The state other than its inputs on which a block's results depend, at the time of its first run."""

    def __init__(self, keeps_rng: bool) -> None:
        self.rng = torch.get_rng_state() if keeps_rng else None
        self.autocast: dict[str, Any] = {
            "enabled": torch.is_autocast_enabled("cpu"),
            "dtype": torch.get_autocast_dtype("cpu"),
            "cache_enabled": torch.is_autocast_cache_enabled(),
        }

    @contextmanager
    def restored(self) -> Iterator[None]:
        with torch.random.fork_rng(devices=[], enabled=self.rng is not None), torch.autocast("cpu", **self.autocast):
            if self.rng is not None:
                torch.set_rng_state(self.rng)
            yield


Block = Callable[[Tensor], Tensor]
# What runs again, in which state, and its trained parameters.
Kept = tuple[Block, _State, tuple[Tensor, ...]]


class _RunAgain(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Ctx[Kept], block: Block, place: list[Tensor], state: _State, hidden: Tensor, *trained: Tensor
    ) -> Tensor | None:
        out = block(hidden)
        if not isinstance(out, Tensor) or (out.shape, out.dtype) != (hidden.shape, hidden.dtype):
            return None
        ctx.kept = block, state, trained
        ctx.save_for_backward(hidden)
        return place.pop().copy_(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Ctx[Kept], grad: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,), (block, state, trained) = ctx.saved_tensors, ctx.kept
        again = hidden.detach().requires_grad_()
        with state.restored(), torch.enable_grad():
            out = block(again)
        grads = torch.autograd.grad(out, (again, *trained), grad, allow_unused=True)
        return None, None, None, *grads

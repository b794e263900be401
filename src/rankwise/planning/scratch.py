"""Memory inside CPU kernels that a trace cannot count, by operation, and memory that they keep between calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import prod

import torch
from torch import Tensor, nn

from rankwise.adapters.dora import Dora
from rankwise.ops.cpu import products
from rankwise.ops.cpu.four_bit import is_kept
from rankwise.ops.selection import native_on_cpu
from rankwise.planning.quick_fakes import Args, Kwargs
from rankwise.quantization.targets import four_bit_modules

Scratch = Callable[[Args, Kwargs], int]


def makes_dense(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` with a 4-bit weight dequantize it first, instead of decoding it in the caches."""
    return not (native_on_cpu() and products.take(dtype))


def dense_weight(args: Args, kwargs: Kwargs) -> int:
    """The bytes N K s of the weight that a 4-bit product dequantizes to its input's dtype, 0 where memory is reused."""
    x, shape = args[0], args[3]
    if not makes_dense(x.dtype):
        return 0
    size = prod(shape) * x.element_size()
    return 0 if is_kept(size) else size


def copy_of(argument: int) -> Scratch:
    """The bytes of gloo's copy: of the result of a gather, or of the gradients that are reduced."""

    def copied_bytes(args: Args, kwargs: Kwargs) -> int:
        return int(args[argument].nbytes)

    return copied_bytes


SCRATCH: dict[str, Scratch] = {
    "c10d::_allgather_base_": copy_of(0),
    "c10d::_reduce_scatter_base_": copy_of(1),
    "rankwise::linear_4bit": dense_weight,
    "rankwise::linear_4bit_input_grad": dense_weight,
}


def lives_in_kept_memory(name: str, result: Tensor) -> bool:
    """Whether an operation's result lies in memory that ``kept_memory`` already counts."""
    return name == "rankwise::dequantize_4bit" and is_kept(result.nbytes)


def kept_memory(model: nn.Module) -> list[Tensor]:
    """Stand-ins for memory that is kept between steps on a CPU and that fake tensors do not have.

    It holds the largest dequantized weight and, for every DoRA layer, copies of A, B, magnitudes and norms. The copies
    show writes that bypass PyTorch's version counter.
    """
    kept = [copy for layer in model.modules() if isinstance(layer, Dora) for copy in _copies(layer)]
    dense = (holder for holder in four_bit_modules(model) if makes_dense(holder.dtype))
    # Stacked experts are dequantized one after the other.
    sizes = [prod(holder.shape[-2:]) * holder.dtype.itemsize for holder in dense]
    largest = max(filter(is_kept, sizes), default=0)
    return [*kept, torch.empty(largest, dtype=torch.uint8)] if largest else kept


def _copies(layer: Dora) -> Iterator[Tensor]:
    yield layer.lora_A.detach().clone()
    yield layer.lora_B.detach().clone()
    for _ in ("magnitude", "norms"):
        yield layer.magnitude.detach().clone()


def kept_norms(model: nn.Module) -> Iterator[Tensor]:
    """The row norms and gains that DoRA layers keep, and on real tensors the copies beside them."""
    for layer in model.modules():
        if isinstance(layer, Dora):
            yield from layer.kept_tensors()

"""What a training step asks of a CUDA card, counted without one: launches, waits, masks, products of the head, bytes.

    python benchmarks/gpu_paper.py [--json]

The step is the one of `rankwise train`: one micro-batch of rows, padded on the right or laid end to end, our loss at
the scored positions, clipping, fused AdamW, one reading of loss and gradient norm. Models and inputs are fake tensors
of a CPU that dispatch as a card's, so nothing is computed and no kernel is timed.

- A launch is one dispatched operator that is neither a view nor an allocation, or one Triton grid. An operator of ours
  that starts several kernels counts with all of them (KERNELS).
- The step counted is the second: gradients do not exist before it, and norms are made anew.
- Launches and bytes of a layer are the difference between models of three and of two layers, forward and backward; the
  optimizer's are left out. Bytes are those of all tensors that the launches read and write, each once a launch.
- A wait is an operator whose result the host needs: a number, or the places of what is not zero.
- A mask is any tensor of at least L x L truths, or of the numbers made from them, L the positions of a row.

Legend: L positions of a row, T tokens of a micro-batch, V vocabulary, M rows of a product.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from stand_in import source_tree

source_tree()

import contenders  # noqa: E402
import gpu_models  # noqa: E402
import torch  # noqa: E402
from gpu_jobs import Job  # noqa: E402
from gpu_models import LLAMA  # noqa: E402
from torch import Tensor  # noqa: E402
from torch._subclasses.fake_tensor import FakeTensorMode  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402

import rankwise as rw  # noqa: E402
from rankwise.acceleration import LossOptions  # noqa: E402
from rankwise.compat.torch import in_backward_pass  # noqa: E402
from rankwise.ops import selection  # noqa: E402
from rankwise.ops.triton import adapter  # noqa: E402
from rankwise.planning.tracker import ReadValues  # noqa: E402

# Four rows of 2,048 tokens of which half are scored, in the 8B shape.
ROWS, LENGTH, SHAPE = 4, 2048, "8B"
FORMS = ("padded", "packed")
# Kernels of our operators that start more than one, forward and backward alike.
KERNELS = {
    "linear_4bit": 2,
    "linear_4bit_input_grad": 2,
    # The kernel, and three sums over rows.
    "cross_entropy_": 4,
    # One pass over dy, and the sums of its shares.
    "low_rank_grads_": 2,
    # The mixed term and A A^T, which 4 bits have a product of its own for; the gain.
    "adapted_gain": 2,
    "adapted_gain_4bit": 3,
}
SCRATCH = ("linear_4bit", "linear_4bit_input_grad")
# Operators that compute nothing although their schema shows no alias.
FREE = (
    "prim.",
    "empty",
    "empty_like",
    "new_empty",
    "_unsafe_view",
    "detach",
    "alias",
    "lift_fresh",
    "_local_scalar_dense",
)
WAITS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "_unique2")
PRODUCTS = ("mm", "addmm", "addmm_", "bmm", "linear_4bit")


class Counts(TorchDispatchMode):
    """Counts what is dispatched inside."""

    def __init__(self, length: int, vocabulary: int) -> None:
        super().__init__()
        self.answers = ReadValues()
        self.length, self.vocabulary = length, vocabulary
        self.launches: Counter[str] = Counter()
        # Of these, those of the forward pass.
        self.forward_launches = 0
        self.bytes = 0
        self.waits: Counter[str] = Counter()
        self.masks = 0
        # M of every product with the output head.
        self.head_products: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        result = self.answers(func, args, given)
        if result is NotImplemented:
            result = func(*args, **given)
        name = func.name().partition("::")[2].partition(".")[0]
        read, made = list(tensors_in((args, given))), list(tensors_in(result))
        self.waits[name] += name in WAITS
        self.masks += any(self._is_mask(tensor) for tensor in made)
        if name in PRODUCTS and any(self.vocabulary in tensor.shape for tensor in read):
            self.head_products.append(rows_of(read, made))
        if is_launch(func, name):
            self.launches[name] += KERNELS.get(name, 1)
            self.forward_launches += 0 if in_backward_pass() else KERNELS.get(name, 1)
            self.bytes += sum(tensor.nbytes for tensor in {id(x): x for x in [*read, *made]}.values())
            if name in SCRATCH:
                # The dense weight, written by one kernel and read by the next.
                self.bytes += 2 * read[0].shape[-1] * made[0].shape[-1] * made[0].element_size()
            if name == "low_rank_grads_":
                # Beside dU, dy, U and B there is more where there is a gain.
                self.bytes += shares_bytes(read[1], read[0].shape[1], gained=len(read) > 4)
        return result

    def _is_mask(self, tensor: Tensor) -> bool:
        return tensor.dim() >= 2 and tensor.shape[-1] == tensor.shape[-2] >= self.length and tensor.dim() != 2


def tensors_in(value: Any) -> Any:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)


def rows_of(read: list[Tensor], made: list[Tensor]) -> int:
    """M of a product whose weight is the head's."""
    return (made or read)[0].shape[0]


def shares_bytes(dy: Tensor, R: int, *, gained: bool) -> int:
    """What the programs over dy write and the second kernel reads: shares of dU and dB in float32."""
    T, N = dy.shape
    blocks, run = adapter.grid(T, N, gained=gained)
    return 2 * 4 * R * (blocks * T + -(-T // run) * N)


def is_launch(func: Any, name: str) -> bool:
    """Whether a card would start a kernel for the operator."""
    if func.namespace == "prim" or name in FREE:
        return False
    # A view gives what it was given under another shape: an alias that it does not write to.
    return not any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


def llama(layers: int, method: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(**{**LLAMA[SHAPE], "num_hidden_layers": layers}, max_position_embeddings=LENGTH)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if contenders.is_four_bit(method):
        rw.quantize(model, rw.Nf4Config(double_quant=True))
    options = {"r": contenders.R, "lora_alpha": contenders.ALPHA, "target_modules": contenders.ALL_LINEAR}
    rw.add_adapter(model, rw.LoraConfig(**options, use_dora=contenders.is_dora(method)))
    model.train()
    rw.optimize_for_training(model)
    return model


def micro_batch(model: Any, form: str) -> Tensor:
    """Forward and backward as the trainer makes them; gives the loss."""
    batch = gpu_models.batch_of(Job("model", f"Llama {SHAPE}", form=form, batch=ROWS, length=LENGTH, device="cpu"))
    scored = torch.zeros(ROWS * LENGTH // 2, dtype=torch.long)
    options = LossOptions(want_stats=True, scored=scored)
    out = model(**batch, use_cache=False, num_items_in_batch=ROWS * LENGTH, loss_options=options)
    out.loss.backward()
    return out.loss.detach()


def counted(method: str, form: str, layers: int, *, whole: bool) -> Counts:
    """Of the second step of a model of so many layers: the forward and backward pass, or the whole step."""
    counts = Counts(LENGTH, LLAMA[SHAPE]["vocab_size"])
    with FakeTensorMode(allow_non_fake_inputs=True), selection.fakes_as("cuda"), Quiet():
        model = llama(layers, method)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], fused=True)
        gpu_models.optimizer_step(model, optimizer, [micro_batch(model, form)])
        with counts:
            losses = [micro_batch(model, form)]
            if whole:
                gpu_models.optimizer_step(model, optimizer, losses)
    return counts


class Quiet(TorchDispatchMode):
    """Answers what asks for values outside of what is counted."""

    answers = ReadValues()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = self.answers(func, args, kwargs or {})
        return func(*args, **(kwargs or {})) if result is NotImplemented else result


@dataclasses.dataclass(frozen=True)
class Row:
    method: str
    form: str
    launches_per_layer: int
    # Of these, those of the forward pass.
    forward_launches_per_layer: int
    host_syncs_per_step: int
    masked_attention_ops: int
    # M of each product with the output head.
    head_products: list[int]
    bytes_per_layer: int
    # {operator: launches a layer}
    operators: dict[str, int]


def row(method: str, form: str) -> Row:
    less, more = (counted(method, form, layers, whole=False) for layers in (2, 3))
    step = counted(method, form, 2, whole=True)
    return Row(
        method,
        form,
        launches_per_layer=more.launches.total() - less.launches.total(),
        forward_launches_per_layer=more.forward_launches - less.forward_launches,
        host_syncs_per_step=step.waits.total(),
        masked_attention_ops=step.masks,
        head_products=step.head_products,
        bytes_per_layer=more.bytes - less.bytes,
        operators=dict((more.launches - less.launches).most_common()),
    )


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| method | rows | launches a layer, forward + backward | waits a step | L x L masks "
        "| products with the head (M) | GB a layer |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(line, rows)])


def line(one: Row) -> str:
    products = ", ".join(f"{M:,}" for M in one.head_products)
    forward = one.forward_launches_per_layer
    return (
        f"| {one.method} | {one.form} | {forward} + {one.launches_per_layer - forward} = {one.launches_per_layer} "
        f"| {one.host_syncs_per_step} | {one.masked_attention_ops} | {products} | {one.bytes_per_layer / 1e9:.2f} |"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--methods", default=",".join(contenders.METHODS))
    given = parser.parse_args(arguments)
    contenders.silence()
    rows = [row(method, form) for method in given.methods.split(",") for form in FORMS]
    print(json.dumps([dataclasses.asdict(one) for one in rows], indent=1) if given.json else table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether a run's frozen products are in 8 bits: measured on its own model and first rows, before the first step.

Of n = 4 micro-batches i, the gradient of each trained tensor is computed in the base's dtype, g_i, and with 8-bit
products, q_i:

    error^2 = mean_i |q_i - g_i|^2        spread^2 = sum_i |g_i - mean g|^2 / (n - 1)        rho = error / spread

An update sums gradients of different rows, which differ by the spread; errors of 8 bits differ from row to row as well,
so they average out as the rows' own noise does, of which they add rho^2. What errs in the same direction in every row
does not, and is not measured: a longer run would pay for it, so its last steps compute in the base's dtype. The measure
is the root mean square of rho over the tensors. At B = 0, where adapters start, the gradient of A is zero, so B is
drawn first.

A layer whose own output errs too much, for the same input, keeps the base's dtype whatever the gradient says. So does
the head if its logits in 8 bits alone change the first micro-batch's gradient too much.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import SGD
from transformers import PreTrainedModel

from rankwise.acceleration import Head, give_back_freed_memory, head_in_eight_bits
from rankwise.acceleration.parts import adapted_layers
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import LowRankPair
from rankwise.compat.system import cache_folder
from rankwise.constants import EXACT_PART, LONG_RUN
from rankwise.foreign import checked
from rankwise.ops.eight_bit import EightBit, error_of_rows
from rankwise.ops.low_rank_linear import low_rank_linear
from rankwise.quantization.experts import StackEightBit, errors_in_eight_bits, stacks_in_eight_bits
from rankwise.records import keep_json, kept_json
from rankwise.reports.numbers import plural
from rankwise.training import ranks
from rankwise.training.batches import KEY, Batch
from rankwise.training.states import undisturbed_random_states
from rankwise.training.step import Objective, Prepared, Products, TrainingStep, targets_of

MICRO_BATCHES = 4
# Runs of 60 steps that ended within 1 % of those in bfloat16 have a rho of 0.19 to 0.41, and those that ended 1 to 8 %
# higher have more than 1 (benchmarks/results/eight_bits.md).
LARGEST_ERROR = 0.5
# The largest error of a layer's output: the median over tokens of its norm beside the output's; of the head, that of
# the gradient.
LARGEST_OUTPUT_ERROR = 0.1
# The largest share of a run's time that the measurement takes; the steps of its rows that it takes as long as (two
# gradients of each micro-batch, and of the first one a third and its layers twice); and the tokens that take as long as
# what a pass does for its weights alone (demo and Qwen 0.5B).
LARGEST_SHARE, STEPS, FIXED_TOKENS = 0.03, 11, 128
# The standard deviation of the drawn B: so small that the model stays as it is. Errors of A's gradient are proportional
# to it, as the gradient is.
DRAWN = 1e-6


@dataclasses.dataclass(frozen=True, kw_only=True)
class Measured:
    """What was measured, for the run's record."""

    # rho, with 8 bits in all layers but those ``left``; None where no gradient has a finite spread.
    gradient_error: float | None
    # Mean of |loss with 8 bits - loss|.
    loss_error: float
    # The paths of the layers that keep the base's dtype.
    left: list[str]
    layers: int
    # Rows of each micro-batch.
    rows: int
    seconds: float

    @property
    def products(self) -> Products:
        is_small = self.gradient_error is not None and self.gradient_error <= LARGEST_ERROR
        return "int8" if is_small and len(self.left) < self.layers else "bfloat16"

    def __str__(self) -> str:
        if len(self.left) == self.layers:
            return f"the outputs of all layers would err by more than {LARGEST_OUTPUT_ERROR:.0%}"
        if self.gradient_error is None:
            return "the gradients of the first rows do not differ, so there is nothing to measure 8 bits by"
        relation = "at most" if self.products == "int8" else "more than"
        words = (
            f"the gradient errs by {self.gradient_error:.2f} of its spread between micro-batches, {relation} "
            f"{LARGEST_ERROR}"
        )
        if self.left and self.products == "int8":
            words += (
                f"; {len(self.left)} of {plural(self.layers, 'layer')} keep the base's dtype, as their outputs err by "
                f"more than {LARGEST_OUTPUT_ERROR:.0%}"
            )
        return words


def pairs_in_eight_bits(model: nn.Module) -> dict[str, tuple[AdaptedLayer, LowRankPair]]:
    """{path: (layer, adapter)} of the layers whose products are in 8 bits."""
    return {
        path: (layer, pair)
        for path, layer in adapted_layers(model)
        if isinstance(pair := layer.at_work, LowRankPair) and pair.eight_bit is not None
    }


Holder = LowRankPair | StackEightBit | Head


def _in_eight_bits(model: nn.Module) -> dict[str, Holder]:
    """{path: what holds the scales} of layers, stacks of experts and the head whose products are in 8 bits."""
    head = head_in_eight_bits(model)
    found: dict[str, Holder] = {path: pair for path, (_, pair) in pairs_in_eight_bits(model).items()}
    found |= stacks_in_eight_bits(model)
    return found if head is None else found | dict([head])


def affordable_rows(rows: int, tokens: float, micro_batches: int) -> int:
    """The rows of each measured micro-batch, at most ``rows``, for a run of so many micro-batches of ``rows`` with so
    many ``tokens`` each; 0 where not even one is worth it."""
    affordable = LARGEST_SHARE * micro_batches * (FIXED_TOKENS + rows * tokens) / STEPS - FIXED_TOKENS
    return max(0, min(rows, int(affordable / tokens)))


def judge(
    model: PreTrainedModel, objective: Objective, autocast: torch.dtype | None, rows: int, kept: Path
) -> Measured | None:
    """What 8 bits do to the gradients of the first ``rows`` of each of the first micro-batches; None where it is
    neither known nor affordable, since ``rows`` or the data's are too few.

    ``kept`` is the file in which the result is kept. The model, whose products are in 8 bits, and the random state stay
    as they are. Several processes measure the same rows and take the result of the first.
    """
    known = ranks.gathered(_read(kept))[0]
    if known is not None and known.layers == len(_in_eight_bits(model)):
        return known
    order = list(itertools.chain.from_iterable(objective.order(0)))
    if (rows := min(rows, len(order) // MICRO_BATCHES)) == 0:
        return None
    parts = [order[start : start + rows] for start in range(0, MICRO_BATCHES * rows, rows)]
    batches = [objective.collate([objective.rows[place] for place in part]) for part in parts]
    with undisturbed_random_states(), drawn_B(model):
        found = ranks.gathered(measure(model, objective, batches, autocast))[0]
    # Its rows are not those of the steps, which could not reuse what they leave.
    give_back_freed_memory()
    if ranks.is_writer():
        # Where it cannot be kept, the next run measures again.
        keep_json(kept, dataclasses.asdict(found))
    return found


def _read(kept: Path) -> Measured | None:
    try:
        return checked(Measured, kept_json(kept))
    except ValueError:
        return None


def kept_file(*inputs: object) -> Path:
    """Where the measurement with these ``inputs``, as JSON, is kept."""
    key = hashlib.sha256(json.dumps(inputs, sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / "products" / f"{key[:32]}.json"


def taken(prepared: Prepared, model: nn.Module, products: Products, left: Sequence[str]) -> Prepared:
    """The prepared model with the products that are taken; the layers ``left`` keep the base's dtype."""
    holders = _in_eight_bits(model)
    for path in holders if products == "bfloat16" else left:
        holders[path].eight_bit = None
    count = len(_in_eight_bits(model))
    accelerated = prepared.accelerated and dataclasses.replace(prepared.accelerated, eight_bit=count)
    computing = dataclasses.replace(prepared.computing, products=products)
    return dataclasses.replace(prepared, accelerated=accelerated, computing=computing)


def eight_bit_steps(total: int, beta: float) -> int | None:
    """The steps of a run of ``total`` that compute in 8 bits, the first; None: all. A reference (``beta`` > 0) is
    compared with what the same products make of the same rows, in every step."""
    if beta or total < LONG_RUN:
        return None
    return total - math.ceil(EXACT_PART * total)


def end_eight_bits(model: nn.Module) -> None:
    """Compute in the base's dtype from now on."""
    for holder in _in_eight_bits(model).values():
        holder.eight_bit = None


@contextlib.contextmanager
def drawn_B(model: nn.Module) -> Iterator[None]:
    """A context in which no B is zero."""
    pairs = [pair for _, layer in adapted_layers(model) if isinstance(pair := layer.at_work, LowRankPair)]
    new = [pair.lora_B for pair in pairs if not pair.lora_B.detach().any()]
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for B in new:
            B.copy_(torch.randn(B.shape, generator=generator) * DRAWN)
    try:
        yield
    finally:
        with torch.no_grad():
            for B in new:
                B.zero_()


def measure(
    model: PreTrainedModel, objective: Objective, batches: Sequence[Batch], autocast: torch.dtype | None
) -> Measured:
    """Measure on these micro-batches, from `Objective.collate`, with the same dropout in both passes."""
    started = time.monotonic()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # It only holds the parameters, and takes no step.
    idle = SGD(trained)
    step = TrainingStep(
        model=model, objective=objective, optimizer=idle, trained=trained, autocast=autocast, max_grad_norm=0.0
    )
    holders, head = _in_eight_bits(model), head_in_eight_bits(model)
    kept = {path: holder.eight_bit for path, holder in holders.items()}

    def gradients(batch: Batch, eight_bits: dict[str, EightBit | None]) -> tuple[float, list[Tensor | None]]:
        for path, holder in holders.items():
            holder.eight_bit = eight_bits.get(path)
        torch.manual_seed(0)
        model.zero_grad()
        (ready,) = step.prepared([batch], 0)
        done, norm = step.gradients([ready], targets_of([batch]) / ranks.count())
        done.read(norm)
        return done.loss, [parameter.grad for parameter in trained]

    outputs: dict[str, float] = {}
    sums, losses = [_Sums() for _ in trained], []
    try:
        for batch in batches:
            with contextlib.nullcontext() if outputs else _watched(model, kept, outputs):
                exact, exact_gradients = gradients(batch, {})
            if head is not None and (path := head[0]) not in outputs:
                outputs[path] = _difference(gradients(batch, {path: kept[path]})[1], exact_gradients)
            allowed = {path: kept[path] for path, error in outputs.items() if error <= LARGEST_OUTPUT_ERROR}
            rounded, rounded_gradients = gradients(batch, allowed)
            losses.append(abs(rounded - exact))
            for one, g, q in zip(sums, exact_gradients, rounded_gradients):
                one.add(g, q)
    finally:
        model.zero_grad()
        for path, holder in holders.items():
            holder.eight_bit = kept[path]
    squares = [square for one in sums if (square := one.squared_rho(len(batches))) is not None]
    rho = math.sqrt(math.fsum(squares) / len(squares)) if squares else math.nan
    return Measured(
        gradient_error=rho if math.isfinite(rho) else None,
        loss_error=sum(losses) / len(losses),
        left=[path for path in holders if path not in allowed],
        layers=len(holders),
        rows=batches[0][KEY].examples,
        seconds=round(time.monotonic() - started, 3),
    )


def _difference(found: Sequence[Tensor | None], exact: Sequence[Tensor | None]) -> float:
    """The norm of the differences beside that of the exact gradients."""
    pairs = [(q, g) for q, g in zip(found, exact) if q is not None and g is not None]
    squares = math.fsum(float(g.double().square().sum()) for _, g in pairs)
    errors = math.fsum(float((q - g).double().square().sum()) for q, g in pairs)
    return math.sqrt(errors / squares) if squares else math.inf


class _Sums:
    """Of one tensor: the sum of its gradients, of their squares, and of the squares of their errors."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.squares = self.errors = 0.0

    def add(self, g: Tensor | None, q: Tensor | None) -> None:
        if g is None or q is None:
            return
        self.total = g.clone() if self.total is None else self.total.add_(g)
        self.squares += float(g.double().square().sum())
        self.errors += float((q - g).double().square().sum())

    def squared_rho(self, count: int) -> float | None:
        """rho^2; None for a tensor whose gradients do not differ."""
        if self.total is None:
            return None
        spread = (self.squares - float(self.total.double().square().sum()) / count) / (count - 1)
        return self.errors / count / spread if spread > 0 else None


@contextlib.contextmanager
def _watched(model: nn.Module, kept: dict[str, EightBit | None], outputs: dict[str, float]) -> Iterator[None]:
    """A context that gives ``outputs`` the error of each layer's output in 8 bits, for the input of its first call."""

    def compare(path: str, layer: AdaptedLayer, pair: LowRankPair, x: Tensor) -> None:
        if path in outputs:
            return
        x, products = x.detach(), []
        with torch.no_grad():
            # The base alone: the adapter's part has no 8 bits.
            pair.as_reference = "base"
            for pair.eight_bit in (None, kept[path]):
                branch = pair.branch(layer.base_layer, x)
                assert branch is not None, "its products are in 8 bits"
                products.append(low_rank_linear(x, (branch,), None)[0].float().flatten(0, -2))
            pair.as_reference = pair.eight_bit = None
        outputs[path] = error_of_rows(products[1], products[0])

    def compare_experts(stacks: dict[str, StackEightBit], base: nn.Module, x: Tensor, chosen: Tensor) -> None:
        if stacks.keys() <= outputs.keys():
            return
        for path, stack in stacks.items():
            stack.eight_bit = kept[path]
        errors = errors_in_eight_bits(base, x.detach(), chosen)
        for path, stack in stacks.items():
            outputs[path], stack.eight_bit = errors.get(path.rpartition(".")[2], math.inf), None

    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, path=path, layer=layer, pair=pair: compare(path, layer, pair, *args)
        )
        for path, (layer, pair) in pairs_in_eight_bits(model).items()
    ]
    of_modules: dict[nn.Module, dict[str, StackEightBit]] = {}
    for path, stack in stacks_in_eight_bits(model).items():
        of_modules.setdefault(stack.experts, {})[path] = stack
    hooks += [
        base.register_forward_pre_hook(
            lambda _, args, base=base, stacks=stacks: compare_experts(stacks, base, *args[:2])
        )
        for base, stacks in of_modules.items()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

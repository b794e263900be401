"""One optimizer step, and how a model is made for it.

    theta <- theta - optimizer(clip(grad))        grad = sum over micro-batches and processes of d loss_sum / targets

A run, its search of rates, the memory plan's trace and its check on real tensors call the same functions. What is
learned is an ``Objective``: it lays out rows, and gives the sum of a micro-batch's losses and their number.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal, Protocol

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.optimizer import Optimizer
from transformers import PreTrainedModel

from rankwise.acceleration import (
    Acceleration,
    calibrate_products,
    flattening_obstacle,
    offloaded,
    optimize_for_training,
)
from rankwise.acceleration.layouts import Layout
from rankwise.acceleration.log_probs import sharing_obstacle
from rankwise.acceleration.parts import adapted_layers
from rankwise.adapters import add_adapter, plan_adapter
from rankwise.adapters.inject import attach
from rankwise.adapters.lora import LowRankPair
from rankwise.adapters.state import DEFAULT_NAME
from rankwise.config import Shares, StepOptions
from rankwise.conflicts import takes_eight_bit
from rankwise.errors import ConfigError
from rankwise.lora_config import LoraConfig
from rankwise.methods import add_by, method_of
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.ops.branch import eight_bit_pays
from rankwise.quantization.targets import four_bit_modules
from rankwise.training import ranks
from rankwise.training.batches import KEY, Batch, Figures, MicroBatch, Row, on_device
from rankwise.training.watch import StepSums
from rankwise.training.weights import average_gradients, gathered_for_tests

Products = Literal["bfloat16", "int8"]
TO_BE_MEASURED = "to be measured"


# --- the model ---


def mixed_precision(method: str, dtype: torch.dtype, device_type: str) -> tuple[torch.dtype, torch.dtype | None]:
    """The dtypes of the model's weights and of mixed precision.

    An adapter trains in float32 over a base in ``dtype``. A full fine-tuning keeps float32 weights, since small
    updates would vanish in 16 bits, and computes in ``dtype``. float16 needs loss scaling: ConfigError (RW113) on a
    device without it.
    """
    trains_all = method_of(method).trains_all
    if dtype == torch.float16:
        if device_type == "cpu":
            raise ConfigError(
                "RW113", "--dtype float16 needs loss scaling, which CPUs do not have; use bfloat16 or float32."
            )
        return (torch.float32 if trains_all else dtype), dtype
    if trains_all and dtype == torch.bfloat16:
        return torch.float32, dtype
    return dtype, None


def make_trainable(model: PreTrainedModel, method: str, config: LoraConfig, *, is_resumed: bool = False) -> int:
    """Give the model the method's adapter, or for ``full`` unfreeze it. Returns the number of trained parameters.

    A resumed run does not compute LoftQ's decomposition, which its checkpoint overwrites.
    """
    row = method_of(method)
    if row.trains_all:
        if any(four_bit_modules(model)):
            raise ConfigError(
                "RW112",
                f"--method {method} trains the base whole, and its files hold packed weights; give the original, "
                "or take lora.",
            )
        model.requires_grad_(True)
        return sum(parameter.numel() for parameter in model.parameters())
    if row.is_guest:
        return add_by(method, model, config.r)
    if is_resumed and config.init.kind == "loftq":
        return attach(model, config, plan_adapter(model, config), DEFAULT_NAME).trainable_parameters
    return add_adapter(model, config).trainable_parameters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Computing:
    """How a step computes: the options that change its operators, and with them its memory and time."""

    fast: bool
    products: Products
    packing: bool
    gradient_checkpointing: bool
    activation_offloading: bool
    neftune_noise_alpha: float | None
    share_prompts: Shares = "auto"


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A model that is ready to train."""

    # None where nothing may be replaced.
    accelerated: Acceleration | None
    # Why rows are padded to one length; None where they are laid end to end.
    padded: str | None
    computing: Computing
    # Why the common beginnings of rows are laid in each row; None where they are laid once.
    apart: str | None = None

    @property
    def layout(self) -> Layout:
        return "padded" if self.padded and not self.computing.packing else "flat" if self.apart else "shared"


def choose(
    options: StepOptions, method: str, objective: ObjectiveName, strategy: str | None, model: nn.Module
) -> tuple[Products, str]:
    """What ``--products`` stands for on this model and device, and why. Of ``auto``, 8 bits are still to be admitted
    by a measurement (products.py)."""
    if options.products == "bfloat16":
        return "bfloat16", "as asked"
    if not takes_eight_bit(method, objective, strategy, options):
        return "bfloat16", "8 bits are for an adapter, fused operators and whole weights"
    if options.products == "int8":
        return "int8", "as asked"
    if OBJECTIVES[objective].of_rewards:
        return (
            "bfloat16",
            "8 bits cannot be measured before answers are written; --products int8 takes them",
        )
    parameter = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    if not eight_bit_pays(parameter):
        return "bfloat16", "8 bits are not known to be 1.2 times as fast here"
    return "int8", TO_BE_MEASURED


def prepare_model(
    model: PreTrainedModel,
    method: str,
    objective: ObjectiveName,
    computing: Computing,
    calibration: Callable[[], Tensor],
) -> Prepared:
    """Replace parts of the model, which has its adapter, by faster ones, and choose the layout of rows.

    ``calibration``: token ids (1, L) that give 8-bit products their scales. Raises ConfigError (RW112) for packing
    where rows would see each other.
    """
    accelerated = None
    if computing.fast and not method_of(method).is_guest:
        with gathered_for_tests(model):
            accelerated = optimize_for_training(model, products=computing.products)
        if computing.products == "int8" and (left := calibrate_products(model, calibration())):
            why = f"{left} layers stay in bfloat16: no token of the first rows reaches them"
            accelerated = dataclasses.replace(
                accelerated,
                eight_bit=accelerated.eight_bit - left,
                left_alone=(*accelerated.left_alone, why),
            )
    padded = why_padded(model, objective, computing, accelerated)
    if computing.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if OBJECTIVES[objective].of_labels:
        # No keys and values are kept for a next token.
        model.config.use_cache = False
    apart = why_apart(model, objective, computing, padded)
    return Prepared(accelerated, padded, computing, apart)


def why_padded(
    model: PreTrainedModel, objective: ObjectiveName, computing: Computing, accelerated: Acceleration | None
) -> str | None:
    """Why rows are padded to one length, or None if they are concatenated. Raises ConfigError (RW112) for packing."""
    if computing.packing:
        if obstacle := flattening_obstacle(model):
            raise ConfigError("RW112", f"--packing would let rows see each other: {obstacle}; leave it out.")
        return "packing fills rows to one length"
    if OBJECTIVES[objective].of_labels:
        return "a head of labels reads the last token of each row"
    if computing.neftune_noise_alpha is not None:
        return "NEFTune's noise depends on a row's length"
    # Over concatenated rows, attention is quadratic in their sum unless the kernel skips masked blocks, as ours does.
    if accelerated is None or not accelerated.attention:
        return "the attention in use does not skip masked blocks"
    return flattening_obstacle(model)


def why_apart(model: PreTrainedModel, objective: ObjectiveName, computing: Computing, padded: str | None) -> str | None:
    """Why the common beginnings of rows are laid in each row, or None if once. Raises ConfigError (RW112) where it was
    asked otherwise."""
    if computing.share_prompts == "off":
        return "--share-prompts off"
    why = padded or sharing_obstacle(model)
    if why is not None and computing.share_prompts == "on":
        raise ConfigError("RW112", f"--share-prompts on cannot lay beginnings once: {why}; leave it out.")
    adapters = [pair.dropout for _, layer in adapted_layers(model) if isinstance(pair := layer.at_work, LowRankPair)]
    # Preferences and rewards train without the base's own.
    bases = [module.p for module in model.modules() if isinstance(module, nn.Dropout)]
    drops = any(adapters) or (OBJECTIVES[objective].of_demonstrations and any(bases))
    if why is None and drops and computing.share_prompts == "auto":
        return "dropout draws a mask for each row; --share-prompts on draws one for all"
    return why


@contextlib.contextmanager
def around_step(
    model: Any, computing: Computing, apart: Callable[[], AbstractContextManager[None]] = nullcontext
) -> Iterator[None]:
    """NEFTune's noise on the embeddings (Jain et al. 2023, arXiv 2310.05914), and activations in CPU memory, which are
    made within ``apart()``.

    noise ~ U(-a, a),  a = alpha / sqrt(length x width)
    """
    alpha = computing.neftune_noise_alpha

    def noisy(module: nn.Module, _: object, output: Tensor) -> Tensor:
        if not module.training or alpha is None:
            return output
        bound = float(np.float32(1) / np.sqrt(np.float32(output.size(1) * output.size(2))) * np.float32(alpha))
        return output + torch.zeros_like(output).uniform_(-bound, bound)

    with contextlib.ExitStack() as stack:
        if alpha is not None:
            stack.callback(model.get_input_embeddings().register_forward_hook(noisy).remove)
        if computing.activation_offloading:
            stack.enter_context(offloaded(model, apart))
        yield


# --- the step ---


@dataclasses.dataclass(frozen=True)
class Loss:
    """The loss of one micro-batch."""

    # The sum over the micro-batch's targets.
    sum: Tensor
    # The balancing loss of experts times its coefficient: a mean over micro-batches, not over targets.
    aux: Tensor | None = None
    # {name in metrics.jsonl: (sum, weight)}.
    figures: Figures = dataclasses.field(default_factory=dict)


class Objective(Protocol):
    """What is learned."""

    rows: Dataset
    eval_rows: Dataset | None

    @property
    def shown(self) -> Mapping[str, str]:
        """{name in metrics.jsonl: words} of the figures to show at each step."""

    @property
    def silence_is_normal(self) -> bool:
        """Whether all gradients of a step may be zero."""

    @property
    def in_words(self) -> str:
        """How the loss is computed, for the record."""

    def order(self, epoch: int) -> list[list[int]]:
        """The row numbers of each micro-batch of an epoch, of all processes together."""

    def collate(self, rows: Sequence[Row]) -> Batch:
        """A micro-batch on the host, with its ``Counted``."""

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        """The micro-batches of one optimizer step, on the device, before any of them runs. ``step`` were taken."""

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss: ...

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """The evaluation's figures by their names in metrics.jsonl, ``eval_loss`` first. Calls ``pause`` between
        batches, which raises ``EvaluationStopped`` if the user has asked to stop."""

    def largest_batch(self, batches: Iterable[list[int]]) -> MicroBatch:
        """The largest of these micro-batches of row numbers, for the memory plan."""

    def largest_evaluation(self) -> MicroBatch | None:
        """The largest batch that is computed without gradients; None if there is none."""


@dataclasses.dataclass(kw_only=True)
class TrainingStep:
    """Takes optimizer steps: ``prepared``, ``gradients``, ``update``, with a look at the loss before the last."""

    model: PreTrainedModel
    objective: Objective
    optimizer: Optimizer
    # The parameters that train.
    trained: Sequence[nn.Parameter]
    # The dtype of mixed precision; None if everything computes in the dtype of the weights.
    autocast: torch.dtype | None = None
    # 0: no clipping.
    max_grad_norm: float = 1.0
    # Those that share a step.
    processes: int = 1
    # Makes a context for each step, such as one that offloads activations.
    around: Callable[[], AbstractContextManager[Any]] = nullcontext
    # Called when a part of the step begins: forward, backward, optimizer.
    enter: Callable[[str], None] = lambda part: None

    def __post_init__(self) -> None:
        # float16 has too few exponents for small gradients.
        self.scaler = torch.amp.GradScaler(self.model.device.type, enabled=self.autocast == torch.float16)

    def prepared(self, batches: Sequence[Batch], taken: int) -> list[Batch]:
        """The micro-batches on the device, after ``taken`` steps; with rewards, their answers are written."""
        self.model.train()
        with mixed(self.model, self.autocast):
            return self.objective.prepare([on_device(batch, self.model.device) for batch in batches], taken)

    def gradients(self, batches: Sequence[Batch], targets: float) -> tuple[StepSums, Tensor]:
        """Add up the gradients of the micro-batches, with ``targets`` of all processes, and clip them. Returns the
        losses and figures, which are not read yet, and the norm of the gradients."""
        model, step = self.model, StepSums()
        with self.around():
            for batch in batches:
                self.enter("forward")
                with mixed(self.model, self.autocast):
                    found = self.objective.loss(model, batch)
                loss = found.sum / max(targets, 1)
                if self.processes > 1:
                    # The mean over processes becomes the sum; a process without rows adds nothing.
                    loss = loss * (self.processes if batch[KEY].targets else 0)
                if found.aux is not None:
                    loss = loss + found.aux / len(batches)
                self.enter("backward")
                self.scaler.scale(loss).backward()
                step.add(loss.detach(), batch[KEY], found.figures)
                # The graph's nodes lie between activations, in whose place the next step's are to come.
                del loss, found
        self.enter("optimizer")
        if self.processes > 1:
            average_gradients(self.trained)
        self.scaler.unscale_(self.optimizer)
        norm = get_total_norm([parameter.grad for parameter in self.trained if parameter.grad is not None])
        if self.max_grad_norm:
            clip_grads_with_norm_(self.trained, self.max_grad_norm, norm)
        return step, norm

    def update(self) -> None:
        """Move the parameters along their gradients, which are gone then."""
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.model.zero_grad()


def mixed(model: PreTrainedModel, dtype: torch.dtype | None) -> torch.autocast:
    """Mixed precision in ``dtype``; None: all computes in the dtype of the weights."""
    return torch.autocast(model.device.type, dtype, enabled=dtype is not None)


def targets_of(batches: Iterable[Batch]) -> float:
    """The targets of the micro-batches of all processes."""
    (targets,) = ranks.summed([math.fsum(batch[KEY].targets for batch in batches)])
    return targets

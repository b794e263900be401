"""A training step on fake tensors: the real model runs its real step, and every storage is counted.

It needs neither weights nor a GPU. The trace runs on the CPU, since a CPU build of torch aborts at a fake CUDA product;
``planning.hardware`` has what a GPU takes besides.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from math import prod
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.adapters import adapter_parameters, has_adapter
from rankwise.adapters.base_layer import is_linear
from rankwise.adapters.lora import Dora
from rankwise.adapters.select import matches
from rankwise.compat.torch import FakeTensorMode, fake_processes, shards_seen
from rankwise.compat.transformers import choose_experts, fake_masks_looked_at
from rankwise.errors import ModelError, RankwiseError
from rankwise.methods import method_of
from rankwise.objectives import OBJECTIVES
from rankwise.ops import selection
from rankwise.ops.cpu import products
from rankwise.ops.cpu.four_bit import is_kept
from rankwise.ops.rounded import copies_of
from rankwise.planning.hardware import in_blocks
from rankwise.planning.step import (
    UNCOUNTED,
    batch_of,
    begin_gradients,
    changed,
    dtypes,
    evaluate,
    made,
    make_state,
    materialize,
    new_optimizer,
    objective_of,
    true_counts,
    write_a_token,
)
from rankwise.planning.tracker import Args, Kwargs, Place, StorageTracker, Terms
from rankwise.planning.workload import Workload, state_bytes, uncollected
from rankwise.quantization.experts import four_bit_stacks
from rankwise.quantization.linear import features
from rankwise.quantization.targets import four_bit_layers, four_bit_modules
from rankwise.training.batches import KEY
from rankwise.training.step import TrainingStep, around_step
from rankwise.training.weights import shard


class Traced:
    """A model prepared as a run prepares it, on fake tensors, whose step is traced at any batch and length.

    ``skeleton`` is on the meta device and is consumed. Without ``fake`` the step runs on real tensors of random values,
    for tests. ``layers``: the name of the decoder's list of layers. Raises ModelError: RW327 when the step cannot run
    without values.
    """

    def __init__(
        self,
        skeleton: PreTrainedModel,
        method: str,
        workload: Workload,
        *,
        layers: str | None = None,
        fake: bool = True,
    ) -> None:
        self.model, self.method, self.workload, self.fake = skeleton, method, workload, fake
        # Eager experts read values, which fake tensors do not have.
        if fake:
            choose_experts(skeleton.config, "grouped_mm")
        vocabulary = getattr(skeleton.config.get_text_config(), "vocab_size", None)
        on_card = workload.device_type == "cuda"
        self.tracker = StorageTracker(
            rounding=in_blocks if on_card else int,
            vocabulary=vocabulary,
            scratch={} if on_card else SCRATCH,
            counted_before=lives_in_kept_memory if fake and not on_card else None,
        )
        self._mode: AbstractContextManager[Any] = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
        self._enabled = _enabled_rows(skeleton, workload)
        self._processes = ExitStack()
        sharded = workload.strategy == "fsdp"
        # A mesh looks at values, which fake tensors do not have.
        mesh = self._processes.enter_context(fake_processes(workload.devices)) if sharded else None
        with self._running(workload):
            weights, autocast = dtypes(method, workload)
            materialize(skeleton, weights, fill=not fake)
            prepared = made(skeleton, method, workload)
            self.layout = prepared.layout
            self.weight_bytes = sum(part.nbytes for _, part in shards_of(skeleton))
            self.layer_bytes, self.root_bytes = layer_and_root_bytes(skeleton)
            if mesh is not None:
                shard(skeleton, mesh, trains_all=method_of(method).trains_all)
            kept = kept_memory(skeleton) if fake and not on_card else []
            self.tracker.see_all(kept, "adapters")
            self._kept = kept
            label_model(skeleton, self.tracker)
            self.trained = [parameter for parameter in skeleton.parameters() if parameter.requires_grad]
            optimizer = new_optimizer(workload, skeleton)
            make_state(optimizer)
            self.step = TrainingStep(
                model=skeleton,
                objective=objective_of(skeleton, workload, prepared.layout),
                optimizer=optimizer,
                trained=self.trained,
                autocast=autocast,
                # The sum over the copies of ddp is traced in `_enter`, without other processes.
                processes=workload.devices if sharded else 1,
                around=functools.partial(around_step, skeleton, prepared.computing, apart=self.tracker.elsewhere),
                enter=self._enter,
            )
            # It looks at the values of gradients.
            self.step.scaler = torch.amp.GradScaler("cpu", enabled=False)
            for state in optimizer.state.values():
                values = (value for value in state.values() if isinstance(value, torch.Tensor))
                self.tracker.see_all(values, "optimizer")
            _mark_layers(() if layers is None else skeleton.get_submodule(layers), self.tracker)

    def peaks(self, workload: Workload) -> dict[Place, Terms]:
        """{part of the step: {term: bytes}} at its highest instant. ``workload`` may differ in batch, length, their
        trained share, evaluation and generation from the one that the model was prepared for."""
        tracker, step = self.tracker, self.step
        tracker.restart()
        tracker.answers.true_counts = self._enabled | true_counts(workload)
        batch = changed(batch_of(step.objective, workload, self.layout), self._seen)
        with self._running(workload):
            if workload.evaluation:
                tracker.enter("forward")
                self.model.eval()
                evaluate(self.model, step.objective, workload, batch, step.autocast)
            else:
                if workload.accumulates:
                    begin_gradients(self.trained)
                # Answers to rewards are written by `write_a_token`.
                batches = [batch] if OBJECTIVES[workload.objective].of_rewards else step.prepared([batch], 0)
                step.gradients(batches, batch[KEY].targets)
                step.update()
            if workload.written:
                write_a_token(self.model, self.method, workload, tracker.enter)
            tracker.see_all([*kept_norms(self.model), *copies_of(self.trained)], "adapters")
        return {place: terms for place, terms in tracker.peaks().items() if place.phase != UNCOUNTED}

    def sizes(self) -> dict[str, int]:
        """Numbers and bytes that grow with the number of layers only."""
        shapes = [(tuple(item.shape), item.element_size()) for item in self.trained]
        return {
            "trainable": sum(item.numel() for item in self.trained),
            "trained_bytes": sum(item.nbytes for item in self.trained),
            "elsewhere_bytes": state_bytes(self.workload.optimizer, shapes)[1],
            "weight_bytes": self.weight_bytes,
            "layer_bytes": self.layer_bytes,
            "root_bytes": self.root_bytes,
        }

    def close(self) -> None:
        """Leave the group of fake processes, of which there is one at a time."""
        self._processes.close()

    def _seen(self, tensor: Tensor) -> Tensor:
        """A tensor of the batch, without values unless the trace is one of real tensors."""
        tensor = self._mode.from_tensor(tensor) if isinstance(self._mode, FakeTensorMode) else tensor
        self.tracker.see(tensor)
        return tensor

    def _enter(self, phase: str) -> None:
        self.tracker.enter(phase)
        if phase == "optimizer":
            grads = [item.grad for item in self.trained if item.grad is not None]
            self.tracker.see_all(grads, "gradients")
            if self.workload.strategy == "ddp":
                # They are summed over the processes in one tensor of all.
                torch.cat([grad.flatten().float() for grad in grads])

    @contextmanager
    def _running(self, workload: Workload) -> Iterator[None]:
        way = selection.fakes_as(workload.device_type, triton=workload.triton, flash=workload.flash)
        # Whether the tracker answers that a mask hides nothing: a single row has no padding, and a GPU's step needs no
        # mask for padding. Packed rows need a mask.
        maskless = workload.sequences == 1 or (workload.device_type == "cuda" and workload.fast)
        masks = fake_masks_looked_at() if self.fake and maskless and not workload.packing else nullcontext()
        sharded = workload.strategy == "fsdp"
        gathering: AbstractContextManager[Any] = (
            shards_seen(self.tracker.resized, self.tracker.elsewhere) if sharded else nullcontext()
        )
        states = torch.random.fork_rng(devices=[])
        with (
            _explaining(self.model),
            # The run itself gives them.
            warnings.catch_warnings(action="ignore"),
            uncollected(),
            states,
            self._mode,
            way,
            masks,
            gathering,
            self.tracker,
        ):
            yield


def _mark_layers(layers: Any, tracker: StorageTracker) -> None:
    """Start a part of the step at each layer's forward pass, at the head, and at each layer's backward pass."""

    def marked(hidden: object, layer: int) -> None:
        """In the backward pass the part of ``layer`` begins with the gradient of its output, ``hidden``."""
        if isinstance(hidden, Tensor) and hidden.requires_grad and tracker.phase == "forward":
            hidden.register_hook(lambda _: tracker.mark(layer))

    def begin(layer: int) -> Callable[..., None]:
        def before(_: nn.Module, args: Args, kwargs: Kwargs) -> None:
            # In the backward pass, checkpointing runs the layer again.
            if tracker.phase != "backward":
                tracker.mark(layer)
            marked(args[0] if args else kwargs.get("hidden_states"), layer - 1)

        return before

    def end(_: nn.Module, __: Args, output: Any) -> None:
        if tracker.phase != "backward":
            tracker.mark(len(layers))
        marked(output if isinstance(output, Tensor) else output[0], len(layers) - 1)

    for number, layer in enumerate(layers):
        layer.register_forward_pre_hook(begin(number), with_kwargs=True)
        if number == len(layers) - 1:
            layer.register_forward_hook(end)


def shards_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of what FSDP2 shards: all tensors in full fine-tuning, else the frozen ones."""
    scales = ((name, scale) for name, scale in model.named_buffers() if name.endswith(".absmax"))
    parts = [*model.named_parameters(), *scales]
    return [(name, part) for name, part in parts if not part.requires_grad] or parts


def layer_and_root_bytes(model: nn.Module) -> tuple[int, int]:
    """The bytes that FSDP2 gathers at once: of the largest layer, and of what lies outside of the layers.

    The layer is the part of a name up to its first number: ``model.layers.3`` of ``model.layers.3.mlp.up_proj.weight``.
    """
    groups: dict[str, int] = {}
    for name, part in shards_of(model):
        layer = re.match(r".*?\.\d+\.", name)
        path = layer[0] if layer else ""
        groups[path] = groups.get(path, 0) + part.nbytes
    root = groups.pop("", 0)
    return max(groups.values(), default=0), root


def _enabled_rows(model: nn.Module, workload: Workload) -> dict[tuple[int, ...], int]:
    """The number of rows that adapt, from the flags over a fused projection's rows."""
    counts: dict[tuple[int, ...], int] = {}
    for name, module in model.named_modules():
        parts = next((parts for key, parts in workload.enable_lora.items() if matches(name, [key])), None)
        if parts is not None and is_linear(module):
            out_features = features(module)[1]
            counts[out_features,] = out_features // len(parts) * sum(map(bool, parts))
    return counts


def label_model(model: nn.Module, tracker: StorageTracker) -> None:
    """Label the model's tensors in ``tracker``: 4-bit weights, other weights, adapters."""
    codes = [
        *(layer.weight for _, layer in four_bit_layers(model)),
        *(stack.codes for _, stack in four_bit_stacks(model)),
    ]
    scales = [buffer for module in four_bit_modules(model) for buffer in module.buffers(recurse=False)]
    tracker.see_all([*codes, *scales], "weights_4bit")
    ours = {id(item) for item in adapter_parameters(model).values()} if has_adapter(model) else set()
    for name, parameter in model.named_parameters():
        if name.endswith(".absmax"):
            tracker.see(parameter, "weights_4bit")
        elif parameter.dtype is not torch.uint8:
            tracker.see(parameter, "adapters" if id(parameter) in ours else "weights")
    four_bit = {id(buffer) for buffer in scales}
    tracker.see_all((item for item in model.buffers() if id(item) not in four_bit), "weights")


@contextmanager
def _explaining(model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except RankwiseError:
        raise
    except Exception as error:
        # A model's forward may raise anything on tensors without values; the cause is chained.
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            "RW327",
            f"the step of {type(model).__name__} cannot be run without values ({type(error).__name__}: {reason}), so "
            f"its memory cannot be planned with transformers {transformers.__version__}; `rankwise train` runs without "
            "a prediction.",
        ) from error


# --- memory inside CPU kernels, which a trace cannot see, and memory that they keep between calls ---

Scratch = Callable[[Args, Kwargs], int]


def makes_dense(dtype: torch.dtype) -> bool:
    """Whether products of ``dtype`` with a 4-bit weight dequantize it first, instead of decoding it in the caches."""
    return not (selection.native_on_cpu() and products.take(dtype))


def dense_weight(args: Args, kwargs: Kwargs) -> int:
    """The bytes N K s of the weight that a 4-bit product dequantizes to its input's dtype, 0 where memory is reused."""
    x, shape = args[0], args[3]
    if not makes_dense(x.dtype):
        return 0
    size = prod(shape) * x.element_size()
    return 0 if is_kept(size) else size


SCRATCH: dict[str, Scratch] = {
    # The differences from the maximum.
    "aten::logsumexp": lambda args, _: int(args[0].nbytes),
    # gloo's copies: of the result of a gather, and of the gradients that are reduced.
    "c10d::_allgather_base_": lambda args, _: int(args[0].nbytes),
    "c10d::_reduce_scatter_base_": lambda args, _: int(args[1].nbytes),
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
    layers = [layer for layer in model.modules() if isinstance(layer, Dora)]
    # The norms are as large as the magnitudes.
    copied = (part for layer in layers for part in (layer.lora_A, layer.lora_B, layer.magnitude, layer.magnitude))
    kept = [part.detach().clone() for part in copied]
    dense = (holder for holder in four_bit_modules(model) if makes_dense(holder.dtype))
    # Stacked experts are dequantized one after the other.
    sizes = [prod(holder.shape[-2:]) * holder.dtype.itemsize for holder in dense]
    largest = max(filter(is_kept, sizes), default=0)
    return [*kept, torch.empty(largest, dtype=torch.uint8)] if largest else kept


def kept_norms(model: nn.Module) -> Iterator[Tensor]:
    """The row norms and gains that DoRA layers keep, and on real tensors the copies beside them."""
    for layer in model.modules():
        if isinstance(layer, Dora):
            yield from layer.kept_tensors()

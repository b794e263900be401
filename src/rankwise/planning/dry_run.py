"""The dry run: the real model runs its real training step on fake tensors, and every storage is counted.

It needs neither weights nor a GPU. The trace runs on the CPU, since a CPU build of torch aborts at a fake CUDA product;
``planning.cuda`` has the differences of a GPU.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from rankwise.acceleration.sharding import shard
from rankwise.adapters import adapter_parameters, has_adapter
from rankwise.adapters.base_layer import is_linear
from rankwise.compat.torch import FakeTensorMode, fake_processes, shards_seen
from rankwise.compat.transformers import choose_experts, fake_masks_looked_at
from rankwise.errors import ModelError, RankwiseError
from rankwise.matching import matches
from rankwise.ops import selection
from rankwise.ops.rounded import copies_of
from rankwise.planning import cuda
from rankwise.planning.architectures import FAMILIES
from rankwise.planning.assemble import Found, assembled
from rankwise.planning.counted_optimizer import make_state, new_optimizer
from rankwise.planning.fake_model import materialize, prepare, weights_dtype
from rankwise.planning.offload import offloaded
from rankwise.planning.optimizers import rule_of, state_bytes
from rankwise.planning.parallel import Group, layer_and_root
from rankwise.planning.scratch import SCRATCH, kept_memory, kept_norms, lives_in_kept_memory
from rankwise.planning.step import LossOf, autocast_dtype, make_batch, take_step, true_counts
from rankwise.planning.terms import MemoryEstimate
from rankwise.planning.tracker import StorageTracker
from rankwise.planning.workload import Workload
from rankwise.planning.written import UNCOUNTED, write_a_token
from rankwise.quantization.experts import four_bit_stacks
from rankwise.quantization.linear import features
from rankwise.quantization.targets import four_bit_layers, four_bit_modules


def dry_run(
    model: str | os.PathLike[str],
    method: str,
    workload: Workload,
    *,
    deadline: float = math.inf,
    trust_remote_code: bool = False,
    revision: str | None = None,
) -> MemoryEstimate:
    """The peak of one step of the model that ``model`` describes; its weights are not read.

    Raises ModelError: as ``load_skeleton`` does, RW135 after ``deadline`` (by ``time.monotonic``), RW327 when the
    model's forward cannot be traced.
    """
    from rankwise.models import load_skeleton

    started = time.perf_counter()
    skeleton = load_skeleton(model, trust_remote_code=trust_remote_code, revision=revision)
    return trace(skeleton, method, workload, started=started, deadline=deadline)


def trace(
    skeleton: PreTrainedModel,
    method: str,
    workload: Workload,
    *,
    started: float | None = None,
    deadline: float = math.inf,
    fake: bool = True,
    loss: LossOf | None = None,
) -> MemoryEstimate:
    """The peak of one step of a model on the meta device, which is consumed.

    Without ``fake``, the step runs on real tensors of random values, for tests. ``loss`` replaces ``step.loss_of`` and
    takes its arguments. Raises ModelError (RW135, RW327) as ``dry_run`` does.
    """
    started = time.perf_counter() if started is None else started
    config = skeleton.config
    # Eager experts read values, which fake tensors do not have.
    if fake:
        choose_experts(config, "grouped_mm")
    total = sum(parameter.numel() for parameter in skeleton.parameters())
    rule_of(workload.optimizer)
    tracker = new_tracker(workload, vocabulary_of(skeleton), fake=fake)
    tracker.deadline = deadline
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    tracker.answers.true_counts |= _enabled_rows(skeleton, workload)
    way = selection.fakes_as(workload.device_type, triton=workload.triton, flash=workload.flash)
    # Whether the tracker answers that a mask hides nothing: a single row has no padding, and a GPU's step needs no mask
    # for padding. Packed rows need a mask.
    maskless = workload.sequences == 1 or (workload.device_type == "cuda" and workload.fast)
    maskless = maskless and not workload.packing
    masks = fake_masks_looked_at() if fake and maskless else nullcontext()
    sharded = workload.strategy == "fsdp"
    # A mesh looks at values, which fake tensors do not have.
    group: AbstractContextManager[Any] = fake_processes(workload.devices) if sharded else nullcontext()
    gathering = shards_seen(tracker.resized, tracker.elsewhere) if sharded else nullcontext()
    with _explaining(skeleton), group as mesh, mode, way, masks, gathering, tracker:
        materialize(skeleton, weights_dtype(method, workload), fill=not fake)
        flat = prepare(skeleton, method, workload)
        tracker.answers.true_counts |= true_counts(workload)
        shards = [part.nbytes for _, part in shards_of(skeleton)]
        groups = sharding_groups_of(skeleton)
        if sharded:
            shard(skeleton, mesh, trains_all=method == "full")
        kept = kept_memory(skeleton) if fake and workload.device_type == "cpu" else []
        tracker.see_all(kept, "adapters")
        run_steps(skeleton, method, workload, tracker, flat=flat, loss=loss)
        tracker.see_all([*kept_norms(skeleton), *copies_of(trained(skeleton))], "adapters")
    shapes = [(tuple(item.shape), item.element_size()) for item in trained(skeleton)]
    found = Found(
        phases={name: terms for name, terms in tracker.peaks().items() if name != UNCOUNTED},
        trainable=sum(item.numel() for item in trained(skeleton)),
        total=total,
        trained_bytes=sum(item.nbytes for item in trained(skeleton)),
        elsewhere_bytes=state_bytes(workload.optimizer, shapes)[1],
        max_positions=getattr(config.get_text_config(), "max_position_embeddings", None),
        layer=groups[0],
        root=groups[1],
        weight_bytes=sum(shards),
        exact=True,
        is_share=sharded,
    )
    return assembled(method, workload, found, started)


def shards_of(model: nn.Module) -> list[tuple[str, torch.Tensor]]:
    """(name, tensor) of what FSDP2 shards: all tensors in full fine-tuning, else the frozen ones."""
    scales = ((name, scale) for name, scale in model.named_buffers() if name.endswith(".absmax"))
    parts = [*model.named_parameters(), *scales]
    return [(name, part) for name, part in parts if not part.requires_grad] or parts


def sharding_groups_of(model: nn.Module) -> tuple[Group, Group]:
    """What FSDP2 gathers at once: (the largest layer, all that lies outside of the layers)."""
    return layer_and_root(
        (name, Group(part.nbytes, part.nbytes if part.requires_grad else 0)) for name, part in shards_of(model)
    )


def _enabled_rows(model: nn.Module, workload: Workload) -> dict[int, int]:
    """The number of rows that adapt, from the flags over a fused projection's rows."""
    counts = {}
    for name, module in model.named_modules():
        parts = next((parts for key, parts in workload.enable_lora.items() if matches(name, [key])), None)
        if parts is not None and is_linear(module):
            out_features = features(module)[1]
            counts[out_features] = out_features // len(parts) * sum(map(bool, parts))
    return counts


def new_tracker(workload: Workload, vocabulary: int | None, *, fake: bool = True) -> StorageTracker:
    """A tracker that counts as the device of ``workload`` does."""
    if workload.device_type == "cuda":
        return StorageTracker(rounding=cuda.rounded, vocabulary=vocabulary)
    before = lives_in_kept_memory if fake else None
    return StorageTracker(vocabulary=vocabulary, scratch=SCRATCH, counted_before=before)


def vocabulary_of(model: PreTrainedModel) -> int | None:
    config = model.config.get_text_config()
    return getattr(config, "vocab_size", None)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def run_steps(
    model: PreTrainedModel,
    method: str,
    workload: Workload,
    tracker: StorageTracker,
    *,
    flat: bool,
    loss: LossOf | None = None,
) -> None:
    """Run a step under the active ``tracker``, and tell it what each storage is for."""
    label_model(model, tracker)
    parameters = trained(model)
    batch, optimizer = make_batch(workload, flat=flat), new_optimizer(workload, parameters)
    make_state(optimizer)
    label_optimizer(optimizer, tracker)
    autocast = autocast_dtype(method, workload)

    def enter(phase: str) -> None:
        tracker.enter(phase)
        if phase == "optimizer":
            tracker.see_all((item.grad for item in parameters if item.grad is not None), "gradients")

    with offloaded(tracker, model) if workload.activation_offloading else nullcontext():
        take_step(model, optimizer, batch, enter, autocast, loss)
    if workload.written:
        write_a_token(model, method, workload, tracker.enter)


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


def label_optimizer(optimizer: torch.optim.Optimizer, tracker: StorageTracker) -> None:
    for state in optimizer.state.values():
        tracker.see_all((value for value in state.values() if isinstance(value, torch.Tensor)), "optimizer")


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
            f"the step of {type(model).__name__} cannot be run without values ({type(error).__name__}: {reason}); "
            f"{_another_way(model)}.",
        ) from error


def _another_way(model: PreTrainedModel) -> str:
    if getattr(model.config, "model_type", None) in FAMILIES:
        return "plan without --exact"
    return (
        f"the closed form does not know this architecture either, so plan another --method, or with another version of "
        f"transformers (this is {transformers.__version__})"
    )

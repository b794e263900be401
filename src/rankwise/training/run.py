"""``train``: a run from its settings to its folder. setup.py and learning.py make plain arguments of the settings.

Everything is read and checked before anything is written, and before the old run is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from rankwise.acceleration import (
    grow_segments,
    limit_generated_kernels,
)
from rankwise.acceleration.memory import mesh_of_all, shard
from rankwise.adapters import has_adapter
from rankwise.adapters.select import with_heads
from rankwise.compat.torch import is_unit
from rankwise.config import TrainSettings, idle_options
from rankwise.conflicts import takes_eight_bit
from rankwise.data import warn_of_overlap
from rankwise.disk import hold
from rankwise.errors import RankwiseWarning, RunError, heard, warn
from rankwise.foreign import JsonObject, checked, read_json
from rankwise.lora_config import LoraConfig
from rankwise.methods import method_of
from rankwise.models import choose_device, model_facts
from rankwise.models.device import cpu_name
from rankwise.models.prepared import mapped_files
from rankwise.options import flag
from rankwise.quantization.linear import count_weights
from rankwise.records import WAIT_POLICIES, RunRecord, check_writable, load_record, versions_of
from rankwise.training import checkpoints, ranks, setup
from rankwise.training.checkpoints import Checkpoint, check_space, newest_valid
from rankwise.training.learning import (
    Learning,
    learning_of,
    make_loop,
    search,
    with_default_rate,
    with_found_rate,
    with_rate,
)
from rankwise.training.loop import PROGRESS_FILE, Loop, coming_batches
from rankwise.training.optimizers import (
    check_memory_savers,
    check_names,
    implementation_of,
    loraplus_groups,
    make_schedule,
)
from rankwise.training.session import Foresight, Retention, Session
from rankwise.training.setup import add_new_tokens, new_tokens, with_adapters_options
from rankwise.training.step import Computing, Products, choose, prepare
from rankwise.training.watch import Observer, Progress, SilentObserver, check_installed, evaluations, frozen_bytes
from rankwise.training.weights import checkpoint_bytes, reading_state

# Libraries whose version can change a result.
PACKAGES = ("rankwise", "torch", "transformers", "datasets", "safetensors", "tokenizers")


def train(
    settings: TrainSettings,
    observer: Observer | None = None,
    foresight: Foresight | None = None,
    retention: Retention | None = None,
    began: float | None = None,
) -> RunRecord:
    """Fine-tune according to ``settings``, write a run folder to ``settings.output``, and return the run's record.

    ``foresight`` predicts the peak memory before the model is loaded and before the first step, and may refuse the run.
    ``retention`` measures the model on what must stay, before training and after. ``began``: when the command began,
    by ``time.monotonic``.
    Under torchrun every process calls this function: all processes train, and process 0 writes.

    Raises InputError, before anything is written, for faults in the settings, data, model or output folder; RunError
    during training (a loss that is not finite, no gradient, a full disk), after which the last checkpoint remains;
    Interrupted after Ctrl-C or SIGTERM, once the step has been saved, so that ``resume=True`` continues it.
    """
    started = began or time.monotonic()
    settings = with_adapters_options(settings)
    told: list[dict[str, str]] = []
    limit_generated_kernels()
    grow_segments()
    check_writable(settings.output)
    device_type = torch.device(choose_device(settings.device, settings.dtype).device).type
    # The other processes would be refused.
    held = hold(settings.output) if ranks.is_writer() else nullcontext()
    with _told_warnings(observer, told), ranks.joined(device_type), held:
        ranks.check_processes(settings, ranks.count())
        ranks.check_alike(
            {f"--{name.replace('_', '-')}": value for name, value in settings.model_dump(mode="json").items()}
        )
        mode = checkpoints.check_output(settings.output, resume=settings.resume, overwrite=settings.overwrite)
        if mode == "resume":
            settings = with_found_rate(settings)
        lora = _check_settings(settings, device_type)
        if mode == "resume":
            checkpoints.check_same_run(settings.output, settings.model_dump(mode="json"))
            checkpoints.check_same_processes(settings.output, ranks.count())
            if _is_finished(settings):
                return load_record(settings.output)
        session = _prepare(settings, mode, lora, observer or SilentObserver(), foresight, retention)
        return session.carry_out(started, told)


def _check_settings(given: TrainSettings, device_type: str) -> LoraConfig:
    check_names(given)
    check_memory_savers(given.optimizer, device_type, activation_offloading=given.activation_offloading)
    check_installed(given.trackers)
    _warn_of_idle_options(given)
    # Raises for an invalid 4-bit format before anything is read.
    setup.quantization_for(given)
    return given.lora_config(given.method)


def _warn_of_idle_options(given: TrainSettings) -> None:
    for reason, names in idle_options(given.method).items():
        idle = [flag(name) for name in names if getattr(given, name) != given.defaults()[name]]
        if idle:
            warn("RW529", f"{', '.join(idle)}: no effect with --method {given.method}; {reason}.")


def _is_finished(given: TrainSettings) -> bool:
    """Whether the run to resume is finished and its length is unchanged, so that nothing is left to do."""
    record = load_record(given.output)
    is_as_long = all(getattr(given, name) == record.settings.get(name) for name in checkpoints.LENGTH)
    if record.status != "finished" or not is_as_long:
        return False
    warn(
        "RW509",
        f"the run in {given.output} is finished ({record.steps} steps), so there is nothing to resume; a larger "
        "--max-steps or --epochs lengthens it.",
    )
    return True


def _check_length(given: TrainSettings, checkpoint: Checkpoint, now: int) -> None:
    """Raise RunError (RW507) if the run cannot get this length: it can become longer, and under a schedule that does
    not depend on the length also shorter. Warn (RW544) how a schedule that does changes."""
    before, schedule = progress_of(checkpoint).total_steps, given.lr_scheduler_type
    least = checkpoint.step if schedule in checkpoints.LENGTH_FREE else before
    if now < least:
        raise RunError(
            "RW507",
            f"the run in {given.output} has {before} steps, of which {checkpoint.step} are done, and --max-steps or "
            f"--epochs ask for {now}; with the schedule {schedule} it can be resumed with {least} steps or more.",
        )
    if now == before or schedule in checkpoints.LENGTH_FREE:
        return

    def rate(total: int) -> float:
        return given.rate * make_schedule(schedule, given.rate, given.warmup_steps, total)(checkpoint.step)

    warn(
        "RW544",
        f"the run is lengthened from {before} to {now} steps: from step {checkpoint.step} on, the learning rate "
        f"follows the {schedule} schedule of {now} steps, at {rate(now):.3g} instead of {rate(before):.3g}.",
    )


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a run reads, before the model gets an adapter."""

    learning: Learning
    loaded: setup.LoadedBase
    # The model as it was loaded, before it gets new tokens.
    base: JsonObject
    lora: LoraConfig
    data: setup.Data
    versions: dict[str, str]


def _prepare(
    given: TrainSettings,
    mode: checkpoints.Mode,
    lora: LoraConfig,
    observer: Observer,
    foresight: Foresight | None,
    retention: Retention | None,
) -> Session:
    """Read, load and check everything, without writing anything."""
    inputs = _read(given, lora, observer, foresight, retention)
    learning, loaded, data = inputs.learning, inputs.loaded, inputs.data
    given = with_default_rate(given, loaded.model, observer)
    described = data.describe()
    described["train"] |= setup.other_hashes(given)
    _check_alike(inputs, described)
    if mode == "resume":
        checkpoints.check_same_inputs(given.output, described, inputs.base)
    checkpoint = _checkpoint_to_resume(given.output) if mode == "resume" else None
    trainable = setup.make_trainable(loaded.model, given, inputs.lora, checkpoint, inputs.base["sha256"])
    products = _frozen_products(given, loaded.model, observer)
    computing = Computing.of(given, products)
    calibration = functools.partial(setup.calibration_ids, data.train.dataset, given.max_length, loaded.model.device)
    prepared = prepare(loaded.model, given.method, given.objective, computing, calibration)
    if learning.has_labels:
        setup.check_labels(data)
    # One checkpoint more is being written, and the result takes as much.
    check_space(given.output, checkpoint_bytes(loaded.model) * (given.save_total_limit + 3))
    make = functools.partial(
        make_loop,
        learning=learning,
        base=loaded,
        computing=computing,
        flat=prepared.flat,
        progress=functools.partial(progress_of, checkpoint),
        is_evaluated=_is_evaluated(given.output, checkpoint),
    )
    # Made before a search, for the run's length and memory, which do not depend on the learning rate.
    loop = make(given.model_copy(update={"learning_rate": given.searched_rates[0]}) if given.searches else given, data)
    if given.strategy == "fsdp" and not is_unit(loaded.model):
        shard(loaded.model, mesh_of_all(loaded.device.type), trains_all=method_of(given.method).trains_all)
    if checkpoint is not None:
        _check_length(given, checkpoint, loop.options.total_steps)
    # Batches differ between processes; the largest prediction is taken.
    each = ranks.gathered(_predicted_peak(given, loop, foresight))
    predicted, idle = max((found for found in each if found is not None), default=(None, None))
    searched = None
    if given.searches:
        read = [described, inputs.base, inputs.versions, products]
        searched = search(given, data, loaded.model, loop.options.total_steps, make, observer, read)
        given = with_rate(given, searched)
        loop = make(given, data)
    rates = None
    if given.loraplus_ratio is not None and has_adapter(loaded.model):
        options = {"rate": given.rate, "ratio": given.loraplus_ratio, "weight_decay": given.weight_decay}
        rates = {group["group"]: group["lr"] for group in loraplus_groups(loaded.model, **options)}
    record = RunRecord(
        method=given.method,
        objective=given.objective,
        seed=given.seed,
        settings=given.model_dump(mode="json"),
        predicted_peak_memory_bytes=predicted,
        idle_bytes=idle,
        trainable_parameters=trainable,
        total_parameters=count_weights(loaded.model),
        base_model=inputs.base,
        data=described,
        devices=ranks.count(),
        strategy=(given.strategy or "ddp") if ranks.count() > 1 else None,
        learning_rates=rates,
        products=products,
        rate_search=searched,
        frozen_bytes=max(ranks.gathered(frozen_bytes(loaded.model))),
        versions=inputs.versions,
        device={
            **device_record(loaded.device, loaded.dtype, given.optimizer),
            "reason": loaded.device_reason,
            "acceleration": str(prepared.accelerated or ("off" if given.fast else "off (--no-fast)")),
            "rows": f"padded: {prepared.padded}" if prepared.padded else "laid end to end, without padding",
        },
    )
    return Session(given.output, mode, loop, loaded.tokenizer, checkpoint, record, observer, given.trackers, retention)


def _read(
    given: TrainSettings,
    lora: LoraConfig,
    observer: Observer,
    foresight: Foresight | None,
    retention: Retention | None,
) -> _Inputs:
    learning = learning_of(given)
    if learning.labels_of is None:
        setup.check_model(given, lora)
    observer.phase("Reading data")
    texts = setup.read_data(given, learning.formats)
    if retention is not None and (rows := retention.rows) is not None:
        warn_of_overlap(texts.rows, rows, "retained")
    labels = None
    if learning.labels_of is not None:
        labels = learning.labels_of(given, texts.rows)
        setup.check_model(given, lora, labels)
    else:
        setup.check_template(given, texts)
    observer.phase("Loading the model")
    if foresight is not None:
        foresight.before_loading(0 if labels is None else len(labels.names))
        # No process loads the model before all have measured the free memory.
        ranks.barrier()
    loaded = setup.load_for_training(given, labels)
    base = model_facts(loaded.model, loaded.source)
    lora = with_heads(loaded.model, lora)
    if given.new_tokens is not None and method_of(given.method).has_adapter:
        lora = add_new_tokens(loaded.model, loaded.tokenizer, new_tokens(given.new_tokens), lora)
    observer.phase("Encoding data")
    data = learning.encode(given, loaded.tokenizer, texts)
    setup.check_positions(loaded.model, [one.dataset for one in (data.train, data.evaluation) if one is not None])
    return _Inputs(learning, loaded, base, lora, data, versions_of(PACKAGES))


def _check_alike(inputs: _Inputs, described: dict[str, JsonObject]) -> None:
    """Refuse processes that read other data, models or files, or have other versions of the libraries."""
    others = {key: value for key, value in described["train"].items() if key.endswith("_sha256")}
    ranks.check_alike(
        {
            **{f"the sha256 of the {name} data": part["sha256"] for name, part in described.items()},
            # A different tokenizer makes a different number of tokens of the same rows.
            **{f"the number of tokens of the {name} data": part["tokens"] for name, part in described.items()},
            **{f"the sha256 of the {key.removesuffix('_sha256').replace('_', ' ')}": others[key] for key in others},
            "the sha256 of the model": inputs.base["sha256"],
            **{f"the version of {name}": version for name, version in inputs.versions.items()},
        }
    )


def _frozen_products(given: TrainSettings, model: nn.Module, observer: Observer) -> Products:
    """What ``--products`` stands for here. A resumed run keeps what it took, also on another machine."""
    before = load_record(given.output).products if given.resume else None
    products, why = (
        (before, "as before") if before else choose(given, given.method, given.objective, given.strategy, model)
    )
    if given.products == "auto" and takes_eight_bit(given.method, given.objective, given.strategy, given):
        observer.note(f"frozen products: {products} ({why})")
    return products


def _predicted_peak(given: TrainSettings, loop: Loop, foresight: Foresight | None) -> tuple[int, int] | None:
    """The predicted peak over training and evaluation, with its idle process; None without a plan. Packed rows count
    as full."""
    if foresight is None:
        return None
    batch = loop.objective.largest_batch(coming_batches(loop))
    if given.packing:
        batch = dataclasses.replace(batch, rows=given.batch_size, tokens=given.max_length)
    return foresight.before_training(batch, loop.objective.largest_evaluation(), mapped_files(loop.model))


def _checkpoint_to_resume(folder: Path) -> Checkpoint | None:
    found = newest_valid(folder, lambda error: warn(error.code, f"{error.message} An older one is used."))
    ranks.check_alike({"the step of the last checkpoint": found and found.step})
    if found is None:
        warn("RW510", f"the run in {folder} has no checkpoint yet, so it starts again from step 0.")
    return found


def _is_evaluated(folder: Path, checkpoint: Checkpoint | None) -> bool:
    """Whether a resumed run needs no evaluation at its start: its step was evaluated, or no evaluation was due."""
    if checkpoint is None:
        return False
    progress = progress_of(checkpoint)
    if progress.eval_steps is None:
        return False
    due = checkpoint.step % progress.eval_steps == 0 or checkpoint.step >= progress.total_steps
    return not due or checkpoint.step in evaluations(folder)


def progress_of(checkpoint: Checkpoint | None) -> Progress:
    """A checkpoint's progress. Raises RunError (RW511) if the run could not continue from it."""
    if checkpoint is None:
        return Progress()
    with reading_state(checkpoint.path, "progress"):
        progress = checked(Progress, read_json(checkpoint.path / PROGRESS_FILE))
        if progress.steps != checkpoint.step or progress.eval_steps == 0:
            raise ValueError(f"it is of step {progress.steps}, evaluated every {progress.eval_steps}")
    return progress


def _told_warnings(observer: Observer | None, told: list[dict[str, str]]) -> AbstractContextManager[None]:
    """Pass every RankwiseWarning to the observer and to ``told``, for the record; without an observer, also show it."""

    def tell(warning: RankwiseWarning) -> bool:
        # The memory plan may have given the same warning.
        is_new = warning.to_json() not in told
        if is_new:
            told.append(warning.to_json())
        if is_new and observer is not None:
            observer.warning(warning.code, warning.message)
        return is_new and observer is None

    return heard(tell)


def device_record(device: torch.device, dtype: torch.dtype, optimizer: str) -> JsonObject:
    """Type, name and dtype of the training device.

    For a CPU also the number of threads and their wait policy if one is set; for a GPU the allocator's settings and
    the implementation of ``optimizer``.
    """
    record: JsonObject = {"type": device.type, "dtype": str(dtype).removeprefix("torch.")}
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        record |= {"allocator": grow_segments(), "optimizer": implementation_of(optimizer, device.type)}
        return record | {"name": name, "memory_bytes": torch.cuda.get_device_properties(device).total_memory}
    waiting = {name: os.environ[name] for name in WAIT_POLICIES if name in os.environ}
    cpu = {"name": cpu_name(), "threads": torch.get_num_threads()}
    return record | cpu | {"wait_policy": waiting}

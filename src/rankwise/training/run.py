"""``train``: a run from its settings to its folder. The settings become the small values of parts.py here.

Everything is read and checked before anything is written, and before the old run is touched.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from rankwise.acceleration import grow_segments, keep_rounded, limit_generated_kernels, restore, rounded_bytes
from rankwise.acceleration.layouts import beginnings_in_words
from rankwise.adapters import has_adapter
from rankwise.adapters.select import with_heads
from rankwise.compat.system import WAIT_POLICIES, cache_folder
from rankwise.compat.torch import is_unit
from rankwise.config import StepOptions, TrainSettings, idle_options
from rankwise.conflicts import takes_eight_bit
from rankwise.constants import MOST_ROUNDED_ONCE
from rankwise.data import warn_of_overlap
from rankwise.disk import hold
from rankwise.errors import RankwiseWarning, RunError, heard, warn
from rankwise.foreign import Fields, JsonObject, checked, read_json
from rankwise.lora_config import LoraConfig
from rankwise.methods import method_of
from rankwise.models import ModelSource, choose_device, fetch_model
from rankwise.models.device import cpu_name
from rankwise.models.prepared import mapped_files
from rankwise.objectives import OBJECTIVES, ObjectiveName
from rankwise.options import flag
from rankwise.quantization.config import FileConfig
from rankwise.quantization.linear import count_weights
from rankwise.records import RateSearch, RunRecord, check_writable, load_record, versions_of
from rankwise.training import checkpoints, ranks, setup
from rankwise.training.batches import MicroBatch, own_parts, token_rows
from rankwise.training.checkpoints import Checkpoint, check_space, newest_valid
from rankwise.training.learning import LEARNING, make_loop, paced
from rankwise.training.loop import PROGRESS_FILE, Loop, coming_batches
from rankwise.training.optimizers import (
    check_memory_savers,
    check_names,
    implementation_of,
    loraplus_groups,
    make_schedule,
)
from rankwise.training.parts import Base, Given, Learned, Pace, Reading, Updates, learned_of, part_of
from rankwise.training.products import affordable_rows, eight_bit_steps, judge, kept_file, pairs_in_eight_bits, taken
from rankwise.training.rate_search import rate_before, rates_to_try, search
from rankwise.training.reference import Reference, key_of
from rankwise.training.session import Foresight, Retention, Session
from rankwise.training.setup import add_new_tokens, new_tokens
from rankwise.training.states import reading_state
from rankwise.training.step import TO_BE_MEASURED, Computing, Objective, Prepared, Products, choose, prepare_model
from rankwise.training.trackers import check_installed
from rankwise.training.watch import Observer, Progress, SilentObserver, evaluations, frozen_bytes
from rankwise.training.weights import checkpoint_bytes, mesh_of_all, shard

# Settings on which no loss depends.
NOT_OF_THE_LOSS = ("output", "overwrite", "ignore_plan")
# Why no measurement of 8-bit products was made.
TOO_SHORT = "measuring 8 bits would take more than 3 % of so short a run; --products int8 takes them unmeasured"
# Libraries whose version can change a result.
PACKAGES = ("rankwise", "torch", "transformers", "datasets", "safetensors", "tokenizers")


def train(
    settings: TrainSettings,
    observer: Observer | None = None,
    foresight: Foresight | None = None,
    retention: Retention | None = None,
    began: float | None = None,
    given: Given | None = None,
) -> RunRecord:
    """Fine-tune according to ``settings``, write a run folder to ``settings.output``, and return the run's record.

    ``foresight`` predicts the peak memory before the model is loaded and before the first step, and may refuse the run.
    ``retention`` measures the model on the retained rows, before training and after. ``began``: when the command began,
    by ``time.monotonic``. ``given``: a model and rows in memory, and callbacks.
    Under torchrun every process calls this function: all processes train, and process 0 writes.

    Raises InputError, before anything is written, for faults in the settings, data, model or output folder; RunError
    during training (a loss that is not finite, no gradient, a full disk), after which the last checkpoint remains;
    Interrupted after Ctrl-C or SIGTERM, once the step has been saved, so that ``resume=True`` continues it.
    """
    return train_as_asked(setup.with_adapters_options(settings), observer, foresight, retention, began, given)


def train_as_asked(
    asked: TrainSettings,
    observer: Observer | None,
    foresight: Foresight | None,
    retention: Retention | None,
    began: float | None,
    given: Given | None = None,
) -> RunRecord:
    """``train`` with settings that have the options of the adapter to continue."""
    started, told, given = began or time.monotonic(), list[dict[str, str]](), given or Given()
    limit_generated_kernels()
    grow_segments()
    check_writable(asked.output)
    if given.model is not None:
        setup.in_memory(asked, given)
        device_type = given.model.device.type
    else:
        device_type = torch.device(choose_device(asked.device, asked.dtype).device).type
    # The other processes would be refused.
    held = hold(asked.output) if ranks.is_writer() else nullcontext()
    with _told_warnings(observer, told), ranks.joined(device_type), held, setup.lent(given.model):
        ranks.check_processes(asked, ranks.count())
        settings = asked.model_dump(mode="json")
        ranks.check_alike({f"--{name.replace('_', '-')}": value for name, value in settings.items()})
        mode = checkpoints.check_output(asked.output, resume=asked.resume, overwrite=asked.overwrite)
        before = load_record(asked.output) if mode == "resume" else None
        rate = asked.learning_rate
        if before is not None:
            rate = rate_before(asked.output, before, rate, asked.searched_rates, asked.budget)
        check_names(asked.optimizer, asked.lr_scheduler_type)
        check_memory_savers(asked.optimizer, device_type, activation_offloading=asked.activation_offloading)
        check_installed(asked.trackers)
        _warn_of_idle_options(asked.method, [n for n, usual in asked.defaults().items() if getattr(asked, n) != usual])
        if before is not None:
            checkpoints.check_same_run(asked.output, resolved(settings, rate))
            checkpoints.check_same_processes(asked.output, ranks.count())
            if _is_finished(asked.output, before, settings):
                return before
        session = _prepare(asked, mode, before, rate, observer or SilentObserver(), foresight, retention, given)
        try:
            return session.carry_out(started, told)
        finally:
            # What is replaced in transformers' modules would compute for the caller's other models.
            restore(session.loop.model)


def resolved(settings: Fields, rate: float | str | None) -> JsonObject:
    """The settings with the rate that is taken, which ends a search."""
    budget = settings["budget"] if isinstance(rate, str) else None
    return {**settings, "learning_rate": rate, "budget": budget}


def _warn_of_idle_options(method: str, given: Collection[str]) -> None:
    for reason, names in idle_options(method).items():
        if idle := [flag(name) for name in names if name in given]:
            warn("RW529", f"{', '.join(idle)}: no effect with --method {method}; {reason}.")


def _is_finished(output: Path, before: RunRecord, settings: Fields) -> bool:
    """Whether the run to resume is finished and its length is unchanged, so that nothing is left to do."""
    is_as_long = all(settings[name] == before.settings.get(name) for name in checkpoints.LENGTH)
    if before.status != "finished" or not is_as_long:
        return False
    warn(
        "RW509",
        f"the run in {output} is finished ({before.steps} steps), so there is nothing to resume; a larger "
        "--max-steps or --epochs lengthens it.",
    )
    return True


def _check_length(output: Path, checkpoint: Checkpoint, pace: Pace, peak: float) -> None:
    """Raise RunError (RW507) if the run cannot get this length: it can become longer, and under a schedule that does
    not depend on the length also shorter. Warn (RW544) how a schedule that does changes.

    ``peak``: the highest learning rate.
    """
    now, before, schedule = pace.total_steps, progress_of(checkpoint).total_steps, pace.lr_scheduler_type
    least = checkpoint.step if schedule in checkpoints.LENGTH_FREE else before
    if now < least:
        raise RunError(
            "RW507",
            f"the run in {output} has {before} steps, of which {checkpoint.step} are done, and --max-steps or "
            f"--epochs ask for {now}; with the schedule {schedule} it can be resumed with {least} steps or more.",
        )
    if now == before or schedule in checkpoints.LENGTH_FREE:
        return

    def rate(total: int) -> float:
        return peak * make_schedule(schedule, peak, pace.warmup_steps, total)(checkpoint.step)

    warn(
        "RW544",
        f"the run is lengthened from {before} to {now} steps: from step {checkpoint.step} on, the learning rate "
        f"follows the {schedule} schedule of {now} steps, at {rate(now):.3g} instead of {rate(before):.3g}.",
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """What a run repeats: batches of an objective, through a model that is made for it."""

    objective: Objective
    pace: Pace
    prepared: Prepared
    # What the measurement of 8-bit products found, if there was one.
    measured: JsonObject | None


def _prepare(
    asked: TrainSettings,
    mode: checkpoints.Mode,
    before: RunRecord | None,
    rate: float | str | None,
    observer: Observer,
    foresight: Foresight | None,
    retention: Retention | None,
    given: Given,
) -> Session:
    """Read, load and check everything, without writing anything.

    ``rate``: as asked, or that of the run to resume, whose record is ``before``.
    """
    learned, reading = learned_of(asked), part_of(Reading, asked, **given.rows)
    four_bits = setup.quantization_for(asked.method, asked, asked.model) if given.model is None else None
    base = part_of(Base, asked, quantization=four_bits)
    texts, source, config = _read(asked, base, reading, learned, observer, retention, given)
    rates = rates_to_try(rate, asked.searched_rates, config, asked.model_dump(mode="json"), observer)

    loaded, lora = _load(asked, base, source, observer, foresight, given)
    rows = _encode(asked, base, reading, learned, loaded, texts, observer)
    checkpoint = None
    if before is not None:
        checkpoints.check_same_inputs(asked.output, rows.described, loaded.facts)
        checkpoint = _checkpoint_to_resume(asked.output)
    how = {"keeps_reference": learned.beta > 0, "is_resumed": checkpoint is not None}
    trainable = setup.make_trainable(loaded.model, base, lora, loaded.facts["sha256"], **how)

    step = _make_step(asked, base, learned, lora, before, loaded, rows, observer)
    if checkpoint is not None:
        _check_length(asked.output, checkpoint, step.pace, rates[0])
    predicted, idle = _predicted_peak(
        step, reading.max_length if asked.packing else None, learned.objective, loaded.model, foresight
    )
    searched = _search(asked, rates, learned, loaded, rows, step, observer) if len(rates) > 1 else None
    updates = part_of(Updates, asked, rate=rates[0] if searched is None else searched["chosen"])
    total, in_eight_bits = step.pace.total_steps, None
    if step.prepared.computing.products == "int8":
        in_eight_bits = eight_bit_steps(total, learned.beta)
    if in_eight_bits is not None:
        dtype = _dtype_of("bfloat16", loaded)
        observer.note(f"frozen products: {dtype} from step {in_eight_bits + 1} on, to undo the bias of 8 bits")
    loop = make_loop(
        step.objective,
        step.pace,
        updates,
        loaded,
        step.prepared.computing,
        asked.output,
        progress=progress_of(checkpoint),
        is_evaluated=_is_evaluated(asked.output, checkpoint),
        eight_bit_steps=in_eight_bits,
    )
    record = _record(
        asked,
        base,
        loaded,
        step.prepared,
        updates,
        objective=learned.objective,
        predicted_peak_memory_bytes=predicted,
        idle_bytes=idle,
        trainable_parameters=trainable,
        data=rows.described,
        versions=rows.versions,
        products_measured=step.measured or (before and before.products_measured),
        eight_bit_steps=in_eight_bits,
        rate_search=searched,
    )
    reference = None
    if OBJECTIVES[learned.objective].of_preferences:
        reference = _reference(base, lora, loaded, rows, step)
    return Session(
        folder=asked.output,
        mode=mode,
        loop=loop,
        tokenizer=loaded.tokenizer,
        checkpoint=checkpoint,
        record=record,
        observer=observer,
        trackers=asked.trackers,
        retention=retention,
        reference=reference,
        shared=(base.cache or cache_folder()) / "reference",
        callbacks=given.callbacks,
    )


def _read(
    asked: TrainSettings,
    base: Base,
    reading: Reading,
    learned: Learned,
    observer: Observer,
    retention: Retention | None,
    given: Given,
) -> tuple[setup.Texts, ModelSource, PreTrainedConfig]:
    """The rows as text, the model's source, and its config, which is checked first if its head does not follow from the
    rows."""
    remote: JsonObject = {"revision": base.revision, "trust_remote_code": base.trust_remote_code}
    in_memory = given.model is not None
    source = setup.in_memory(asked, given) if in_memory else fetch_model(base.model, **remote, weights=False)
    check = functools.partial(setup.check_model, base=base, config=asked.lora_config(asked.method), model=given.model)
    checked = None if OBJECTIVES[learned.objective].of_labels else check(source)
    observer.phase("Reading data")
    texts = setup.read_data(reading, learned.objective, base.adapter)
    if retention is not None and (rows := retention.rows) is not None:
        warn_of_overlap(texts.rows, rows, "retained")
    if checked is not None:
        setup.check_template(base, texts, given.tokenizer)
    source = dataclasses.replace(source, labels=texts.labels)
    return texts, source, checked or check(source)


def _load(
    asked: TrainSettings,
    base: Base,
    source: ModelSource,
    observer: Observer,
    foresight: Foresight | None,
    given: Given,
) -> tuple[setup.LoadedBase, LoraConfig]:
    """The model, with the new tokens that are asked for, and what its adapter trains."""
    lora = asked.lora_config(asked.method)
    observer.phase("Loading the model")
    if isinstance(base.quantization, FileConfig):
        observer.note("base: in the GGUF file's own bits, mapped from it; --base-bits 16 expands it")
    if foresight is not None:
        foresight.before_loading(source)
        # No process loads the model before all have measured the free memory.
        ranks.barrier()
    loaded = setup.load_for_training(base, source, lora.modules_to_save or (), given)
    lora = with_heads(loaded.model, lora)
    if asked.new_tokens is not None and method_of(base.method).has_adapter:
        lora = add_new_tokens(loaded.model, loaded.tokenizer, new_tokens(asked.new_tokens), lora)
    return loaded, lora


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Rows:
    """A run's rows, and how the record describes them and the libraries that encoded them."""

    data: setup.Data
    described: dict[str, JsonObject]
    versions: dict[str, str]


def _encode(
    asked: TrainSettings,
    base: Base,
    reading: Reading,
    learned: Learned,
    loaded: setup.LoadedBase,
    texts: setup.Texts,
    observer: Observer,
) -> _Rows:
    observer.phase("Encoding data")
    data = LEARNING[learned.objective](learned).encode(reading, loaded.tokenizer, texts)
    setup.check_positions(loaded.model, [one.dataset for one in (data.train, data.evaluation) if one is not None])
    described, versions = data.describe(), versions_of(PACKAGES)
    described["train"] |= setup.other_hashes(base.adapter, asked.new_tokens)
    _check_alike(described, loaded.facts, versions)
    return _Rows(data=data, described=described, versions=versions)


def _make_step(
    asked: TrainSettings,
    base: Base,
    learned: Learned,
    lora: LoraConfig,
    before: RunRecord | None,
    loaded: setup.LoadedBase,
    rows: _Rows,
    observer: Observer,
) -> _Step:
    """The model with faster parts, laid over the processes, and what it learns."""
    model, data = loaded.model, rows.data
    prepared = _accelerated(asked, base, learned.objective, before, loaded, data, observer)
    if OBJECTIVES[learned.objective].has_answers:
        setup.check_labels(data)
        if base.strategy != "fsdp":
            setup.warn_of_untrained_tokens(model, loaded.tokenizer, data, lora)
    # One checkpoint more is being written, and the result takes as much.
    check_space(asked.output, checkpoint_bytes(model) * (asked.save_total_limit + 3))
    pace = part_of(Pace, asked)
    objective = LEARNING[learned.objective](learned).objective(loaded, data, pace, prepared.layout)
    pace = paced(objective, pace)
    # The answers of rewards are not there yet.
    if OBJECTIVES[learned.objective].has_answers and not asked.packing:
        first = next(own_parts(objective.order(0)))
        if words := beginnings_in_words(token_rows(objective.rows, first), prepared.apart):
            observer.note(words)
    measured = None
    if before is None and asked.products == "auto" and prepared.computing.products == "int8":
        inputs = [dataclasses.asdict(learned), dataclasses.asdict(lora)]
        inputs += [rows.described["train"], loaded.facts, rows.versions]
        tokens = data.train.report.tokens / len(data.train.dataset)
        prepared, measured = _measured(prepared, loaded, objective, pace, tokens, inputs, observer)
    if base.strategy == "fsdp" and not is_unit(model):
        shard(model, mesh_of_all(loaded.device.type), trains_all=method_of(base.method).trains_all)
    return _Step(objective=objective, pace=pace, prepared=prepared, measured=measured)


def _search(
    asked: TrainSettings,
    rates: Sequence[float],
    learned: Learned,
    loaded: setup.LoadedBase,
    rows: _Rows,
    step: _Step,
    observer: Observer,
) -> RateSearch:
    """The short runs of ``rates``, and the best of them."""
    computing = step.prepared.computing

    def loop_of(rate: float, pace: Pace, data: setup.Data) -> Loop:
        objective = LEARNING[learned.objective](learned).objective(loaded, data, pace, step.prepared.layout)
        updates, pace = part_of(Updates, asked, rate=rate), paced(objective, pace)
        return make_loop(objective, pace, updates, loaded, computing, asked.output, progress=Progress())

    options = {n: value for n, value in asked.model_dump(mode="json").items() if n not in NOT_OF_THE_LOSS}
    return search(
        rates,
        rows.data,
        loaded.model,
        loop_of,
        part_of(Pace, asked),
        steps=step.pace.total_steps,
        budget=asked.budget,
        output=asked.output,
        inputs=[options, rates, rows.described, loaded.facts, rows.versions, computing.products, step.measured],
        observer=observer,
    )


def _reference(base: Base, lora: LoraConfig, loaded: setup.LoadedBase, rows: _Rows, step: _Step) -> Reference:
    """What is known of the run's reference: nothing yet, but on what it depends beside the tokens."""
    facts = {name: loaded.facts[name] for name in ("sha256", "architecture", "dtype", "quantization")}
    computing, train = step.prepared.computing, rows.described["train"]
    inputs: list[object] = [facts, loaded.device.type, loaded.autocast, computing.fast, rows.versions]
    # An adapter that is continued is the reference, and added tokens have rows in the base.
    inputs += [{name: train.get(name) for name in ("adapter_sha256", "new_tokens_sha256")}]
    # These start from a base of their own.
    inputs += [[dataclasses.asdict(lora), base.seed] if lora.init.kind in ("pissa", "loftq") else None]
    # The scales of 8 bits are those of the first rows.
    layers = sorted(pairs_in_eight_bits(loaded.model))
    inputs += [[train["sha256"], train["tokens"], layers] if layers else None]
    return Reference(key_of(*inputs), in_eight_bits=bool(layers))


def _check_alike(described: Mapping[str, Fields], facts: Fields, versions: Mapping[str, str]) -> None:
    """Refuse processes that read other data, models or files, or have other versions of the libraries."""
    others = {key: value for key, value in described["train"].items() if key.endswith("_sha256")}
    ranks.check_alike(
        {
            **{f"the sha256 of the {name} data": part["sha256"] for name, part in described.items()},
            # A different tokenizer makes a different number of tokens of the same rows.
            **{f"the number of tokens of the {name} data": part["tokens"] for name, part in described.items()},
            **{f"the sha256 of the {key.removesuffix('_sha256').replace('_', ' ')}": others[key] for key in others},
            "the sha256 of the model": facts["sha256"],
            **{f"the version of {name}": version for name, version in versions.items()},
        }
    )


def _accelerated(
    options: StepOptions,
    base: Base,
    objective: ObjectiveName,
    before: RunRecord | None,
    loaded: setup.LoadedBase,
    data: setup.Data,
    observer: Observer,
) -> Prepared:
    """The model with faster parts. A resumed run keeps the products that it took, also on another machine."""
    model, of_run = loaded.model, (base.method, objective, base.strategy)
    if before is not None and before.products:
        products, why = before.products, "as before"
    else:
        products, why = choose(options, *of_run, model)
    if options.products == "auto" and takes_eight_bit(*of_run, options) and why != TO_BE_MEASURED:
        observer.note(f"frozen products: {_dtype_of(products, loaded)} ({why})")
    ids = functools.partial(setup.calibration_ids, data.train.dataset, options.max_length, model)
    prepared = prepare_model(model, base.method, objective, part_of(Computing, options, products=products), ids)
    if before is not None and products == "int8" and before.products_measured:
        prepared = taken(prepared, model, products, before.products_measured["left"])
    return prepared


def _dtype_of(products: Products, loaded: setup.LoadedBase) -> str:
    """What the products are computed in, for people: without 8 bits the base's dtype, whichever it is."""
    return products if products == "int8" else str(loaded.dtype).removeprefix("torch.")


def _measured(
    prepared: Prepared,
    loaded: setup.LoadedBase,
    objective: Objective,
    pace: Pace,
    tokens: float,
    inputs: Sequence[object],
    observer: Observer,
) -> tuple[Prepared, JsonObject | None]:
    """The model with the products that a measurement on the run's rows, of so many ``tokens`` each, admits, and the
    measurement, if there is one.

    ``inputs``: with the processor all that it depends on, as JSON; it is kept by these.
    """
    rows = affordable_rows(pace.batch_size, tokens, pace.total_steps * pace.gradient_accumulation)
    if rows:
        observer.phase("Measuring 8-bit products")
    found = judge(loaded.model, objective, loaded.autocast, rows, kept_file(cpu_name(), *inputs))
    products: Products = "bfloat16" if found is None else found.products
    observer.note(f"frozen products: {_dtype_of(products, loaded)} ({TOO_SHORT if found is None else found})")
    prepared = taken(prepared, loaded.model, products, [] if found is None else found.left)
    return prepared, None if found is None else dataclasses.asdict(found)


def _predicted_peak(
    step: _Step,
    packed_length: int | None,
    objective: ObjectiveName,
    model: nn.Module,
    foresight: Foresight | None,
) -> tuple[int | None, int | None]:
    """The predicted peak in bytes, over training and evaluation, and that of an idle process; None without a plan.
    Packed rows count as full. Batches differ between processes; the largest prediction is taken."""
    found = None
    if foresight is not None:
        batch = step.objective.largest_batch(coming_batches(step.objective, step.pace))
        if packed_length is not None:
            batch = dataclasses.replace(batch, rows=step.pace.batch_size, tokens=packed_length)
        found = foresight.before_training(batch, step.objective.largest_evaluation(), mapped_files(model))
        if found is not None and (more := _kept_bytes(batch, objective, model, foresight)):
            found = found[0] + more, found[1]
    return max((one for one in ranks.gathered(found) if one is not None), default=(None, None))


def _kept_bytes(batch: MicroBatch, objective: ObjectiveName, model: nn.Module, foresight: Foresight) -> int:
    """The bytes of weights that are rounded once, where a pass has few tokens and the plan has room."""
    if batch.rows * OBJECTIVES[objective].sequences * batch.tokens > MOST_ROUNDED_ONCE:
        return 0
    more = rounded_bytes(model)
    if not more or not foresight.keeps_rounded(more):
        return 0
    keep_rounded(model)
    return more


def _record(
    asked: TrainSettings, base: Base, loaded: setup.LoadedBase, prepared: Prepared, updates: Updates, **known: Any
) -> RunRecord:
    """The record of a run that begins. ``known``: further fields."""
    model, rates = loaded.model, None
    settings = asked.model_dump(mode="json")
    taken = resolved(settings, updates.rate)
    if updates.loraplus_ratio is not None and has_adapter(model):
        options = {"rate": updates.rate, "ratio": updates.loraplus_ratio, "weight_decay": updates.weight_decay}
        rates = {group["group"]: group["lr"] for group in loraplus_groups(model, **options)}
    computing = prepared.computing
    return RunRecord(
        settings=taken,
        asked={n: value for n, value in settings.items() if value != {**taken, "products": computing.products}[n]},
        method=base.method,
        seed=base.seed,
        total_parameters=count_weights(model),
        base_model=loaded.facts,
        devices=ranks.count(),
        strategy=(base.strategy or "ddp") if ranks.count() > 1 else None,
        learning_rates=rates,
        products=computing.products,
        frozen_bytes=max(ranks.gathered(frozen_bytes(model))),
        device={
            **device_record(loaded.device, loaded.dtype, updates.optimizer),
            "reason": loaded.device_reason,
            "acceleration": str(prepared.accelerated or ("off" if computing.fast else "off (--no-fast)")),
            "rows": f"padded: {prepared.padded}" if prepared.padded else "laid end to end, without padding",
            "common_beginnings": f"laid in each row: {prepared.apart}" if prepared.apart else "laid once",
        },
        **known,
    )


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

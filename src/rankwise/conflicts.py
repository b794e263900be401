"""Options of `rankwise train` that do not go together. Everything here follows from the settings."""

from __future__ import annotations

from collections.abc import Iterator

from rankwise.config import StepOptions, TrainSettings, keeps_file_bits
from rankwise.errors import ConfigError
from rankwise.methods import METHODS, either, method_of, methods_with
from rankwise.objectives import GENERATIONS, MAX_COMPLETION_LENGTH, OBJECTIVES, ObjectiveName
from rankwise.options import Settings, flag

# The losses that --label-smoothing changes.
SMOOTHED = ("robust",)
NEED_EVALUATIONS = ("early_stopping", "eval_steps", "eval_limit")
NO_RETAIN = "--retain-margin says how much of --retain may be lost; add --retain D."
NOT_OF_LABELS = ("chat_template", "new_tokens", "retain")
# Optimizers that compute the same on shards as on whole weights.
ELEMENTWISE = ("adamw_torch", "adamw_torch_fused", "sgd", "adagrad", "rmsprop")


def check_conflicts(given: TrainSettings, processes: int) -> None:
    """Raise ConfigError (RW112) with all conflicts of a run in so many processes; RW763 for an unknown loss."""
    check_objective(given, given.objective)
    facts = OBJECTIVES[given.objective]
    if given.loss_type is not None and given.loss_type not in facts.losses:
        raise ConfigError(
            "RW763",
            f"--loss-type {given.loss_type} does not exist for --objective {given.objective}; give "
            f"{', '.join(facts.losses)}.",
        )
    check_sharing(given.objective, given.strategy, processes)
    found = [*_of_steps(given), *_of_search(given, processes), *_of_processes(given, processes)]
    if facts.of_preferences:
        found += _of_preferences(given)
    elif facts.of_rewards:
        found += _of_rewards(given, processes)
    elif facts.of_labels:
        found += _of_labels(given)
    if found:
        raise ConfigError("RW112", " ".join(found))


def check_objective(given: Settings, objective: ObjectiveName) -> None:
    """Raise ConfigError (RW112) for options that were set and do not apply to ``objective``."""
    own, defaults = OBJECTIVES[objective].options, given.defaults()
    others = sorted({name for facts in OBJECTIVES.values() for name in facts.options} - set(own))
    idle = [flag(name) for name in others if name in defaults and getattr(given, name) != defaults[name]]
    if idle:
        raise ConfigError(
            "RW112",
            f"{', '.join(idle)} does not apply to --objective {objective}, which takes "
            f"{', '.join(map(flag, own)) or 'none'}; leave it out, or give another objective.",
        )


def check_sharing(objective: ObjectiveName, strategy: str | None, processes: int) -> None:
    """Raise ConfigError (RW112) for a ``--strategy`` that does not go with the objective or the number of processes."""
    if strategy is not None and processes == 1:
        raise ConfigError(
            "RW112", f"--strategy {strategy} is for several processes, and this is one; give --devices N too."
        )
    if OBJECTIVES[objective].of_rewards and strategy == "fsdp":
        raise ConfigError(
            "RW112",
            f"--objective {objective} does not go with --strategy fsdp, with which all processes must run each layer "
            "equally often, since their answers differ in length; take --strategy ddp.",
        )


def _of_steps(given: TrainSettings) -> Iterator[str]:
    if given.retain is None and given.retain_margin != given.defaults()["retain_margin"]:
        yield NO_RETAIN
    idle = [flag(name) for name in NEED_EVALUATIONS if getattr(given, name) is not None]
    idle = [name for name in idle if not (name == "--eval-limit" and given.retain)]
    if idle and given.eval_data is None:
        yield f"{', '.join(idle)}: needs evaluations; give --eval-data too."
    if given.warmup_steps and given.lr_scheduler_type == "constant":
        yield "--warmup-steps has no effect on --lr-scheduler-type constant; take constant_with_warmup."
    if given.packing and given.neftune_noise_alpha is not None:
        yield (
            "--packing lays rows end to end, and the noise of --neftune-noise-alpha depends on a row's length; leave "
            "one of them out."
        )
    if given.init == "loftq" and not method_of(given.method).four_bits:
        instead = either(methods_with(four_bits=True))
        yield f"--init loftq corrects 4-bit rounding, which --method {given.method} does not have; take {instead}."
    of_run = given.method, given.objective, given.strategy, given
    if given.products == "int8" and not takes_eight_bit(*of_run):
        yield (
            "--products int8 is for an adapter, fused operators and whole weights, and not for a reference beside "
            "--init pissa; leave it out."
        )
    yield from _of_file_bits(given)
    if given.adapter is not None and (started := _started(given.init, given.new_tokens)):
        yield f"{started} starts an adapter, and --adapter continues one; leave one of them out."


def _of_file_bits(given: TrainSettings) -> Iterator[str]:
    """Conflicts of a base in its GGUF file's own bits."""
    is_file, row = given.model.lower().endswith(".gguf"), method_of(given.method)
    if not keeps_file_bits(given.base_bits, given.method, is_file=is_file, on_cpu=given.device in ("auto", "cpu")):
        return
    if not row.has_adapter or row.four_bits or row.is_guest:
        does = "makes 4 bits of its own" if row.four_bits else "has no LoRA or DoRA over it"
        yield f"--base-bits file keeps the base as the file has it, and --method {given.method} {does}; leave it out."
    started = _started("default" if given.init == "loftq" else given.init, given.new_tokens)
    whole = started or ("--strategy fsdp" if given.strategy == "fsdp" else "")
    if whole:
        yield f"{whole} changes or splits the base's weights, which stay in their file; give --base-bits 16."


def takes_eight_bit(method: str, objective: ObjectiveName, strategy: str | None, given: StepOptions) -> bool:
    """Whether frozen products may be in 8 bits. A reference computes as the step does, but for what PiSSA took out of
    the base."""
    is_whole = given.fast and strategy != "fsdp" and given.for_merge is None
    facts = OBJECTIVES[objective]
    is_alike = not given.init.startswith("pissa") or not (facts.of_preferences or facts.of_rewards)
    return method_of(method).has_adapter and is_whole and is_alike


def _started(init: str, new_tokens: str | None) -> str:
    """The option that changes how an adapter starts, or an empty string."""
    kind = init.partition(":")[0]
    return "--new-tokens" if new_tokens else f"--init {kind}" if kind != "default" else ""


def _of_search(given: TrainSettings, processes: int) -> Iterator[str]:
    if not given.searches:
        if given.budget is not None:
            yield "--budget needs a search of the learning rate; add --learning-rate auto."
        return
    wrong = [f"--objective {given.objective}"] if not OBJECTIVES[given.objective].of_demonstrations else []
    wrong += [f"{processes} processes"] if processes > 1 else []
    if wrong:
        yield (
            f"--learning-rate auto needs --objective sft and one process, and this run has {' and '.join(wrong)}; give "
            "the rate."
        )


def _of_preferences(given: TrainSettings) -> Iterator[str]:
    facts = OBJECTIVES[given.objective]
    loss = given.loss_type or facts.losses[0]
    if given.label_smoothing and loss not in SMOOTHED:
        yield (
            f"--label-smoothing has no effect on --loss-type {loss}; leave it out, or give one of "
            f"{', '.join(SMOOTHED)}."
        )
    if loss == "robust" and given.label_smoothing >= 0.5:
        yield "--loss-type robust turns preferences around from --label-smoothing 0.5 on; give less."
    yield from without_reference(given.objective, given.method)
    # Of one process.
    if facts.rows == "mark" and given.batch_size < 2:
        yield (
            f"--objective {given.objective} compares each answer with the others of its batch, and --batch-size "
            "is 1; give 2 or more."
        )


def without_reference(objective: ObjectiveName, method: str) -> Iterator[str]:
    """The conflict of preferences with a method that leaves no reference."""
    if OBJECTIVES[objective].of_preferences and not method_of(method).has_adapter:
        yield (
            f"--objective {objective} needs the base as reference, which --method {method} changes or cannot restore; "
            f"give {either(methods_with(has_adapter=True))}."
        )


def _of_labels(given: TrainSettings) -> Iterator[str]:
    idle = [flag(name) for name in NOT_OF_LABELS if getattr(given, name) is not None]
    if idle:
        yield f"{', '.join(idle)} does not go with --objective classify, whose model writes no text."
    if given.strategy == "fsdp":
        yield "--objective classify trains its head whole, and --strategy fsdp shards it; take ddp."
    if method_of(given.method).is_guest:
        yield f"--objective classify takes {', '.join(METHODS)}, and not --method {given.method}."


def _of_rewards(given: TrainSettings, processes: int) -> Iterator[str]:
    weights, rewards = given.reward_weights, given.reward or ()
    if weights is not None and len(weights) != len(rewards):
        yield f"--reward-weights has {len(weights)} factors and there are {len(rewards)} rewards; give one for each."
    answers = given.batch_size * given.gradient_accumulation * processes
    group, longest = given.num_generations or GENERATIONS, given.max_completion_length or MAX_COMPLETION_LENGTH
    if answers % group:
        shared = f" x {processes} processes" if processes > 1 else ""
        yield (
            f"A step has --batch-size {given.batch_size} x --gradient-accumulation {given.gradient_accumulation}"
            f"{shared} = {answers} answers, which is not a multiple of --num-generations {group}: all answers to a "
            "prompt belong to one step; change one of these numbers."
        )
    if longest >= given.max_length:
        yield (
            f"--max-completion-length {longest} leaves no tokens for a prompt within --max-length {given.max_length}, "
            "which counts prompt and answer; raise --max-length or lower the other."
        )
    if given.beta and not method_of(given.method).has_adapter:
        yield (
            f"--beta {given.beta:g} keeps the model near its reference, the base without adapter, and --method "
            f"{given.method} would need a second model for that; leave --beta out, or take "
            f"{either(methods_with(has_adapter=True))}."
        )


def _of_processes(given: TrainSettings, processes: int) -> Iterator[str]:
    if processes > 1 and method_of(given.method).is_guest:
        yield f"--method {given.method} trains in one process; leave --devices out."
    if processes > 1 and given.retain is not None:
        yield "--retain is measured in one process; leave --devices out, or measure the run with `rankwise evaluate`."
    if given.strategy != "fsdp":
        return
    whole = _started(given.init, given.new_tokens) or (f"--for-merge {given.for_merge}" if given.for_merge else "")
    if given.enable_lora and method_of(given.method).kind == "dora":
        # The magnitudes of the other rows, which are saved too, are norms of the base's rows.
        whole = f"--enable-lora with --method {given.method}"
    if whole:
        yield f"{whole} needs whole weights, which --strategy fsdp does not read; take ddp."
    if method_of(given.method).trains_all and given.optimizer not in ELEMENTWISE:
        yield (
            f"--strategy fsdp with --method full trains shards, and --optimizer {given.optimizer} may need whole "
            f"weights; take {', '.join(ELEMENTWISE)}, or --strategy ddp."
        )

"""``rw.train``, and what ``rankwise train`` does in one process: fine-tune, and say what came of it. ``rw.batches``:
what a run would see, for a training loop of one's own.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.config import TrainSettings
from rankwise.errors import ConfigError, DataError, RankwiseError, is_out_of_memory, out_of_memory
from rankwise.evaluation.tasks.names import retained_from
from rankwise.foreign import Fields, JsonObject
from rankwise.labels import in_words
from rankwise.methods import method_of
from rankwise.objectives import OBJECTIVES
from rankwise.options import flag
from rankwise.planning.workload import uncollected
from rankwise.records import RunRecord, load_record, read_metrics
from rankwise.reports.numbers import byte_size, duration, plural, rate
from rankwise.reports.summary import change_of
from rankwise.training import ranks
from rankwise.verbs.output import Output, Shown, watching
from rankwise.verbs.settings import GenerateSettings, apart, check_paths, check_tokenizer, settings_of, takes

if TYPE_CHECKING:
    from torch import Tensor

    from rankwise.planning.guard import MemoryGuard
    from rankwise.training.parts import Given
    from rankwise.training.watch import EvaluationInfo, StepInfo
    from rankwise.verbs.speaker import Speaker


@takes(TrainSettings)
def train(
    *,
    tokenizer: Any = None,
    on_step: Callable[[StepInfo], object] | None = None,
    on_evaluation: Callable[[EvaluationInfo], Mapping[str, float] | None] | None = None,
    on_save: Callable[[Path], object] | None = None,
    quiet: bool = False,
    **options: Any,
) -> Run:
    """Fine-tune a model as `rankwise train` does, and return the run.

    The keywords are its options. ``model`` may be a model in memory, with its ``tokenizer``: the run adapts that very
    object. ``data`` and ``eval_data`` may be a ``datasets.Dataset`` or a list of dicts. ``on_step``, ``on_evaluation``
    and ``on_save`` are called with each step, each evaluation and the folder of each checkpoint; the numbers that
    ``on_evaluation`` returns, by name, are logged. StopIteration in one of them ends the run; another exception stops
    it, after the step is saved, and goes on to the caller. Ctrl-C stops it in the same way, and ``resume=True``
    continues it. ``quiet`` shows no progress.

    Raises what the command reports, by the same classes and codes.
    """
    began = time.monotonic()
    from rankwise.acceleration import give_back_freed_memory
    from rankwise.training.parts import Given
    from rankwise.training.states import undisturbed_random_states
    from rankwise.training.watch import Callbacks

    options, model, rows = apart(options, tokenizer)
    callbacks = Callbacks(on_step=on_step, on_evaluation=on_evaluation, on_save=on_save)
    given = Given(model=model, tokenizer=tokenizer, rows=rows, callbacks=callbacks)
    settings = settings_of(TrainSettings, options, settings_of_the_run)
    if (settings.devices or 1) > 1 and ranks.place() is None:
        raise ConfigError(
            "RW117", "rw.train is one process; start several by `rankwise train --devices N` or torchrun."
        )
    output = Output()
    output.console.quiet = quiet or not ranks.is_writer()
    try:
        with undisturbed_random_states():
            record = carry_out(settings, output, began, given)
    except RankwiseError as error:
        # A notebook keeps the last error, and with its frames the model.
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        gc.collect()
        give_back_freed_memory()
    return Run(settings.output, record, None if model is None else (model, tokenizer))


@dataclasses.dataclass(frozen=True, repr=False)
class Run(Shown):
    """A finished run. ``adapter`` is its folder, which holds the adapter; of ``method="full"`` the model."""

    adapter: Path
    record: RunRecord
    # The model that it adapted in memory, and its tokenizer.
    given: tuple[Any, Any] | None = None

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of its ``metrics.jsonl``."""
        return [dict(line) for line in read_metrics(self.adapter)]

    def frame(self) -> Any:
        """``metrics`` as a pandas DataFrame."""
        import pandas

        return pandas.DataFrame(self.metrics)

    @property
    def loss(self) -> float | None:
        """The evaluation loss of the step that is kept; without evaluation data the mean training loss."""
        return self.record.train_loss if self.record.eval_loss is None else self.record.eval_loss

    @property
    def summary(self) -> str:
        return "\n".join(f"{label:<12}{text}" for label, text in summary(self.adapter, self.record))

    @property
    def model(self) -> Any:
        """The model with its adapter: that in memory, or loaded at the first use."""
        return self._speaker.model

    @property
    def tokenizer(self) -> Any:
        return self._speaker.tokenizer

    def generate(
        self, prompt: str, *, max_new_tokens: int = 128, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
    ) -> str:
        """The answer to a prompt, asked in the form of the training rows."""
        asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p, "seed": seed}
        return next(iter(self._answers(prompt, asked).values()))

    def compare(self, prompt: str, *, max_new_tokens: int = 128) -> dict[str, str]:
        """The answers of the trained model and of its base: {"tuned": ..., "base": ...}."""
        return self._answers(prompt, {"max_new_tokens": max_new_tokens, "compare": True})

    def show(self, output: Output) -> None:
        output.line(self.summary)

    def _repr_html_(self) -> str:
        plot = self.adapter / "loss.svg"
        curve = plot.read_text(encoding="utf-8") if plot.is_file() else ""
        return f'{super()._repr_html_()}<div style="max-width:36em">{curve}</div>'

    def _answers(self, prompt: str, asked: JsonObject) -> dict[str, str]:
        from rankwise.verbs.speaker import Conversation

        how = settings_of(GenerateSettings, {**self._speaker.settings.model_dump(exclude_unset=True), **asked})
        said = dataclasses.replace(self._speaker, settings=how).answers(
            Conversation(({"role": "user", "content": prompt},))
        )
        return {name: one.text for name, one in said.items()}

    @functools.cached_property
    def _speaker(self) -> Speaker:
        from rankwise.adapters.folder import base_model_of
        from rankwise.verbs.speaker import load_speaker

        is_whole = method_of(self.record.method).trains_all
        own = {"model": str(self.adapter)} if is_whole else {"adapter": self.adapter}
        own |= {name: self.record.settings[name] for name in ("device", "trust_remote_code")}
        name = str(self.adapter) if is_whole else base_model_of(self.adapter)
        return load_speaker(settings_of(GenerateSettings, own), name, self.record, self.given)[0]


# Options that --resume does not take from the record: code of a model, for one, runs on explicit request only.
NOT_OF_THE_RUN = {"output", "resume", "overwrite", "trust_remote_code"}


def settings_of_the_run(given: Fields) -> Fields:
    """With --resume: the settings in ``run.json`` of --output, so that no option has to be repeated.

    Raises RunError (RW503 to RW505) if the folder holds no run to resume, DataError (RW201) for missing data, and
    ConfigError (RW770) if a Python file of its rewards is not given again.
    """
    if given.get("resume") is not True or not isinstance(given.get("output"), str):
        return {}
    from rankwise.training.checkpoints import check_output

    folder = Path(given["output"])
    check_output(folder, resume=True, overwrite=given.get("overwrite") is True)
    known = set(TrainSettings.model_fields) - NOT_OF_THE_RUN
    if "epochs" in given:
        # The run's own max_steps would override the given epochs.
        known.discard("max_steps")
    settings = load_record(folder).settings
    _check_rewards(folder, settings, given)
    found = {name: value for name, value in settings.items() if name in known}
    _check_data({name: value for name, value in found.items() if name not in given})
    return found


def _check_rewards(folder: Path, settings: Fields, given: Fields) -> None:
    """Raise ConfigError (RW770) for Python code that the run names: it runs only when the user gives it again."""
    specs = settings.get("reward") or ()
    if "reward" not in given and any(".py:" in spec for spec in specs):
        again = " ".join(f"--reward {spec}" for spec in specs)
        raise ConfigError(
            "RW770",
            f"the run in {folder} was rewarded by a Python file, and such a file runs only on request; pass it again: "
            f"{again}.",
        )


def _check_data(settings: Fields) -> None:
    """Raise DataError (RW201) for missing files that the run's record names and the user did not write."""
    from rankwise.data import check_there

    found = {**settings, "retain": retained_from(settings.get("retain"))[1]}
    for name in ("data", "eval_data", "retain"):
        if isinstance(path := found.get(name), str):
            try:
                check_there(path)
            except DataError:
                option = flag(name)
                text = f"there is no file or folder {path}, which the run took as {option}; give it with {option} PATH."
                raise DataError("RW201", text) from None


def check(settings: TrainSettings, in_memory: Collection[str] = ()) -> None:
    """Raise what a run would raise for files that are not there, before torch is loaded."""
    from rankwise.training.checkpoints import check_output

    _, retained = retained_from(settings.retain)
    named = {n: None if n in in_memory else getattr(settings, n) for n in ("model", "data", "eval_data")}
    check_paths(model=named.pop("model"), data=(*named.values(), retained), output=settings.output)
    # The run checks this again when it holds the folder.
    check_output(settings.output, resume=settings.resume, overwrite=settings.overwrite)


def carry_out(settings: TrainSettings, output: Output, began: float, given: Given | None = None) -> RunRecord:
    """Train in this process, with the memory plan, the retained rows, and a display of the progress."""
    given_names = () if given is None else (*given.rows, *(["model"] if given.model is not None else []))
    check(settings, given_names)
    # While torch and transformers are imported, collections free nothing and take a quarter of the time.
    with uncollected():
        from rankwise.evaluation.retained import RetainedRows
        from rankwise.training.parts import part_of
        from rankwise.training.run import train_as_asked
        from rankwise.training.setup import with_adapters_options
        from rankwise.training.watch import SilentObserver
    asked = with_adapters_options(settings)
    retention = None if asked.retain is None else part_of(RetainedRows, asked)
    guard = _guard(asked.model_dump(), output)
    foresight = guard if "model" not in given_names else None
    try:
        watched = watching(output, every=settings.logging_steps, of_rewards=OBJECTIVES[settings.objective].of_rewards)
        with watched if ranks.is_writer() else contextlib.nullcontext(SilentObserver()) as observer:
            return train_as_asked(asked, observer, foresight, retention, began, given)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise out_of_memory(error, guard.advice()) from error


def _guard(settings: Fields, output: Output) -> MemoryGuard:
    from rankwise.acceleration import anonymous_memory_bytes
    from rankwise.planning.guard import MemoryGuard

    where = ranks.place()
    started = {} if where is None else {"devices": where.count}
    return MemoryGuard(
        {**settings, **started},
        output.line,
        anonymous_memory_bytes,
        ignore=settings["ignore_plan"],
        sharers=1 if where is None else where.local_count,
    )


def summary(folder: Path, record: RunRecord) -> Iterator[tuple[str, str]]:
    """The results of a finished run, as labelled lines."""
    yield "reward" if OBJECTIVES[record.objective].of_rewards else "loss", change_sentence(folder, record)
    if record.kept_step is not None:
        because = f": {record.kept_because}" if record.kept_because else ""
        yield "kept", f"step {record.kept_step} of {record.steps}{because}"
    if "reward_accuracy" in record.eval_rewards:
        accuracy, margin = (record.eval_rewards.get(f"reward_{name}") or 0.0 for name in ("accuracy", "margin"))
        yield (
            "rewards",
            f"{accuracy:.1%} of the evaluation pairs have the better answer ahead, by {margin:.3g} on average",
        )
    if (answers := record.answers) is not None:
        is_few = 2 * answers["changed"] <= answers["asked"]
        few = "; to change them, train on demonstrations first and continue with --adapter" if is_few else ""
        yield "answers", f"{answers['changed']} of {answers['asked']} greedy answers differ from the reference's{few}"
    if OBJECTIVES[record.objective].of_labels and "eval" in record.data:
        yield "answers", f"{in_words(record.eval_rewards, record.data['eval']['rows'])} on the evaluation data"
    if record.trainable_parameters is not None and record.total_parameters:
        share = 100 * record.trainable_parameters / record.total_parameters
        yield "trained", f"{record.trainable_parameters:,} parameters, {share:.2f} % of the model"
    if (kept := record.retained) is not None:
        what = "question" if kept.get("unit") == "question" else "row"
        rows = f"on {plural(kept['rows'], what)} of {kept['source']}"
        yield "retained", f"{kept['base']:.4f} -> {kept['loss']:.4f} {rows}: {kept['verdict']} ({change_of(kept)})"
    if record.rate_search is not None:
        chosen, trials = record.rate_search["chosen"], record.rate_search["trials"]
        tried = plural(len({trial["learning_rate"] for trial in trials}), "rate")
        steps = plural(sum(trial["steps"] for trial in trials), "step")
        yield "rate", f"{rate(chosen)}, the best of {tried} in short runs of {steps} together"
    yield "speed", _speed(record)
    yield "written", f"{folder}  (curve: {folder / 'loss.svg'})"
    row = method_of(record.method)
    # `generate` does not load methods of other distributions.
    if OBJECTIVES[record.objective].of_labels:
        yield "try", f"rankwise predict --{'model' if row.trains_all else 'adapter'} {folder} --data D"
    elif not row.is_guest:
        kind, compare = ("model", "") if row.trains_all else ("adapter", " --compare")
        yield "try", f'rankwise generate --{kind} {folder} --prompt "..."{compare}'


def change_sentence(folder: Path, record: RunRecord) -> str:
    """The loss, or of rewards the mean reward, before and after; without evaluation data, the first and the last line
    of ``metrics.jsonl``.
    """
    is_reward = OBJECTIVES[record.objective].of_rewards
    if record.initial_eval_loss is not None and record.eval_loss is not None:
        # The evaluation loss of rewards is the negative of their mean.
        before, after = (-loss if is_reward else loss for loss in (record.initial_eval_loss, record.eval_loss))
        return f"{before:.4f} -> {after:.4f} on the evaluation data"
    figure, trained_on = ("reward", "training prompts") if is_reward else ("loss", "training data")
    logged = [line[figure] for line in read_metrics(folder) if line.get(figure) is not None]
    if not logged:
        return "not logged"
    return f"{logged[0]:.4f} -> {logged[-1]:.4f} on the {trained_on}, first and last as logged (no --eval-data)"


def _speed(record: RunRecord) -> str:
    several = record.devices > 1
    together = f" of {record.devices} processes together ({record.strategy})" if several else ""
    peak = f"peak memory{' of one process' if several else ''} {byte_size(record.peak_memory_bytes)}"
    if record.predicted_peak_memory_bytes is not None:
        peak += f" (predicted {byte_size(record.predicted_peak_memory_bytes)})"
    speed = "–" if record.tokens_per_second is None else f"{record.tokens_per_second:,.0f}"
    return f"{speed} tokens/s{together}, {peak}, {duration(record.wall_seconds)} in all"


def batches(
    data: Any,
    tokenizer: Any,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    seed: int = 0,
    epochs: int = 1,
    packing: bool = False,
    chat_template: str | Path | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    skip_bad_rows: int = 0,
) -> Iterator[dict[str, Tensor]]:
    """The tensors that ``model(**batch)`` takes, for each micro-batch of a run of ``rw.train`` over demonstrations.

    ``data``: as of ``rw.train``, also a ``datasets.Dataset`` or a list of dicts. Rows and their order are those of a
    run with this ``seed``; the labels of prompts and padding are -100. With ``packing`` rows lie end to end, (1, T),
    for a model after ``optimize_for_training``.

    Raises, at the call, DataError as a run does, and ConfigError: RW103 a number below 1, RW115 no tokenizer.
    """
    from rankwise.acceleration.layouts import Layout
    from rankwise.data import encode_rows, read_rows, read_template
    from rankwise.training.batches import laid_out, packed, shuffled

    check_tokenizer(tokenizer)
    numbers = {"batch_size": batch_size, "max_length": max_length, "epochs": epochs}
    if small := [name for name, number in numbers.items() if number < 1]:
        raise ConfigError("RW103", f"{' and '.join(small)} must be at least 1.")
    template = None if chat_template is None else read_template(Path(chat_template))
    rows = read_rows(
        data, prompt_column=prompt_column, completion_column=completion_column, skip_bad_rows=skip_bad_rows
    )
    encoded = encode_rows(
        rows, tokenizer, max_length=max_length, chat_template=template, skip_bad_rows=skip_bad_rows
    ).dataset
    encoded = packed(encoded, max_length, seed) if packing else encoded
    layout: Layout = "flat" if packing else "padded"
    # As a run does for a tokenizer without a padding token.
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    orders = (shuffled(len(encoded), batch_size, seed + epoch) for epoch in range(epochs))
    steps = (laid_out([encoded[row] for row in rows], int(pad or 0), layout) for part in orders for rows in part)
    return (batch for batch, _ in steps)

"""The parts of a run that follow from its settings: what is learned, and the loop with its options and optimizer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rankwise.acceleration import offloaded
from rankwise.acceleration.loss import Layout
from rankwise.adapters.folder import labels_of
from rankwise.config import BETA, TrainSettings, logging_steps_of
from rankwise.conflicts import LOSS_TYPES
from rankwise.data import Rows, encode_preferences
from rankwise.data.formats import Format
from rankwise.data.objectives import LABELLED, PREFERENCE_FORMATS, encode_labelled, label_counts, labels_in, unpaired
from rankwise.errors import ConfigError, some_of
from rankwise.labels import Labels
from rankwise.training import ranks
from rankwise.training.loop import Loop, Objective, Options
from rankwise.training.optimizers import make_optimizer
from rankwise.training.preferences import Preferences, Scoring
from rankwise.training.setup import Data, LoadedBase, Texts, encode_data
from rankwise.training.sft import Classification, Demonstrations, packed
from rankwise.training.watch import Progress

# Default interval of checkpoints, and the shortest of evaluations, as a share of the run.
TENTH = 0.1
# An evaluation is at most this share of the run's time in all, where a row costs half of what it costs in training: its
# forward pass only.
EVALUATING, ROW_COST = 0.2, 0.5
PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}
Encode = Callable[[TrainSettings, PreTrainedTokenizerBase, Texts], Data]


@dataclasses.dataclass(frozen=True)
class Learning:
    """The parts of a run that depend on its objective."""

    # Encodes rows to token ids.
    encode: Encode
    # (settings, data, base, whether rows may be laid end to end) -> the objective.
    objective: Callable[[TrainSettings, Data, LoadedBase, bool], Objective]
    # The labels of the training rows, where the objective answers with labels.
    labels_of: Callable[[TrainSettings, Rows], Labels] | None = None
    # The data formats of the objective; None for those of demonstrations.
    formats: Collection[Format] | None = None
    # Whether the rows have labels.
    has_labels: bool = True


def learning_from_answers(objective: str) -> Learning:
    """The parts of ``sft``, ``dpo``, ``kto`` or ``classify``."""
    if objective == "sft":
        return Learning(encode_data, _demonstrations)
    if objective == "classify":
        return Learning(_encode_labelled, _classification, _labels, formats=LABELLED, has_labels=False)
    return Learning(_encode_preferences, _preferences, formats=PREFERENCE_FORMATS[objective])


def _of_batches(given: TrainSettings, base: LoadedBase) -> dict[str, int]:
    """The padding token, the rows of a micro-batch of all processes, and the seed of their order."""
    pad = int(base.tokenizer.pad_token_id or 0)
    return {"pad": pad, "size": given.batch_size * ranks.count(), "seed": given.seed}


def _demonstrations(given: TrainSettings, data: Data, base: LoadedBase, flat: bool) -> Demonstrations:
    rows = data.train.dataset
    return Demonstrations(
        base.model,
        packed(rows, given.max_length, given.seed) if given.packing else rows,
        data.evaluation and data.evaluation.dataset,
        **_of_batches(given, base),
        flat=flat or given.packing,
        label_smoothing=given.label_smoothing,
    )


def _encode_preferences(given: TrainSettings, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
    if given.objective == "kto":
        eval_rows = None if texts.eval_rows is None else unpaired(texts.eval_rows)
        texts = dataclasses.replace(texts, rows=unpaired(texts.rows), eval_rows=eval_rows)
    return encode_data(given, tokenizer, texts, encode_preferences)


def _preferences(given: TrainSettings, data: Data, base: LoadedBase, flat: bool) -> Preferences:
    together: Layout = "pairs" if given.objective == "dpo" else "flat"
    return Preferences(
        Scoring(base.model, together if flat else "padded"),
        data.train.dataset,
        data.evaluation and data.evaluation.dataset,
        **_of_batches(given, base),
        loss_type=given.loss_type or LOSS_TYPES[given.objective][0],
        beta=given.beta or BETA,
        max_length=given.max_length,
        label_smoothing=given.label_smoothing,
        desirable_weight=given.desirable_weight or 1.0,
        undesirable_weight=given.undesirable_weight or 1.0,
    )


def _labels(given: TrainSettings, rows: Rows) -> Labels:
    """The labels of the rows. Raises ConfigError (RW764) if the adapter to continue answers with others."""
    labels = labels_in(rows)
    trained = None if given.adapter is None else labels_of(given.adapter)
    if given.adapter is not None and trained != labels:
        has = "writes text" if trained is None else f"answers with {some_of(trained.names)} ({trained.problem})"
        raise ConfigError(
            "RW764",
            f"--adapter {given.adapter} {has}, and the labels of {rows.source} are {some_of(labels.names)} "
            f"({labels.problem}); give data with its labels, or leave --adapter out.",
        )
    return labels


def _encode_labelled(given: TrainSettings, tokenizer: PreTrainedTokenizerBase, texts: Texts) -> Data:
    labels = labels_in(texts.rows)
    encode = functools.partial(
        encode_labelled,
        tokenizer=tokenizer,
        labels=labels,
        max_length=given.max_length,
        skip_bad_rows=given.skip_bad_rows,
    )
    evaluation = None if texts.eval_rows is None else encode(texts.eval_rows, name="eval")
    notes = {"labels": {**labels.to_json(), "counts": label_counts(texts.rows, labels)}}
    return Data(encode(texts.rows), evaluation, texts, notes)


def _classification(given: TrainSettings, data: Data, base: LoadedBase, flat: bool) -> Classification:
    # No keys and values are kept for a next token.
    base.model.config.use_cache = False
    return Classification(
        data.train.dataset,
        data.evaluation and data.evaluation.dataset,
        labels_in(data.texts.rows),
        **_of_batches(given, base),
    )


def make_loop(
    given: TrainSettings,
    data: Data,
    *,
    learning: Learning,
    base: LoadedBase,
    flat: bool,
    progress: Callable[[], Progress] = Progress,
    is_evaluated: bool = False,
) -> Loop:
    """A run's loop. ``flat``: rows may be laid end to end; ``is_evaluated``: a resumed run needs no evaluation at its
    start."""
    objective = learning.objective(given, data, base, flat)
    if given.gradient_checkpointing:
        with warnings.catch_warnings():
            # transformers renames the method in 5.2x; the old name works in every version we admit.
            warnings.simplefilter("ignore", FutureWarning)
            base.model.gradient_checkpointing_enable({"use_reentrant": False})
    micro_batches = len(objective.order(0))
    total = given.max_steps or math.ceil(given.epochs * max(1, math.ceil(micro_batches / given.gradient_accumulation)))
    evaluates = data.evaluation is not None
    eval_steps = given.eval_steps or math.ceil(total * TENTH)
    # Early stopping counts evaluations, which then come at every tenth, whatever they cost.
    if data.evaluation is not None and not (given.eval_steps or given.early_stopping):
        rows = given.batch_size * given.gradient_accumulation * ranks.count()
        eval_steps = evaluation_steps_of(total, rows, len(data.evaluation.dataset))
    options = Options(
        total_steps=total,
        accumulation=given.gradient_accumulation,
        schedule=given.lr_scheduler_type,
        warmup_steps=given.warmup_steps,
        max_grad_norm=given.max_grad_norm,
        seed=given.seed,
        logging_steps=given.logging_steps or logging_steps_of(total),
        eval_steps=eval_steps if evaluates else None,
        save_steps=given.save_steps or given.eval_steps or math.ceil(total * TENTH),
        evaluates_first=evaluates and not is_evaluated,
        early_stopping=given.early_stopping,
        autocast=PRECISIONS.get(base.precision),
        checkpoint_limit=given.save_total_limit,
    )
    optimizer = functools.partial(
        make_optimizer,
        given.optimizer,
        base.model,
        rate=given.rate,
        weight_decay=given.weight_decay,
        loraplus_ratio=given.loraplus_ratio,
    )
    around = functools.partial(
        _around_step, base.model, given.neftune_noise_alpha, offloads=given.activation_offloading
    )
    return Loop(base.model, objective, options, optimizer, progress(), given.output, around)


def evaluation_steps_of(steps: int, rows: int, eval_rows: int) -> int:
    """The default of ``eval_steps`` for ``steps`` steps of ``rows`` rows, from what evaluations and steps cost: as many
    evaluations as fit into their share of the run, but one before the first step, one after the last, and at most ten
    more than the first. Counted in rows, not in seconds, so that a run evaluates at the same steps on every machine.
    """
    affordable = int(steps * rows * EVALUATING / (1 - EVALUATING) / (eval_rows * ROW_COST))
    return math.ceil(steps / min(10, max(1, affordable - 1)))


@contextlib.contextmanager
def _around_step(model: Any, noise_alpha: float | None, *, offloads: bool) -> Iterator[None]:
    """NEFTune's noise on the embeddings (Jain et al. 2023, arXiv 2310.05914), and activations in CPU memory.

    noise ~ U(-a, a),  a = alpha / sqrt(length x width)
    """

    def noisy(module: nn.Module, _: object, output: Tensor) -> Tensor:
        if not module.training or noise_alpha is None:
            return output
        bound = float(noise_alpha / torch.tensor(output.size(1) * output.size(2)).sqrt())
        return output + torch.zeros_like(output).uniform_(-bound, bound)

    with contextlib.ExitStack() as stack:
        if noise_alpha is not None:
            stack.callback(model.get_input_embeddings().register_forward_hook(noisy).remove)
        if offloads:
            stack.enter_context(offloaded(model))
        yield

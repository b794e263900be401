"""Training on preferences with trl's DPOTrainer and KTOTrainer, without a second model.

    dpo    -log sigmoid(beta (r(chosen) - r(rejected)))          r(y) = log p(y | x) - log p_ref(y | x)
    kto    1 - sigmoid(beta (r(good) - z)),  1 - sigmoid(beta (z - r(bad)))        z: mean r of mismatched answers

The reference is the model itself, with its adapter disabled or with a frozen copy of the adapter with which training
began. The reference's log-probabilities are computed first, before the step's graph exists, and passed to trl's losses
as precomputed ones. All log-probabilities come from the accelerated model, at the positions of answers only.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from accelerate.data_loader import DataLoaderShard
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_config import KTOConfig
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.utils import add_fused_lm_head

from rankwise.acceleration.log_probs import Asked, accept_scores, asked_of
from rankwise.adapters.reference import reference_at_work
from rankwise.compat.trl import TrlTrainer, heads_by, metrics_of
from rankwise.config import BETA, TrainSettings
from rankwise.conflicts import OBJECTIVE_OPTIONS
from rankwise.constants import IGNORED
from rankwise.data import Rows, encode_preferences
from rankwise.data.preferences import PREFERENCE_FORMATS, unpaired
from rankwise.errors import RunError
from rankwise.training import ranks
from rankwise.training.arguments import Surroundings, run_arguments
from rankwise.training.batches import Batch, Items, Samples
from rankwise.training.foresight import largest_scoring
from rankwise.training.learning import Common, Learning
from rankwise.training.loss import fused_head_is_right
from rankwise.training.setup import Data, encode_data
from rankwise.training.shares import share_batches
from rankwise.training.spine import RunTrainer
from rankwise.training.state import undisturbed_random_states

COUNTED = "counted"
# Key of a batch: the process's share of the rows of all processes, times the number of processes.
SHARE = "share"
# {trl's name: ours} of figures in metrics.jsonl, and of those shown at each step.
REWARDS = {
    "rewards/chosen": "reward_chosen",
    "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin",
    "rewards/accuracies": "reward_accuracy",
    "logps/chosen": "log_prob_chosen",
    "logps/rejected": "log_prob_rejected",
    "kl": "kl",
}
SHOWN = {"rewards/margins": "margin", "rewards/accuracies": "accuracy", "kl": "KL"}
# Losses that are not a mean over pairs.
# Figures of trl that would need another pass over the logits.
UNKNOWN = ("logits/chosen", "logits/rejected", "mean_token_accuracy")


class PreferenceTrainer(RunTrainer):
    """The common part of both trainers. A trainer class inherits from this one first and from trl's second."""

    # The trl trainer that the class inherits from.
    behind: type[TrlTrainer]
    # trl's declaration is narrower.
    args: PairArguments | MarkedArguments
    ref_model: Any
    precompute_ref_logps: bool

    logged, shown = REWARDS, SHOWN

    def __init__(self, **kwargs: Any) -> None:
        model, flat = kwargs["model"], kwargs["args"].flat
        for name, module in model.named_modules():
            # As in trl, dropout of the base is disabled; the adapter's dropout is the user's choice.
            if isinstance(module, nn.Dropout) and not name.endswith("lora_dropout"):
                module.p = 0.0
        self.own_scores = accept_scores(model, Asked(flat=flat, pairs=flat and self.behind is DPOTrainer))
        if not self.own_scores and not fused_head_is_right(model):
            raise RunError(
                "RW765",
                f"the output head is a {type(model.get_output_embeddings()).__name__}, which trl's log-probabilities "
                "would bypass, and rankwise's need the fast step; leave out --no-fast, or do not adapt the head.",
            )
        # A placeholder, without which trl loads the base again.
        with heads_by(self.behind, self._give_head):
            super().__init__(ref_model=nn.Module(), **kwargs)
        self.ref_model, self.precompute_ref_logps = None, True
        self.data_collator = functools.partial(_counting, self.data_collator)
        # Number of this process's rows in the current batch.
        self.rows: int
        if ranks.count() > 1:
            # accelerate's gather needs equally many rows in each process, and truncates a short last batch.
            self.accelerator.gather = self.accelerator.gather_for_metrics = self._of_everyone

    def _give_head(self, model: PreTrainedModel, *args: Any, **kwargs: Any) -> None:
        if type(model) is not nn.Module and not self.own_scores:
            add_fused_lm_head(model, *args, **kwargs)

    @property
    def shares_prompts(self) -> bool:
        """Whether the prompt of a pair is computed once for both answers."""
        return self.own_scores and asked_of(self.model).pairs

    @property
    def loss_in_words(self) -> str:
        if not self.own_scores:
            return "trl's fused head"
        asked, words = asked_of(self.model), "own log-probabilities, in chunks"
        if asked.apart:
            return f"{words}; a prompt is computed for each of its answers: {asked.apart}"
        return f"{words}, of prompts shared by both answers" if asked.pairs else words

    def _prepare_dataset(self, dataset: Dataset, *_: Any) -> Dataset:
        """The data set, unchanged: its rows are encoded, truncated and counted already."""
        return dataset

    # --- the rows of one of several processes ---

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoaderShard:
        return share_batches(super().get_eval_dataloader(eval_dataset))

    def get_batch_samples(self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device) -> Samples:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        everyone = ranks.gathered([batch[COUNTED][1] for batch in samples])
        for batch, *rows in zip(samples, *everyone):
            batch[SHARE] = batch[COUNTED][1] * ranks.count() / sum(rows)
        return samples, items

    def without_rows(self, batch: Batch) -> Batch:
        return {**batch, COUNTED: (0, 0)}

    def _of_everyone(self, tensor: Tensor) -> Tensor:
        """The values of all processes, concatenated by rank; their numbers may differ."""
        own = tensor.detach().flatten().cpu()
        return torch.cat(ranks.gathered(own if self.rows else own[:0])).to(tensor.device)

    # --- loss ---

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> Any:
        tokens, self.rows = inputs.pop(COUNTED)
        share = inputs.pop(SHARE, 1)
        mode = "train" if self.model.training else "eval"
        loss = super().compute_loss(model, {**inputs, **self.references(inputs)}, return_outputs, num_items_in_batch)
        if self.own_scores:
            for name in UNKNOWN:
                metrics_of(self, mode).pop(name, None)
        if mode == "train":
            self.step_tokens += tokens
            self.step_examples += self.rows
        # Weighted so that the mean over processes is the mean over all rows.
        return loss if share == 1 else loss * share

    def references(self, inputs: Batch) -> dict[str, Tensor]:
        """The reference's log-probabilities of a batch, under trl's names."""
        raise NotImplementedError

    @torch.no_grad()
    def reference_log_probs(self, inputs: Batch, prefix: str = "") -> Tensor:
        """log p_ref(y | x) of each sequence (B,)."""
        ids, completions = inputs[f"{prefix}input_ids"], inputs[f"{prefix}completion_mask"]
        asked = {"want_stats": False} if self.own_scores else {}
        with reference_at_work(self.model):
            found = self.model(
                input_ids=ids,
                attention_mask=inputs[f"{prefix}attention_mask"],
                labels=ids.masked_fill(completions == 0, IGNORED),
                use_cache=False,
                fused_lm_head=True,
                **asked,
            )
        return found.log_probs.sum(1)

    # --- evaluation ---

    def counts_by_side(self, inputs: Batch) -> dict[str, int]:
        """The numbers of good ("chosen") and bad ("rejected") answers in a batch; empty where each row has both."""
        return {}

    def evaluation_loop(
        self,
        dataloader: DataLoader[Batch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """Means over rows; figures of good (bad) answers are means over the good (bad) answers. The Trainer's own
        evaluation gives a short last batch the weight of a full one."""
        data: Dataset = dataloader.dataset
        self.start_evaluation()
        found: dict[str, list[tuple[float, int]]] = defaultdict(list)
        metrics = metrics_of(self, "eval")
        with undisturbed_random_states():
            for inputs in self.with_idle_ends(dataloader, data):
                own = inputs[COUNTED][1]
                counts = {side: count * bool(own) for side, count in self.counts_by_side(inputs).items()}
                loss = self.prediction_step(self.model, inputs, True)[0]
                (mean,) = ranks.mean([loss], own)  # type: ignore[list-item]
                # trl's figures are over all processes.
                rows, *sides = map(int, ranks.summed([own, *counts.values()]))
                counts = dict(zip(counts, sides))
                found["loss"].append((float(mean), rows))
                for name, values in metrics.items():
                    found[name].append((float(values[-1]), counts.get(name.rpartition("/")[2], rows)))
                metrics.clear()
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        means = {
            name: sum(value * rows for value, rows in values) / sum(rows for _, rows in values)
            for name, values in found.items()
        }
        # trl gives the margin only for batches with both kinds.
        if counts and {"rewards/chosen", "rewards/rejected"} <= means.keys():
            means["rewards/margins"] = means["rewards/chosen"] - means["rewards/rejected"]
        mean_loss = means.pop("loss")
        metrics |= {name: [value] for name, value in means.items()}
        return EvalLoopOutput(np.empty(0), None, {f"{metric_key_prefix}_loss": mean_loss}, len(data))


class PairTrainer(PreferenceTrainer, DPOTrainer):
    """Trains on pairs of answers (DPO)."""

    behind = DPOTrainer

    def references(self, inputs: Batch) -> dict[str, Tensor]:
        chosen, rejected = self.reference_log_probs(inputs).chunk(2)
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


class MarkedTrainer(PreferenceTrainer, KTOTrainer):
    """Trains on answers marked good or bad (KTO)."""

    behind = KTOTrainer

    def _prepare_dataset(self, dataset: Dataset, _: object, arguments: KTOConfig, *__: object) -> Dataset:
        """As in trl, z is estimated by pairing each prompt with the previous answer of its batch."""
        if not self.calculate_KL:
            return dataset

        def shifted(rows: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
            answers = rows["completion_ids"]
            return {"KL_completion_ids": [answers[-1], *answers[:-1]]}

        size = arguments.per_device_train_batch_size * ranks.count()
        return dataset.map(shifted, batched=True, batch_size=size, keep_in_memory=True)

    def counts_by_side(self, inputs: Batch) -> dict[str, int]:
        good = int(inputs["label"].sum())
        return {"chosen": good, "rejected": len(inputs["label"]) - good}

    def _compute_kl_logps(self, model: nn.Module, batch: Batch) -> Tensor | None:
        found: Tensor | None = super()._compute_kl_logps(model, batch)
        if found is None or ranks.count() == 1:
            return found
        # trl averages over the rows of one process; z is the mean over the rows of all processes.
        reference = batch["ref_KL_logps"]
        mean = ranks.mean([(found.detach() - reference).mean()], self.rows)[0]
        return reference + float(mean)

    def references(self, inputs: Batch) -> dict[str, Tensor]:
        found = {"ref_logps": self.reference_log_probs(inputs)}
        return {**found, "ref_KL_logps": self.reference_log_probs(inputs, "KL_")} if self.calculate_KL else found


def _counting(collate: Callable[[list[Any]], Batch], examples: list[Any]) -> Batch:
    """A batch of trl's collator with its counts (non-padding tokens, examples), counted on the host."""
    batch = collate(examples)
    return {**batch, COUNTED: (int(batch["attention_mask"].sum()), len(examples))}


@dataclasses.dataclass
class PairArguments(DPOConfig):
    """trl's arguments for pairs. ``flat``: rows may be concatenated."""

    flat: bool = False


@dataclasses.dataclass
class MarkedArguments(KTOConfig):
    """trl's arguments for answers marked good or bad. ``flat``: rows may be concatenated."""

    flat: bool = False


def learning(given: TrainSettings) -> Learning:
    """The parts of a run on preferences."""
    return Learning(
        _encode,
        _arguments,
        _trainer,
        formats=PREFERENCE_FORMATS[given.objective],
        largest_evaluation=largest_scoring,
    )


def _encode(
    given: TrainSettings, tokenizer: PreTrainedTokenizerBase, rows: Rows, eval_rows: Rows | None, template: str | None
) -> Data:
    if given.objective == "kto":
        rows, eval_rows = unpaired(rows), None if eval_rows is None else unpaired(eval_rows)
    return encode_data(given, tokenizer, rows, eval_rows, template, encode_preferences)


def _arguments(given: TrainSettings, around: Surroundings) -> PairArguments | MarkedArguments:
    own = {name: getattr(given, name) for name in OBJECTIVE_OPTIONS[given.objective]}
    kind: type[PairArguments | MarkedArguments] = PairArguments if given.objective == "dpo" else MarkedArguments
    return run_arguments(
        kind,
        given,
        around,
        # Rows were truncated when they were encoded, but KTO pairs prompts with the answers of others.
        max_length=given.max_length,
        disable_dropout=False,
        flat=around.padding_free,
        **{"beta": BETA, **{name: value for name, value in own.items() if value is not None}},
    )


def _trainer(given: TrainSettings, data: Data, common: Common) -> PreferenceTrainer:
    return (PairTrainer if given.objective == "dpo" else MarkedTrainer)(**common)

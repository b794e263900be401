"""trl's GRPOTrainer on one model, which generates answers, trains, and is the reference while its adapter is disabled.

    A_i = (r_i - mean_j r_j) / (std_j r_j + 1e-4)        over the answers j to the same prompt
    loss = - mean_t min(rho_t A, clip(rho_t) A) + beta (exp(d_t) - d_t - 1),    d_t = log p_ref - log p of token t

Rewards, advantages, loss and figures are trl's. Overridden are: generation (rankwise's, with a growing cache, batches
by length, and one pass over a prompt for all of its answers); log-probabilities (chunks of logits at answer tokens
only); the reference (trl would load a second, dense model); the order of prompts (it depends on seed and epoch only, so
that a resumed run repeats it); evaluation (the mean reward of greedy answers).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rankwise.acceleration import give_back_freed_memory
from rankwise.acceleration.generation import Decoding, Generator, Prompt, batches_that_fit
from rankwise.acceleration.log_probs import Asked, TokenScores, accept_scores, scores_of_logits
from rankwise.adapters.reference import reference_at_work
from rankwise.compat.trl import RepeatSampler, heads_by, metrics_of
from rankwise.constants import IGNORED
from rankwise.errors import RunError, warn
from rankwise.foreign import JsonObject
from rankwise.training import ranks
from rankwise.training.batches import Batch, Items
from rankwise.training.objectives.rewards import Reward, Said
from rankwise.training.spine import RunTrainer
from rankwise.training.state import undisturbed_random_states

# The placeholder where trl expects a reference model.
REFERENCE: Any = "the model with its adapter switched off"
# {trl's name: ours} of figures in metrics.jsonl, and of those shown at each step.
LOGGED = {
    "reward": "reward",
    "reward_std": "reward_std",
    "kl": "kl",
    "frac_reward_zero_std": "equal_rewards",
    "completions/mean_length": "completion_tokens",
    "completions/clipped_ratio": "cut_completions",
}
SHOWN = {"reward": "reward", "kl": "KL", "completions/mean_length": "answer tokens"}
# An evaluation checks after this number of prompts whether the user has stopped it.
EVALUATED_AT_ONCE = 64
# Number of first steps with equal rewards after which the run warns (RW778).
SILENT_STEPS = 10


@dataclasses.dataclass
class GrpoArguments(GRPOConfig):
    """trl's arguments. trl's own ``beta`` stays 0, since trl loads a reference model for any other value."""

    reference_beta: float = 0.0
    padding_free: bool = False


class EpochSampler(RepeatSampler):
    """trl's sampler, with an order that depends on seed and epoch only."""

    def set_epoch(self, epoch: int) -> None:
        assert self.seed is not None, "ours are seeded"
        self.generator.manual_seed(self.seed + epoch)


class GrpoTrainer(RunTrainer, GRPOTrainer):
    """Trains on rewards. Data sets have the columns ``input_ids``, the tokens of a prompt, and ``asked``, a JSON object
    with the ``prompt`` and the other ``columns`` as reward functions get them. ``stop_ids`` end an answer."""

    args: GrpoArguments
    # trl declares these attributes optional; trl's arguments have defaults for all of them.
    processing_class: PreTrainedTokenizerBase
    max_completion_length: int
    # Where all answers to a prompt get the same reward, all gradients are zero.
    silence_is_normal = True
    shown = SHOWN

    def __init__(self, *, rewards: Sequence[Reward], stop_ids: frozenset[int], **kwargs: Any) -> None:
        # trl would replace the output head by its own.
        with heads_by(GRPOTrainer, lambda *_, **__: None):
            super().__init__(reward_funcs=list(rewards), **kwargs)
        self.own_scores = accept_scores(self.model, Asked(flat=self.args.padding_free))
        if self.args.reference_beta:
            self.beta, self.ref_model = self.args.reference_beta, REFERENCE
        self.eos_token_ids = sorted(stop_ids)
        self.logged = LOGGED | {f"rewards/{name}/mean": f"reward_{name}" for name in self.reward_func_names}
        # Token ids of the prompts in generation, since trl passes their text only.
        self._prompt_ids: list[list[int]] = []
        self._columns: list[JsonObject] = []
        self._silent_steps = 0

    @property
    def loss_in_words(self) -> str:
        return f"trl's, of log-probabilities from {'chunks of' if self.own_scores else 'whole'} logits"

    # --- the rows of one of several processes ---

    def with_idle_ends(self, batches: Iterable[Batch], _: object) -> Iterator[Batch]:
        # An epoch drops the last prompts that do not fill a step, so no process is without rows.
        return iter(batches)

    # --- a step ---

    def _get_train_sampler(self, dataset: Dataset | None = None) -> EpochSampler:
        given: Any = super()._get_train_sampler(dataset)
        counts = given.mini_repeat_count, given.batch_size, given.repeat_count
        return EpochSampler(given.data_source, *counts, seed=given.seed)

    def _generate_and_score_completions(self, inputs: list[Batch]) -> Batch:
        self._prompt_ids = [row["input_ids"] for row in inputs]
        prompts = self._ask([row["asked"] for row in inputs])
        found: Batch = super()._generate_and_score_completions([{"prompt": prompt} for prompt in prompts])
        figures = metrics_of(self, "train")
        self._note_silence(math.isnan(figures["reward"][-1]), figures["frac_reward_zero_std"][-1] == 1)
        return found

    def _ask(self, rows: Sequence[str]) -> list[Said]:
        """The prompts of a batch, without the other columns, which are kept for the rewards."""
        asked = [json.loads(row) for row in rows]
        self._columns = [one["columns"] for one in asked]
        return [one["prompt"] for one in asked]

    def _note_silence(self, is_unscored: bool, is_equal: bool) -> None:
        """Raise RunError (RW774) where no answer of the first step has a score; warn (RW778) of equal rewards."""
        if is_unscored and not self._silent_steps:
            raise RunError(
                "RW774",
                "no --reward gave a score for any answer of the first step, all of which got None; let one of them "
                "return numbers.",
            )
        self._silent_steps = self._silent_steps + 1 if is_unscored or is_equal else -(10**9)
        if self._silent_steps == SILENT_STEPS:
            warn(
                "RW778",
                f"in the first {SILENT_STEPS} steps all answers to a prompt got the same reward, so nothing was "
                "learned; check the reward with `rankwise generate`, raise --temperature or --num-generations, or "
                "begin with easier prompts.",
            )

    def _tokenize_prompts(self, prompts: list[Said]) -> tuple[list[list[int]], None, dict[str, Tensor]]:
        return self._prompt_ids, None, {}

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[list[list[int]], None]:
        return self._answers(prompt_ids, temperature=self.temperature), None

    def _answers(self, prompt_ids: Sequence[Sequence[int]], *, temperature: float) -> list[list[int]]:
        """The token ids of one answer to each prompt, including the stop token that ended it.

        Samples depend on the run's seed, the step, and the row's index over all processes.
        """
        seed, first = self.args.seed << 32 | self.state.global_step, ranks.rank() * len(prompt_ids)
        prompts = [Prompt(tuple(ids), repeat=place) for place, ids in enumerate(prompt_ids, first)]
        stops = frozenset(self.eos_token_ids)
        decoding = Decoding(self.max_completion_length, stops, temperature=temperature, seed=seed, to_train_on=True)
        answers: list[list[int]] = [[] for _ in prompts]
        # Training steps and generation allocate different sizes, so neither would reuse the other's freed memory.
        give_back_freed_memory()
        with _evaluating(self.model):
            generator = Generator(self.model, decoding, pad=int(self.processing_class.pad_token_id))
            for batch in batches_that_fit(self.model, prompts, decoding):
                for index, ids in zip(batch, generator.answers([prompts[index] for index in batch])):
                    answers[index] = ids
        give_back_freed_memory()
        return answers

    def _calculate_rewards(
        self, inputs: object, prompts: list[Said], completions: Sequence[Said], completion_ids_list: list[list[int]]
    ) -> Tensor:
        return super()._calculate_rewards(self._columns, prompts, completions, completion_ids_list)

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: object,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probabilities and entropies (B, C) of the last C = ``logits_to_keep`` tokens, zero at padding."""
        is_reference = model is REFERENCE
        policy, at_work = (self.model, reference_at_work(self.model)) if is_reference else (model, nullcontext())
        labels = input_ids.masked_fill(attention_mask == 0, IGNORED)
        labels[:, :-logits_to_keep] = IGNORED
        wanted: dict[str, Any] = {"temperature": self.temperature, "want_stats": compute_entropy}
        if compute_aux_loss:
            wanted["output_router_logits"] = True
        parts = zip(*(tensor.split(batch_size or len(labels)) for tensor in (labels, input_ids, attention_mask)))
        with at_work, self.accelerator.autocast():
            found = [self._scores(policy, *part, **wanted) for part in parts]
        aux_losses = [each.aux_loss for each in found if each.aux_loss is not None]
        return (
            torch.cat([each.log_probs[:, -logits_to_keep:] for each in found]),
            # trl asks for entropies with one micro-batch only, and averages over its tokens.
            found[0].entropy[:, -logits_to_keep:] if found[0].entropy is not None else None,
            torch.stack(aux_losses).mean() if aux_losses else None,
        )

    def _scores(
        self, model: PreTrainedModel, labels: Tensor, input_ids: Tensor, attention_mask: Tensor, **wanted: Any
    ) -> TokenScores:
        if not self.own_scores:
            asked = Asked(flat=self.args.padding_free)
            return scores_of_logits(model, asked, labels, input_ids, attention_mask, **wanted)
        given = {"labels": labels, "input_ids": input_ids, "attention_mask": attention_mask}
        return model(**given, **wanted, fused_lm_head=True)

    def compute_loss(
        self, model: nn.Module, inputs: Batch, return_outputs: bool = False, num_items_in_batch: Items = None
    ) -> Any:
        if self.model.training:
            masks = inputs["prompt_mask"], inputs["completion_mask"]
            self.step_tokens += sum(int(mask.sum()) for mask in masks)
            self.step_examples += len(masks[0])
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    # --- evaluation ---

    def evaluation_loop(
        self,
        dataloader: DataLoader[Batch],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The mean reward of one greedy answer to each prompt; the loss is its negative."""
        rows: Dataset = dataloader.dataset
        self.start_evaluation()
        rewards = []
        with undisturbed_random_states():
            for start in range(0, len(rows), EVALUATED_AT_ONCE * ranks.count()):
                places = range(len(rows))[start : start + EVALUATED_AT_ONCE * ranks.count()]
                rewards.append(self._rewards_of(rows, places))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        scores = torch.cat(rewards)
        reward, each = float(self._weighted(scores)), scores.nanmean(0)
        figures = {f"{metric_key_prefix}_reward": reward, f"{metric_key_prefix}_loss": -reward}
        for name, value in zip(self.reward_func_names, each.tolist(), strict=True):
            figures[f"{metric_key_prefix}_rewards/{name}/mean"] = value
        return EvalLoopOutput(np.empty(0), None, figures, len(rows))

    def _weighted(self, scores: Tensor) -> Tensor:
        """The mean over answers of the weighted sum of their scores (answers, reward functions), as in a step: a
        function may score some answers only, and an answer without any score does not count. Raises RunError (RW774).
        """
        has_score = scores.isfinite().any(1)
        if not has_score.any():
            raise RunError(
                "RW774",
                f"no --reward gave a score for any of the {len(scores)} evaluation answers, all of which got None; let "
                "one of them return numbers, or leave out --eval-data.",
            )
        return (scores * self.reward_weights.to(scores)).nansum(1)[has_score].mean()

    def _rewards_of(self, data: Dataset, places: range) -> Tensor:
        """Rewards (places, reward functions). Every process answers equally many prompts; the last may repeat."""
        size = math.ceil(len(places) / ranks.count())
        own = range(ranks.rank() * size, (ranks.rank() + 1) * size)
        rows = data[[places[min(place, len(places) - 1)] for place in own]]
        prompts = self._ask(rows["asked"])
        answers = self._answers(rows["input_ids"], temperature=0.0)
        texts = self.processing_class.batch_decode(answers, skip_special_tokens=True)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        return self._calculate_rewards([], prompts, completions, answers)[: len(places)]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """A context in which the model is in evaluation mode; its former mode is restored."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)

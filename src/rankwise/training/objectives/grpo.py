"""Training on rewards: GRPO (Shao et al. 2024, arXiv 2402.03300).

The model answers each prompt several times, each answer is scored, and answers that score above the mean of their group
become more likely. The trainer is in grpo_trainer.py, and the scoring in rewards.py.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from rankwise.acceleration.generation import stop_ids_of
from rankwise.config import GENERATIONS, MAX_COMPLETION_LENGTH, TrainSettings
from rankwise.constants import WRITTEN_ROWS
from rankwise.data import Rows
from rankwise.data.encoding import RowEncoder
from rankwise.data.prompts import Room, encode_prompts, prompt_formats
from rankwise.errors import ConfigError
from rankwise.models.load import table_rows
from rankwise.options import flag
from rankwise.training import ranks
from rankwise.training.arguments import Surroundings, run_arguments
from rankwise.training.foresight import MicroBatch, longest_row
from rankwise.training.learning import Common, Learning
from rankwise.training.objectives.grpo_trainer import EVALUATED_AT_ONCE, GrpoArguments, GrpoTrainer
from rankwise.training.objectives.rewards import BUILT_IN, Reward, read_rewards
from rankwise.training.setup import Data

# Defaults of the other options.
TEMPERATURE, LOSS = 1.0, "dapo"


def learning(given: TrainSettings) -> Learning:
    """The parts of a run on rewards. Raises ConfigError: RW770 without a reward, and as ``read_rewards`` does."""
    if not given.reward:
        raise ConfigError(
            "RW770",
            f"--objective grpo needs --reward: FILE.py:NAME, a function in a Python file, or one of {BUILT_IN}.",
        )
    rewards = read_rewards(given.reward or ())
    return Learning(
        functools.partial(_encode, rewards=rewards),
        _arguments,
        functools.partial(_trainer, rewards=rewards),
        formats=prompt_formats(**given.columns),
        has_labels=False,
        largest_batch=_largest_batch,
        largest_evaluation=_largest_evaluation,
    )


def _answers(given: TrainSettings) -> int:
    """The number of answers of a step, over all processes."""
    return given.batch_size * given.gradient_accumulation * ranks.count()


def _new_tokens(given: TrainSettings) -> int:
    return given.max_completion_length or MAX_COMPLETION_LENGTH


def _arguments(given: TrainSettings, around: Surroundings) -> GrpoArguments:
    return run_arguments(
        GrpoArguments,
        given,
        around,
        num_generations=given.num_generations or GENERATIONS,
        # An evaluation generates one answer to each prompt.
        num_generations_eval=1,
        max_completion_length=_new_tokens(given),
        temperature=given.temperature or TEMPERATURE,
        loss_type=given.loss_type or LOSS,
        reward_weights=None if given.reward_weights is None else list(given.reward_weights),
        reference_beta=given.beta or 0.0,
        padding_free=around.padding_free,
    )


def _encode(
    given: TrainSettings,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    eval_rows: Rows | None,
    template: str | None,
    *,
    rewards: Sequence[Reward],
) -> Data:
    if template is not None:
        tokenizer.chat_template = template
    encode = functools.partial(
        encode_prompts,
        tokenizer=tokenizer,
        room=Room(given.max_length, _new_tokens(given)),
        chat_template=template,
        skip_bad_rows=given.skip_bad_rows,
    )
    train = encode(rows, name="train")
    evaluation = None if eval_rows is None else encode(eval_rows, name="eval")
    hashes = [reward.sha256 for reward in rewards if reward.sha256 is not None]
    notes = {"rewards_sha256": hashlib.sha256(" ".join(hashes).encode()).hexdigest()} if hashes else {}
    return Data(train, evaluation, rows, template, eval_rows, notes)


def _trainer(given: TrainSettings, data: Data, common: Common, *, rewards: Sequence[Reward]) -> GrpoTrainer:
    model, tokenizer = common["model"], common["processing_class"]
    longest, places = longest_row(common["train_dataset"]) + _new_tokens(given), table_rows(model)
    if places is not None and longest > places:
        raise ConfigError(
            "RW775",
            f"the longest prompt and {flag('max_completion_length')} make {longest:,} tokens, and this "
            f"{type(model).__name__} has learned positions for {places:,}; give --max-length {places} or less.",
        )
    group = given.num_generations or GENERATIONS
    prompts = _answers(given) // group
    if prompts > len(common["train_dataset"]):
        raise ConfigError(
            "RW775",
            f"a step takes {prompts} prompts and there are {len(common['train_dataset'])}; lower --batch-size or "
            "--gradient-accumulation, or raise --num-generations.",
        )
    stops = stop_ids_of(model, tokenizer, RowEncoder(data.rows, tokenizer, data.template).stop_ids())
    return GrpoTrainer(rewards=rewards, stop_ids=stops, **common)


def _largest_batch(trainer: GrpoTrainer, *, flat: bool) -> MicroBatch:
    """The largest possible micro-batch: answers of full length to the longest prompt."""
    new, rows = trainer.max_completion_length, trainer.args.per_device_train_batch_size
    tokens = longest_row(trainer.train_dataset) + new
    return MicroBatch(rows, tokens, new / tokens)


def _largest_evaluation(trainer: GrpoTrainer) -> MicroBatch | None:
    """The largest possible evaluation batch: one answer of full length to each prompt."""
    if trainer.eval_dataset is None:
        return None
    new = trainer.max_completion_length
    tokens = longest_row(trainer.eval_dataset) + new
    rows = min(len(trainer.eval_dataset), EVALUATED_AT_ONCE, WRITTEN_ROWS[trainer.args.device.type])
    return MicroBatch(rows, tokens, new / tokens)

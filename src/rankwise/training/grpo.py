"""Training on rewards: GRPO (Shao et al. 2024, arXiv 2402.03300).

A step asks some prompts. The model writes a group of answers to each, rewards score them, and answers that score above
the mean of their group become likelier. All answers of a step, of all processes, have a place: those of one process are
written and scored as if it had written all of them. The losses are in losses.py.

Legend: B answers of a micro-batch, L positions of prompts and answers, R rewards.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import itertools
import json
import math
import re
import reprlib
import runpy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.acceleration import give_back_freed_memory
from rankwise.acceleration.generation import Decoding, Generator, Prompt, batches_that_fit
from rankwise.acceleration.layouts import Answered, answered
from rankwise.constants import WRITTEN_ROWS
from rankwise.data.objectives import ANSWERS
from rankwise.data.rows import Message
from rankwise.errors import ConfigError, DataError, RankwiseError, RunError, one_line, warn
from rankwise.final_number import extract_answer
from rankwise.foreign import sha256_of
from rankwise.training import ranks
from rankwise.training.batches import (
    KEY,
    Batch,
    Counted,
    Figures,
    MicroBatch,
    Row,
    in_order,
    longest_row,
    on_device,
    shuffled,
)
from rankwise.training.losses import NORMALISED, advantages, policy_losses
from rankwise.training.objectives import Scoring
from rankwise.training.step import Loss

# A reward function, called with keyword arguments that are columns by name.
Function = Callable[..., Any]
# A prompt or an answer.
Said = str | Sequence[Message]
BUILT_IN = "answer, format=REGEX, length=N"
FILE = re.compile(r"(?P<path>.+\.py):(?P<name>[^:]+)")
# An evaluation checks after this number of prompts whether the user has stopped it.
EVALUATED_AT_ONCE = 64
# Number of first steps with equal rewards after which the run warns (RW778).
SILENT_STEPS = 10


@dataclasses.dataclass(kw_only=True)
class RewardedAnswers:
    """The objective grpo. Rows hold ``input_ids``, the tokens of a prompt, and ``asked``, JSON with the ``prompt`` and
    the other ``columns`` as rewards get them."""

    scoring: Scoring
    rows: Dataset
    eval_rows: Dataset | None
    pad: int
    # The texts of answers (token ids).
    decode: Callable[[list[list[int]]], list[str]]
    rewards: Sequence[Reward]
    # A factor for each reward.
    weights: Sequence[float]
    # Tokens that end an answer.
    stop_ids: frozenset[int]
    # Answers of a micro-batch of all processes.
    size: int
    # Prompts of a step, and answers to each.
    asked: int
    group: int
    # Most tokens of an answer.
    longest: int
    seed: int
    loss_type: str = "dapo"
    beta: float = 0.0

    shown: ClassVar = {"reward": "reward", "kl": "KL", "completion_tokens": "answer tokens"}
    # Where all answers to a prompt get the same reward, all gradients are zero.
    silence_is_normal: ClassVar = True

    def __post_init__(self) -> None:
        # Steps of this process in which all answers to a prompt got the same reward.
        self._silent_steps = 0

    @property
    def in_words(self) -> str:
        return self.scoring.in_words

    def order(self, epoch: int) -> list[list[int]]:
        """Each prompt as often as it is answered. The last prompts that do not fill a step are left out."""
        steps = shuffled(len(self.rows), self.asked, self.seed + epoch)
        rows = [row for step in steps if len(step) == self.asked for row in step for _ in range(self.group)]
        return [rows[start : start + self.size] for start in range(0, len(rows), self.size)]

    def collate(self, rows: Sequence[Row]) -> Batch:
        return {"prompts": rows, KEY: Counted(0, 0, 0)}

    # --- a step ---

    def prepare(self, batches: list[Batch], step: int) -> list[Batch]:
        """Write the answers of a step, score them, and lay them out."""
        prompts = [row for batch in batches for row in batch["prompts"]]
        own = ranks.share([*range(self.size)])
        places = [start * self.size + place for start in range(len(batches)) for place in own]
        answers = self.written(prompts, places, self.scoring.temperature, self.seed << 32 | step)
        is_cut = [answer[-1] not in self.stop_ids for answer in answers]
        own_scores = self._scored(prompts, answers)
        # Of the answers of all processes, by their places in the step.
        of_all = ranks.gathered([*zip(places, own_scores, map(len, answers), is_cut)])
        everyone = sorted(itertools.chain.from_iterable(of_all))
        scores = [score for _, score, _, _ in everyone]
        lengths = [length for _, _, length, _ in everyone]
        cut = sum(was_cut for _, _, _, was_cut in everyone)
        rewards = self._weighted(scores, must=step == 0)
        advantage = advantages(rewards, self.group).to(self.scoring.model.device)
        is_equal = [len({*group[~group.isnan()].tolist()}) < 2 for group in rewards.split(self.group)]
        self._silent_steps += all(is_equal)
        # After a resume, the first steps are not known.
        if step == SILENT_STEPS - 1 and self._silent_steps == SILENT_STEPS:
            warn(
                "RW778",
                f"in the first {SILENT_STEPS} steps all answers to a prompt got the same reward, so nothing was "
                "learned; check the reward with `rankwise generate`, raise --temperature or --num-generations, or "
                "begin with easier prompts.",
            )
        figures = {
            **{name: (mean, 1) for name, mean in self._means(scores, rewards).items()},
            "equal_rewards": (sum(is_equal), len(is_equal)),
            "completion_tokens": (sum(lengths), len(lengths)),
            "cut_completions": (cut, len(everyone)),
        }
        made = []
        for start in range(0, len(prompts), len(own)):
            part, first = slice(start, start + len(own)), start // len(own) * self.size
            rows = [row["input_ids"] for row in prompts[part]]
            batch = self.laid_out(rows, answers[part], sum(lengths[first : first + self.size]))
            made.append({**batch, "advantages": advantage[places[part]], "figures": {} if start else figures})
        return made

    def written(self, rows: Sequence[Row], places: Sequence[int], temperature: float, seed: int) -> list[list[int]]:
        """The token ids of one answer to each prompt, with the stop token that ended it. Samples depend on the seed and
        on an answer's place in the step."""
        model: Any = self.scoring.model
        prompts = [Prompt(tuple(row["input_ids"]), repeat=place) for row, place in zip(rows, places)]
        decoding = Decoding(
            max_new_tokens=self.longest, stop_ids=self.stop_ids, temperature=temperature, seed=seed, to_train_on=True
        )
        answers: dict[int, list[int]] = {}
        # Training steps and generation allocate different sizes, so neither would reuse the other's freed memory.
        give_back_freed_memory()
        is_training = model.training
        model.eval()
        generator = Generator(model, decoding, pad=self.pad)
        for batch in batches_that_fit(model, prompts, decoding):
            answers |= zip(batch, generator.answers([prompts[index] for index in batch]))
        model.train(is_training)
        give_back_freed_memory()
        return [answers[index] for index in range(len(prompts))]

    def _scored(self, rows: Sequence[Row], answers: list[list[int]]) -> list[list[float]]:
        """The values of all rewards (R,) for each answer, NaN for None."""
        asked = [json.loads(row["asked"]) for row in rows]
        prompts = [one["prompt"] for one in asked]
        texts = self.decode(answers)
        completions = [
            text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
            for prompt, text in zip(prompts, texts, strict=True)
        ]
        columns = {name: [one["columns"][name] for one in asked] for name in asked[0]["columns"]}
        given = {"prompts": prompts, "completions": completions, "completion_ids": answers, **columns}
        return [list(values) for values in zip(*(reward(**given) for reward in self.rewards), strict=True)]

    def _weighted(self, scores: Sequence[Sequence[float]], *, must: bool = False) -> Tensor:
        """The weighted sum of each answer's scores, of which some may be missing; NaN if all are. Raises RunError
        (RW774) if no answer has a score and one ``must``."""
        values, weights = torch.tensor(scores), torch.tensor(self.weights)
        if must and values.isnan().all():
            raise RunError(
                "RW774",
                f"no --reward gave a score for any of {len(scores)} answers, all of which got None; let one of them "
                "return numbers.",
            )
        return (values * weights).nansum(1).masked_fill(values.isnan().all(1), math.nan)

    def _means(self, scores: Sequence[Sequence[float]], rewards: Tensor) -> dict[str, float]:
        """Means over the answers that have a score, by their names in metrics.jsonl."""
        names = ["reward", *(f"reward_{reward.name}" for reward in self.rewards)]
        columns = dict(zip(names, [rewards, *torch.tensor(scores).T], strict=True))
        return {name: float(column.nanmean()) for name, column in columns.items() if not column.isnan().all()}

    def laid_out(self, prompts: list[list[int]], answers: list[list[int]], together: int) -> Batch:
        """Prompts and answers, with the weight of each answer's tokens. ``together``: the tokens of the answers of all
        processes."""
        weights, targets = NORMALISED[self.loss_type]([*map(len, answers)], self.longest, together)
        found = answered([*zip(prompts, answers)], self.pad, self.scoring.layout)
        batch = {"answers": found, "weights": torch.tensor(weights)[:, None]}
        return on_device({**batch, KEY: Counted(targets, found.tokens, len(answers))}, self.scoring.model.device)

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        answers: Answered = batch["answers"]
        mask = answers.mask[:, 1:]
        reference = self.scoring.reference(answers) if self.beta else None
        scores = self.scoring.scores(answers, want_stats=True)
        losses, kl = policy_losses(scores.log_probs, reference, batch["advantages"][:, None], self.beta)
        figures: Figures = {**batch["figures"], **self.scoring.figures(answers, scores)}
        if kl is not None:
            figures = {**figures, "kl": ((kl.detach() * mask).sum(), mask.sum())}
        return Loss((losses * mask * batch["weights"]).sum(), self.scoring.balance(scores), figures)

    # --- evaluation ---

    def evaluate(self, model: PreTrainedModel, pause: Callable[[], None]) -> dict[str, float]:
        """The mean reward of one greedy answer to each prompt; the loss is its negative. Raises RunError (RW774)."""
        rows = self.eval_rows
        assert rows is not None
        scores: list[list[float]] = []
        for places in in_order(len(rows), EVALUATED_AT_ONCE * ranks.count()):
            own = ranks.share(places)
            asked = [rows[place] for place in own]
            found = self._scored(asked, self.written(asked, own, 0.0, self.seed)) if own else []
            scores += itertools.chain.from_iterable(ranks.gathered(found))
            pause()
        means = self._means(scores, self._weighted(scores, must=True))
        return {"eval_loss": -means["reward"], **{f"eval_{name}": mean for name, mean in means.items()}}

    # --- the memory plan ---

    def largest_batch(self, batches: Iterable[list[int]]) -> MicroBatch:
        """The largest possible one: answers of full length to the longest prompt."""
        return self._of_full_length(self.rows, self.size // ranks.count())

    def largest_evaluation(self) -> MicroBatch | None:
        """The largest possible one: one answer of full length to each prompt."""
        if self.eval_rows is None:
            return None
        most = min(EVALUATED_AT_ONCE, WRITTEN_ROWS[self.scoring.model.device.type])
        return self._of_full_length(self.eval_rows, min(len(self.eval_rows), most))

    def _of_full_length(self, prompts: Dataset, count: int) -> MicroBatch:
        tokens = longest_row(prompts) + self.longest
        return MicroBatch(count, tokens, self.longest / tokens)


# --- rewards ---


@dataclasses.dataclass(frozen=True)
class Reward:
    """One ``--reward``. ``sha256`` is the hash of its file, which must be the same when a run resumes."""

    spec: str
    name: str
    function: Function
    sha256: str | None = None

    def __call__(self, **given: Any) -> list[float]:
        """A score for each of ``completions``, NaN if the function returns None.

        Raises RunError: RW772 if the function raises, RW774 if it does not return a finite number or None for
        each completion.
        """
        count = len(given["completions"])
        try:
            taken = inspect.signature(self.function).parameters
            # Unlike in trl, a function without ``**kwargs`` gets only the arguments that it names.
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values()):
                given = {name: given[name] for name in taken if name in given}
            found = self.function(**given)
            found = asyncio.run(found) if inspect.iscoroutine(found) else found
            found = list(found) if isinstance(found, Iterable) else [found]
        except RankwiseError:
            raise
        except (Exception, SystemExit) as error:
            raise RunError(
                "RW772",
                f"the reward {self.spec} raised {type(error).__name__}: {one_line(error)}; let it return a number "
                "for every answer.",
            ) from error
        scores = list(map(_number, found))
        if len(scores) != count or math.inf in scores:
            raise RunError(
                "RW774",
                f"the reward {self.spec} returned {reprlib.repr(found)} for {count} answers; let it return a list with "
                "one finite number, or None for no score, for each of `completions`.",
            )
        return scores


def _number(value: Any) -> float:
    """``value`` as a number, NaN for None, and infinity for all that is no finite number."""
    if value is None:
        return math.nan
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return math.inf
    return number if math.isfinite(number) else math.inf


def read_rewards(specs: Sequence[str]) -> list[Reward]:
    """The rewards that ``--reward`` names. Runs the code of the named files.

    Raises ConfigError: RW770 for none, or one that is neither a function in a file nor built in, RW771 for a file or a
    function that is missing, does not load, or cannot be called.
    """
    if not specs:
        raise ConfigError("RW770", f"--objective grpo needs --reward: FILE.py:NAME, or one of {BUILT_IN}.")
    rewards = [_read(spec) for spec in specs]
    names = [reward.name for reward in rewards]
    # Names must be unique, since each is one figure in the metrics.
    return [
        dataclasses.replace(reward, name=f"{reward.name}_{place}") if names.count(reward.name) > 1 else reward
        for place, reward in enumerate(rewards, 1)
    ]


def _read(spec: str) -> Reward:
    if file := FILE.fullmatch(spec):
        return _from_file(spec, Path(file["path"]).expanduser(), file["name"])
    kind, _, value = spec.partition("=")
    if spec == "answer":
        return Reward(spec, "answer", answer)
    if kind == "format" and value:
        try:
            return Reward(spec, "format", functools.partial(format_, pattern=re.compile(value)))
        except re.error as error:
            raise ConfigError("RW770", f"--reward {spec} holds no valid regular expression ({error}).") from None
    if kind == "length" and re.fullmatch(r"0*[1-9]\d{0,8}", value):
        return Reward(spec, "length", functools.partial(length, tokens=int(value)))
    raise ConfigError("RW770", f"--reward {spec} is neither FILE.py:NAME nor built in: {BUILT_IN}.")


def _from_file(spec: str, path: Path, name: str) -> Reward:
    if not path.is_file():
        raise ConfigError("RW771", f"--reward {spec}: there is no file {path}; check the path.")
    try:
        found = runpy.run_path(str(path), run_name=f"rankwise_reward_{path.stem}")
    except (Exception, SystemExit) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise ConfigError("RW771", f"--reward {spec}: {path} does not load ({reason}); correct it.") from error
    if not callable(found.get(name)):
        there = ", ".join(key for key, value in found.items() if inspect.isfunction(value))
        raise ConfigError("RW771", f"--reward {spec}: {path} has no function {name}; it has {there or 'none'}.")
    return Reward(spec, name, found[name], sha256_of(path))


def answer(completions: Sequence[Said], **columns: Any) -> list[float]:
    """1 where the final number of an answer, by GSM8K's rules, equals that of the row's own answer; else 0.

    Raises DataError (RW781) if the data have no column with the right answer, or one holds no number.
    """
    references = next((columns[name] for name in ANSWERS if name in columns), None)
    if references is None:
        raise DataError("RW781", f"--reward answer needs a column {' or '.join(ANSWERS)} with the right answer.")
    wanted = [extract_answer(str(reference)) for reference in references]
    if None in wanted:
        odd = reprlib.repr(references[wanted.index(None)])
        raise DataError("RW781", f"--reward answer found no number in the right answer {odd}.")
    return [float(extract_answer(text_of(one)) == number) for one, number in zip(completions, wanted)]


def format_(completions: Sequence[Said], *, pattern: re.Pattern[str]) -> list[float]:
    """1 where ``pattern`` is found in an answer, else 0."""
    return [float(pattern.search(text_of(one)) is not None) for one in completions]


def length(completion_ids: Sequence[Sequence[int]], *, tokens: int) -> list[float]:
    """min(1, max(0, 2 - length / N)): 1 for answers of at most N tokens, falling linearly to 0 at 2 N tokens."""
    return [min(1.0, max(0.0, 2 - len(ids) / tokens)) for ids in completion_ids]


def text_of(completion: Said) -> str:
    """A completion's text. It is a list of messages where the prompt is one."""
    return completion if isinstance(completion, str) else "".join(str(part["content"]) for part in completion)

"""Generate answers to many prompts by greedy decoding, sampling or beam search. Token ids in, token ids out.

Greedy decoding takes the argmax at each step. Prompts of similar length share a batch, left-padded, with positions from
0. Finished rows are removed from the batch. A common prefix of all prompts is computed once, and so is a prompt that is
answered several times.

B rows, L tokens.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
import itertools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from rankwise.acceleration.layouts import common_length
from rankwise.acceleration.parts import probe
from rankwise.acceleration.scoring import CHECK_TOLERANCE, LOW_PRECISION_TOLERANCE, no_number
from rankwise.constants import CACHE_BYTES, WRITTEN_ROWS
from rankwise.errors import warn
from rankwise.foreign import JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A shorter common prefix is not worth a separate pass.
SHARED_TOKENS = 32
# Greedy answers by transformers' generate. An omitted option would come from the model's generation_config.json.
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
# Finished rows are removed when at most this share of the batch still runs, since a removal copies the cache.
LEAVE_AT = 0.75


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decoding:
    """How answers are chosen. ``stop_ids`` and ``stop_strings`` end an answer and are not part of it."""

    max_new_tokens: int
    stop_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    num_beams: int = 1
    # Beam search ranks by sum log p / length ** length_penalty.
    length_penalty: float = 1.0
    # Within the answer only, as in the LoRA repository: an answer may copy n-grams from the prompt.
    no_repeat_ngram_size: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    # Whether the model trains on the answers. They then keep their stop token; the rows of a batch are sampled together
    # on the device, from all tokens, with uniform numbers drawn before; and tensors that layers cache can be used in
    # calls with gradients.
    to_train_on: bool = False


@dataclasses.dataclass(frozen=True)
class Prompt:
    """The token ids of a prompt. ``repeat`` distinguishes equal prompts that are sampled several times."""

    ids: tuple[int, ...]
    repeat: int = 0


# (token ids of an answer so far) -> whether they contain a stop string.
Stopped = Callable[[list[int]], bool]


def batches_by_length(prompts: Sequence[Prompt], *, budget: int, new_tokens: int, max_rows: int) -> list[list[int]]:
    """Indices of prompts of similar length, longest first. A batch holds ``budget`` tokens, including the answers.

    The result depends on the set of prompts and not on their order.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i].ids), prompts[i].ids, prompts[i].repeat))
    batches: list[list[int]] = []
    for index in order:
        last = batches[-1] if batches else None
        tokens = (len(prompts[last[0]].ids) + new_tokens) if last else 0
        if last and len(last) < max_rows and (len(last) + 1) * tokens <= budget:
            last.append(index)
        else:
            batches.append([index])
    return batches


def batches_that_fit(
    model: PreTrainedModel, prompts: Sequence[Prompt], decoding: Decoding, max_rows: int | None = None
) -> list[list[int]]:
    """``batches_by_length`` within the memory for keys and values."""
    device = model.device
    rows = max_rows or max(1, WRITTEN_ROWS.get(device.type, 64) // decoding.num_beams)
    memory = torch.cuda.mem_get_info(device)[0] // 4 if device.type == "cuda" else CACHE_BYTES
    tokens = memory // max(1, cache_bytes_per_token(model)) // decoding.num_beams
    return batches_by_length(prompts, budget=tokens, new_tokens=decoding.max_new_tokens, max_rows=rows)


def stop_ids_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, more: Iterable[int | None] = ()
) -> frozenset[int]:
    """The tokens that end an answer: those of the tokenizer, those of the model, and ``more``."""
    found = {tokenizer.eos_token_id, *more}
    for config in (getattr(model, "generation_config", None), model.config):
        ids = getattr(config, "eos_token_id", None)
        found |= set(ids) if isinstance(ids, list | tuple) else {ids}
    return frozenset(int(token) for token in found if token is not None)


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Bytes of the keys and values of one token in all layers; 0 for a model without attention."""
    config = model.config.get_text_config(decoder=True)
    heads = getattr(config, "num_key_value_heads", None) or getattr(config, "num_attention_heads", 0)
    if not heads:
        return 0
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(config.num_hidden_layers) * int(heads) * int(size) * int(model.dtype.itemsize)


class Generator:
    """Generates answers with one model. ``pad`` is any token id."""

    def __init__(self, model: Any, decoding: Decoding, *, pad: int = 0) -> None:
        self.model = model
        self.decoding = decoding
        self.pad = pad
        self._prefix: tuple[tuple[int, ...], DynamicCache | None] = ((), None)

    def share(self, prompts: Sequence[Prompt]) -> None:
        """Compute the common beginning of all ``prompts`` for the following batches. Repeated calls cost nothing."""
        if self._prefix[1] is not None:
            return
        shared = min((common_length(prompts[0].ids, prompt.ids) for prompt in prompts), default=0)
        # The last token of a prompt must run with its batch, since its logits give the first token of the answer.
        shared = min([shared, *(len(prompt.ids) - 1 for prompt in prompts)])
        if shared < SHARED_TOKENS or len(prompts) < 2 or self.decoding.num_beams > 1 or not takes_cache(self.model):
            return
        cache = DynamicCache(config=self.model.config)
        # Caches of layers with a window or a recurrent state cannot be copied to rows.
        if not cache.layers or any(type(layer) is not DynamicLayer for layer in cache.layers):
            return
        beginning = prompts[0].ids[:shared]
        with torch.inference_mode():
            self.model(
                input_ids=torch.tensor([beginning], device=self.model.device),
                **_cached(self.model, cache),
            )
        self._prefix = beginning, cache

    def answers(self, prompts: Sequence[Prompt], stopped: Stopped | None = None) -> list[list[int]]:
        """The answers' token ids, without stop tokens unless ``to_train_on``. Raises ModelError (RW323) for NaN."""
        with torch.no_grad() if self.decoding.to_train_on else torch.inference_mode():
            if self.decoding.num_beams > 1:
                batches = [prompts] if takes_cache(self.model) else [[prompt] for prompt in prompts]
                return [answer for batch in batches for answer in self._beam_search(batch, stopped)]
            return self._step_by_step(prompts, stopped)

    def _step_by_step(self, prompts: Sequence[Prompt], stopped: Stopped | None) -> list[list[int]]:
        answers: list[list[int]] = [[] for _ in prompts]
        batch: _Running | _Whole
        if takes_cache(self.model):
            batch = _Running(prompts, self._prefix, self.model, self.pad)
        else:
            batch = _Whole(prompts, answers, self.model)
        generators = [self._random(prompt) for prompt in prompts]
        numbers = self._numbers(generators)
        for step in range(self.decoding.max_new_tokens):
            logits = batch.logits().float()
            check_logits(self.model, logits)
            if numbers is None:
                chosen = self._choose(logits, answers, generators, batch.rows)
            else:
                p = torch.softmax(logits / self.decoding.temperature, -1)
                chosen = drawn(p, numbers[batch.rows, step]).tolist()
                chosen = [-1 if row < 0 else token for row, token in zip(batch.rows, chosen)]
            goes_on = [token >= 0 and token not in self.decoding.stop_ids for token in chosen]
            for row, token, goes in zip(batch.rows, chosen, goes_on):
                if goes or (token >= 0 and self.decoding.to_train_on):
                    answers[row].append(token)
            running = [
                goes and not (stopped is not None and stopped(answers[row])) for row, goes in zip(batch.rows, goes_on)
            ]
            if not batch.advance(chosen, running):
                break
        return answers

    def _choose(
        self,
        logits: Tensor,
        answers: Sequence[list[int]],
        generators: Sequence[torch.Generator | None],
        rows: Sequence[int],
    ) -> list[int]:
        """The next token of each row; -1 for rows that have stopped."""
        if self.decoding.no_repeat_ngram_size:
            for index, row in enumerate(rows):
                if row >= 0:
                    banned = repeating_tokens(answers[row], self.decoding.no_repeat_ngram_size)
                    logits[index, banned] = -torch.inf
        if self.decoding.temperature == 0:
            tokens = logits.argmax(-1).tolist()
        else:
            tokens = [
                sample(logits[index], self.decoding.temperature, self.decoding.top_p, generators[row])
                if row >= 0
                else -1
                for index, row in enumerate(rows)
            ]
        return [-1 if row < 0 else token for row, token in zip(rows, tokens)]

    def _random(self, prompt: Prompt) -> torch.Generator | None:
        """The random generator of a prompt, which depends on the prompt and the seed only, not on the batch."""
        if self.decoding.temperature == 0:
            return None
        # Hashed, since torch's CPU generator uses only 32 bits of a seed.
        name = f"{self.decoding.seed} {prompt.repeat} {prompt.ids}"
        return torch.Generator().manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:4]))

    def _numbers(self, generators: Sequence[torch.Generator | None]) -> Tensor | None:
        """For answers to train on, the uniform numbers that choose the tokens: (B, new tokens)."""
        if not self.decoding.to_train_on or self.decoding.temperature == 0:
            return None
        count = self.decoding.max_new_tokens
        numbers = [torch.rand(count, generator=generator) for generator in generators]
        return torch.stack(numbers).to(self.model.device)

    def _beam_search(self, prompts: Sequence[Prompt], stopped: Stopped | None) -> list[list[int]]:
        """Beam search by transformers. Repeated n-grams and stop strings count in the answer only."""
        from transformers import GenerationConfig

        ids, mask = as_tensor([list(prompt.ids) for prompt in prompts], self.pad, self.model.device)
        stop = sorted(self.decoding.stop_ids)
        config = GenerationConfig(
            max_new_tokens=self.decoding.max_new_tokens,
            **{**GREEDY, "num_beams": self.decoding.num_beams},
            length_penalty=self.decoding.length_penalty,
            early_stopping=False,
            eos_token_id=stop or None,
            pad_token_id=self.pad,
            use_cache=True,
        )
        size, start = self.decoding.no_repeat_ngram_size, ids.shape[1]
        processors = [only_numbers(self.model)] + [_without_repeats(start, size)] * bool(size)
        tokens = self.model.generate(
            input_ids=ids,
            attention_mask=mask,
            generation_config=config,
            logits_processor=processors,
            stopping_criteria=[] if stopped is None else [_at_stops(start, stopped)],
        )
        goes_on = self.decoding.stop_ids.isdisjoint
        return [list(itertools.takewhile(lambda token: goes_on((token,)), row)) for row in tokens[:, start:].tolist()]


class _Running:
    """The unfinished rows of a batch, and the tensors of their next step."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        prefix: tuple[tuple[int, ...], DynamicCache | None],
        model: PreTrainedModel,
        pad: int,
    ) -> None:
        self._model = model
        beginning, cache = prefix
        start = len(beginning)
        asked, self._owners = [prompt.ids for prompt in prompts], None
        distinct = list(dict.fromkeys(asked))
        if len(distinct) < len(asked) and any(prompt.repeat for prompt in prompts):
            asked = distinct
            place = {ids: number for number, ids in enumerate(asked)}
            # For each prompt, the row that computes it in the first step.
            self._owners = torch.tensor([place[prompt.ids] for prompt in prompts], device=model.device)
        if cache is not None and all(ids[:start] == beginning for ids in asked):
            self.cache = copy.deepcopy(cache)
            self.cache.batch_repeat_interleave(len(asked))
        else:
            start, self.cache = 0, DynamicCache(config=model.config)
        self.ids, mask = as_tensor([list(ids[start:]) for ids in asked], pad, model.device)
        self.positions = start + (mask.cumsum(-1) - 1).clamp(min=0)
        self.mask = torch.cat([mask.new_ones(len(asked), start), mask], dim=1)
        # The index of the prompt in each row, -1 once it has stopped.
        self.rows = list(range(len(prompts)))

    def logits(self) -> Tensor:
        """The logits of the next token, one row for each prompt.

        The first step computes equal prompts once. It then copies their rows of the logits, the cache, the mask and the
        positions to every prompt.
        """
        steps = {"input_ids": self.ids, "attention_mask": self.mask, "position_ids": self.positions}
        logits: Tensor = self._model(**steps, **_cached(self._model, self.cache)).logits[:, -1]
        if (owners := self._owners) is None:
            return logits
        self._owners = None
        self.cache.batch_select_indices(owners)
        self.mask, self.positions = self.mask[owners], self.positions[owners]
        return logits[owners]

    def advance(self, chosen: Sequence[int], running: Sequence[bool]) -> bool:
        """Use the chosen tokens as the next input. Returns False when no row is left."""
        self.rows = [row if runs else -1 for row, runs in zip(self.rows, running)]
        left = [index for index, row in enumerate(self.rows) if row >= 0]
        if not left:
            return False
        ids = torch.tensor([[max(token, 0)] for token in chosen], device=self.ids.device)
        self.positions = self.positions[:, -1:] + 1
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(ids), 1)], dim=1)
        if len(left) <= LEAVE_AT * len(self.rows):
            kept = torch.tensor(left, device=ids.device)
            self.cache.batch_select_indices(kept)
            ids, self.positions, self.mask = ids[kept], self.positions[kept], self.mask[kept]
            self.rows = [self.rows[index] for index in left]
        self.ids = ids
        return True


class _Whole:
    """The unfinished rows of a model that takes no cache: each step computes all tokens of each row anew."""

    def __init__(self, prompts: Sequence[Prompt], answers: Sequence[list[int]], model: PreTrainedModel) -> None:
        self._prompts, self._answers, self._model = prompts, answers, model
        self.rows = list(range(len(prompts)))

    def logits(self) -> Tensor:
        texts = ([*self._prompts[row].ids, *self._answers[row]] for row in self.rows)
        return torch.cat([_last_logits(self._model, ids, 1)[:, 0] for ids in texts])

    def advance(self, chosen: Sequence[int], running: Sequence[bool]) -> bool:
        self.rows = [row for row, runs in zip(self.rows, running) if runs]
        return bool(self.rows)


def _last_logits(model: PreTrainedModel, ids: Sequence[int], count: int) -> Tensor:
    """The logits of the last ``count`` tokens, without a cache: (1, count, V)."""
    logits: Tensor = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False).logits
    return logits[:, -count:]


def _cached(model: PreTrainedModel, cache: DynamicCache) -> JsonObject:
    """The cache as an argument of a step, under the name that this version of transformers uses."""
    known = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    return {"cache" if "cache" in known else "past_key_values": cache, "use_cache": True, **last}


_takes_cache: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def takes_cache(model: PreTrainedModel) -> bool:
    """Whether rows that continue from a cache have the logits of whole passes: measured once for each model.

    Some families ignore a cache of this class, or the padding of a batch. Warns (RW573).
    """
    if model not in _takes_cache:
        found, problem = probe(model, lambda: _cache_error(model))
        # NaN fails the comparison.
        fits = found is not None and found <= CHECK_TOLERANCE.get(model.dtype, LOW_PRECISION_TOLERANCE)
        _takes_cache[model] = fits
        if not fits:
            warn(
                "RW573",
                f"{type(model).__name__} cannot continue a batch of answers from cached states "
                f"({problem or f'its logits differ by {found:.2g} of themselves'}), so each token of an answer takes a "
                "pass over all before it: the results are right, but slow.",
            )
    return _takes_cache[model]


def _cache_error(model: PreTrainedModel) -> float:
    """The difference between cached steps of two rows and whole passes, as a part of the latter."""
    rows, more = [[10, 11, 12, 13, 14], [15, 12, 11]], (16, 10)
    batch = _Running([Prompt(tuple(row)) for row in rows], ((), None), model, 0)
    steps = [batch.logits().float()]
    for token in more:
        batch.advance([token, token], [True, True])
        steps.append(batch.logits().float())
    whole = torch.cat([_last_logits(model, [*row, *more], len(steps)).float() for row in rows])
    found, whole = (each - each.mean(-1, keepdim=True) for each in (torch.stack(steps, dim=1), whole))
    # Answers of NaN are refused where they are chosen.
    return float((found - whole).norm() / whole.norm()) if whole.isfinite().all() else 0.0


def as_tensor(rows: list[list[int]], pad: int, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Left-padded token ids (B, L) and their mask (B, L)."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def repeating_tokens(answer: Sequence[int], size: int) -> list[int]:
    """Tokens that would repeat an n-gram of ``answer``."""
    if len(answer) < size:
        return []
    tail = list(answer[len(answer) - size + 1 :])
    return sorted(
        {answer[i + size - 1] for i in range(len(answer) - size + 1) if list(answer[i : i + size - 1]) == tail}
    )


def sample(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """A sample from softmax(logits / T), restricted to the most likely tokens whose probabilities sum to ``top_p``."""
    p, order = torch.softmax(logits.cpu() / temperature, -1).sort(descending=True)
    # The most likely token always stays, since the sum before it is 0.
    p[p.cumsum(-1) - p >= top_p] = 0
    return int(order[torch.multinomial(p, 1, generator=generator)])


def drawn(p: Tensor, numbers: Tensor) -> Tensor:
    """For each row of p (B, V), the first token at which the cumulative sum exceeds a number (B,) in [0, 1).

    ``p`` is overwritten by its cumulative sums.
    """
    sums = p.cumsum_(-1)
    # Because of rounding, the total may differ from 1.
    return torch.searchsorted(sums, numbers[:, None] * sums[:, -1:], right=True).squeeze(1).clamp(max=p.shape[-1] - 1)


def only_numbers(model: PreTrainedModel) -> Callable[[Tensor, Tensor], Tensor]:
    """``check_logits`` for transformers' ``generate``, as one of its logits processors."""

    def process(_: Tensor, scores: Tensor) -> Tensor:
        check_logits(model, scores)
        return scores

    return process


def check_logits(model: PreTrainedModel, logits: Tensor) -> None:
    """Raise ModelError (RW323) for a row that contains NaN, or whose largest logit is infinite."""
    if not logits.amax(-1).isfinite().all():
        raise no_number(model)


def _without_repeats(start: int, size: int) -> Callable[[Tensor, Tensor], Tensor]:
    def process(ids: Tensor, scores: Tensor) -> Tensor:
        for index, row in enumerate(ids[:, start:].tolist()):
            scores[index, repeating_tokens(row, size)] = -torch.inf
        return scores

    return process


def _at_stops(start: int, stopped: Stopped) -> Callable[[Tensor, object], Tensor]:
    def has_stopped(ids: Tensor, _: object) -> Tensor:
        return torch.tensor([stopped(row) for row in ids[:, start:].tolist()], device=ids.device)

    return has_stopped

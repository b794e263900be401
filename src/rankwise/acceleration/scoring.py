"""log p(continuation | context) for many pairs. Shared contexts are computed once, with almost no padding.

    score(context, continuation) = sum_t log p(y_t | context, y_<t),   greedy: whether each y_t is the argmax

Equal to lm-evaluation-harness, which scores pair by pair, up to float32 rounding. V vocabulary, P scored positions.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.acceleration import attention
from rankwise.acceleration.packing import Ids, PackedRow, Tree, batches_of, build_trees, lay_out, pack
from rankwise.compat.transformers import attention_of
from rankwise.errors import ModelError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Tokens of a packed row: attention costs the square of its length, and short rows need more padding.
ROW_TOKENS = 256
# Largest number of tokens of a tree (or its longest sequence), so that few-shot examples are shared by all questions.
TREE_TOKENS = 1024
TREE_SEQUENCES = 3
# Number of logits computed together: 128 MiB in float32.
LOGITS_AT_ONCE = 1 << 25
# The limits for a loss, since an evaluation during training must not need more memory than a step.
LOSS_TOKENS, LOSS_LOGITS = 1024, 1 << 22
# Names in configurations for the window of local layers.
WINDOWS = ("sliding_window", "attention_chunk_size", "window_size")
# Largest root mean square over tokens of the error relative to 1 + |log p|. Rounding in bfloat16 gives about 0.02; a
# mask that the model ignores gives 1 or more.
CHECK_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
LOW_PRECISION_TOLERANCE = 0.1
# Largest difference of a logit. Sums and their order are the same, so only a scale or softcap after the head shows.
HEAD_TOLERANCE = 0.02


@dataclasses.dataclass(frozen=True)
class Target:
    """A sequence to run, its scored positions, and the target tokens after them."""

    ids: Ids
    places: Ids
    wanted: Ids


@dataclasses.dataclass(frozen=True)
class Score:
    """The log-likelihood of each target token, and the number of target tokens that were the argmax."""

    tokens: tuple[float, ...]
    hits: int

    @property
    def total(self) -> float:
        return math.fsum(self.tokens)

    @property
    def greedy(self) -> bool:
        """Whether every target token was the argmax."""
        return self.hits == len(self.tokens)


def target_of(context: Sequence[int], continuation: Sequence[int], max_length: int) -> Target:
    """The target that scores ``continuation``. A long input is truncated on the left, as in lm-evaluation-harness."""
    if not continuation:
        raise ValueError("an empty continuation has no likelihood")
    whole = tuple([*context, *continuation][-(max_length + 1) :])
    # If a continuation is longer than the model's input, only the part within the input is scored.
    count = min(len(continuation), len(whole) - 1)
    return Target(whole[:-1], tuple(range(len(whole) - 1 - count, len(whole) - 1)), whole[-count:])


def trained_target(ids: Sequence[int], trained: Sequence[bool]) -> Target | None:
    """The target for the trained tokens of ``ids``; None where no trained token follows another token."""
    places = tuple(place for place in range(len(ids) - 1) if trained[place + 1])
    return Target(tuple(ids[:-1]), places, tuple(ids[place + 1] for place in places)) if places else None


def loss_scorer(model: PreTrainedModel, *, max_rows: int | None = None, autocast: torch.dtype | None = None) -> Scorer:
    """The scorer of every reported loss, in training and in evaluations.

    In 16 bits, a token's loss may round differently in another batch, so the batches depend on the rows only.
    """
    return Scorer(model, budget=LOSS_TOKENS, max_rows=max_rows, logits_at_once=LOSS_LOGITS, autocast=autocast)


class Scorer:
    """Scores targets on one model. ``budget``: tokens of a batch; ``max_rows``: largest number of its rows.

    ``autocast``: the dtype in which float32 weights are computed, as in full fine-tuning.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        budget: int,
        max_rows: int | None = None,
        pad: int = 0,
        logits_at_once: int = LOGITS_AT_ONCE,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.model = model
        self.budget = budget
        self.max_rows = max_rows
        self.pad = pad
        self.logits_at_once = logits_at_once
        self.autocast = autocast
        # Whether the rows of the last plan are packed.
        self.packs = False
        self.window = window_of(model)
        # Whether packed rows are correct on this model; tested on the first targets.
        self._packing: bool | None = None
        self._told = False

    def plan(self, targets: Sequence[Target]) -> list[list[PackedRow]]:
        """Batches of rows that hold all targets; they depend on the set of targets, not on their order."""
        if not targets:
            return []
        problem = self._window_problem(max(len(target.ids) for target in targets))
        if problem is not None:
            self.packs = False
            self._say(problem)
        else:
            if self._packing is None:
                self._packing = self._packing_is_right(targets)
            self.packs = self._packing
        return list(self.batches(targets))

    def score(self, targets: Sequence[Target]) -> Iterator[dict[int, Score]]:
        """Batches of {number of the target: its score}."""
        for batch in self.plan(targets):
            yield self.score_batch(batch, targets)

    def batches(self, targets: Sequence[Target]) -> Iterator[list[PackedRow]]:
        sequences = [target.ids for target in targets]
        budget = self.budget
        if self.packs:
            longest = max(TREE_TOKENS, TREE_SEQUENCES * max(map(len, sequences)))
            # Within the window, packed rows are also correct for local layers that count columns instead of positions.
            longest = min(longest, self.window or longest)
            rows = pack(build_trees(sequences, longest=longest), ROW_TOKENS)
        else:
            rows = pack(_single_trees(sequences), 0)
            # Here logits are computed at all positions.
            budget = min(budget, 4 * self.logits_at_once // _vocabulary(self.model))
        for batch in batches_of(rows, budget):
            step = self.max_rows or len(batch)
            for start in range(0, len(batch), step):
                yield batch[start : start + step]

    def score_batch(self, rows: Sequence[PackedRow], targets: Sequence[Target]) -> dict[int, Score]:
        """Scores of one batch of ``plan``, by the number of the target. Raises ModelError (RW323) for NaN."""
        places: list[tuple[int, int]] = []
        wanted: list[int] = []
        owners: list[tuple[int, int]] = []
        for index, row in enumerate(rows):
            for start, tree in row.trees:
                for member, path in zip(tree.members, tree.paths):
                    asked = targets[member]
                    places += [(index, start + path[place]) for place in asked.places]
                    wanted += asked.wanted
                    owners.append((member, len(asked.wanted)))
        log_p, likeliest = self._log_p(rows, places, wanted)
        if any(map(math.isnan, log_p)):
            raise no_number(self.model)
        scores, position = {}, 0
        for member, count in owners:
            end = position + count
            scores[member] = Score(tuple(log_p[position:end]), sum(likeliest[position:end]))
            position = end
        return scores

    # no_grad, not inference mode, since training uses what layers cache here.
    @torch.no_grad()
    def _log_p(
        self, rows: Sequence[PackedRow], places: Sequence[tuple[int, int]], wanted: Sequence[int]
    ) -> tuple[list[float], list[bool]]:
        """The log-likelihood of the target token at each place (row, column), and whether it is the argmax."""
        batch = lay_out(rows, self.pad, self.model.device)
        where = torch.tensor(places, device=batch.ids.device)
        asked = torch.tensor(wanted, device=batch.ids.device)
        with self._computing():
            if self.packs:
                hidden = hidden_states(self.model, batch.ids, batch.positions, batch.mask)
                logits_of: Callable[[Tensor], Tensor] = _head_logits(self.model, hidden)
            else:
                # Right padding needs no mask under causal attention.
                logits_of = _whole_logits(self.model, batch.ids)
            return _gathered(logits_of, where, asked, self._positions_at_once())

    def _computing(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _all(self, targets: Sequence[Target]) -> dict[int, Score]:
        batches = (self.score_batch(batch, targets) for batch in self.batches(targets))
        return {index: score for batch in batches for index, score in batch.items()}

    def _positions_at_once(self) -> int:
        return max(1, self.logits_at_once // _vocabulary(self.model)) if self.packs else 1 << 30

    def _packing_is_right(self, targets: Sequence[Target]) -> bool:
        """Compare a packed row with the same sequences separately, once per model; warn (RW573) where they differ."""
        probe = _probe(targets)
        self.packs = False
        plain = self._all(probe)
        problem = packing_problem(self.model) or self._measured_problem(probe, plain)
        if problem is not None:
            self._say(problem)
        return problem is None

    def _say(self, problem: str) -> None:
        if not self._told:
            self._told = True
            warn(
                "RW573",
                f"{type(self.model).__name__} cannot score several sequences in one row ({problem}), so each gets a "
                "row of its own: the results are the same, but slower.",
            )

    def _window_problem(self, longest: int) -> str | None:
        """Why packing is wrong for rows of this length, or None: the mask shows whole sequences, also to layers with a
        window.
        """
        if self.window is None or self.window >= max(longest, ROW_TOKENS):
            return None
        return f"layers see {self.window:,} tokens, and a row has {max(longest, ROW_TOKENS):,}"

    def _measured_problem(self, probe: Sequence[Target], plain: Mapping[int, Score]) -> str | None:
        """Why packing ``probe`` is wrong, or None. The model may raise any error here."""
        self.packs = True
        try:
            longest = max(probe, key=lambda target: len(target.ids))
            with self._computing():
                problem = _head_problem(self.model, longest.ids)
            return problem or _difference(plain, self._all(probe), self.autocast or self.model.dtype)
        except (TypeError, ValueError, RuntimeError, AttributeError) as error:
            reason = (str(error).splitlines() or ["no message"])[0][:100]
            return f"{type(error).__name__}: {reason}"


def no_number(model: PreTrainedModel) -> ModelError:
    """The error for NaN or infinite logits, which give neither a likelihood nor a next token."""
    wider = ", or give --dtype bfloat16: float16 ends at 65,504" if model.dtype == torch.float16 else ""
    return ModelError(
        "RW323",
        f"the model ({type(model).__name__}) computes NaN or infinity; check the numbers in its config.json and the "
        f"scale of its adapter (lora_alpha, r){wider}.",
    )


def packing_problem(model: PreTrainedModel) -> str | None:
    """Why this model's configuration excludes rows of several sequences, or None."""
    config = model.config.get_text_config(decoder=True)
    if (name := attention_of(config)) not in ("sdpa", "eager", attention.NAME):
        return f"attention {name} does not support such a mask"
    return None


def window_of(model: PreTrainedModel) -> int | None:
    """The number of tokens in the narrowest window of the layers; None where all layers see everything."""
    config = model.config.get_text_config(decoder=True)
    names = WINDOWS if getattr(config, "use_sliding_window", True) else WINDOWS[1:]
    found = [getattr(config, name, None) for name in names]
    return min((window for window in found if isinstance(window, int)), default=None)


def _vocabulary(model: PreTrainedModel) -> int:
    return int(model.config.get_text_config(decoder=True).vocab_size)


def hidden_states(model: PreTrainedModel, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states (B, R, H) of token ids (B, R) at their positions, under a boolean mask (B, 1, R, R)."""
    if attention_of(model.config.get_text_config(decoder=True)) == "eager":
        mask = torch.where(mask, 0.0, torch.finfo(model.dtype).min).to(model.dtype)
    output = model.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    hidden: Tensor = output.last_hidden_state
    return hidden


def _head_logits(model: PreTrainedModel, hidden: Tensor) -> Callable[[Tensor], Tensor]:
    head = model.get_output_embeddings()
    return lambda where: head(hidden[where[:, 0], where[:, 1]]).float()


def _whole_logits(model: PreTrainedModel, ids: Tensor) -> Callable[[Tensor], Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    return lambda where: logits[where[:, 0], where[:, 1]].float()


def _gathered(
    logits_of: Callable[[Tensor], Tensor], where: Tensor, wanted: Tensor, at_once: int
) -> tuple[list[float], list[bool]]:
    # Several choices start at the end of one context, whose logits are computed once.
    distinct, inverse = torch.unique(where, dim=0, return_inverse=True)
    log_p, likeliest = torch.empty(len(wanted)), torch.empty(len(wanted), dtype=torch.bool)
    order = torch.argsort(inverse, stable=True)
    counts = torch.bincount(inverse, minlength=len(distinct))
    for start in range(0, len(distinct), at_once):
        logits = logits_of(distinct[start : start + at_once])
        first, last = int(counts[:start].sum()), int(counts[: start + at_once].sum())
        chosen = order[first:last]
        local = inverse[chosen] - start
        normalizer = torch.logsumexp(logits, dim=-1)
        log_p[chosen.cpu()] = (logits[local, wanted[chosen]] - normalizer[local]).cpu()
        likeliest[chosen.cpu()] = (logits.argmax(-1)[local] == wanted[chosen]).cpu()
    return log_p.tolist(), likeliest.tolist()


def _single_trees(sequences: Sequence[Ids]) -> Iterable[Tree]:
    for index, ids in enumerate(sequences):
        [tree] = build_trees([ids], longest=0)
        yield dataclasses.replace(tree, members=(index,))


def _probe(targets: Sequence[Target]) -> list[Target]:
    """A few short targets, two of them with a common prefix if there are any."""
    short = sorted({(len(target.ids), target.ids, target.places, target.wanted) for target in targets})[:64]
    pairs = [
        (a, b)
        for a, b in itertools.pairwise(short)
        if a[1] != b[1] and 4 * sum(1 for x, y in zip(a[1], b[1]) if x == y) >= len(b[1])
    ]
    chosen = dict.fromkeys([*(pairs[0] if pairs else ()), *short[:3]])
    return [Target(*fields) for _, *fields in chosen]


def _difference(plain: Mapping[int, Score], packed: Mapping[int, Score], dtype: torch.dtype) -> str | None:
    pairs = [(a, b) for key in plain for a, b in zip(plain[key].tokens, packed[key].tokens)]
    errors = [((a - b) / (1 + abs(a))) ** 2 for a, b in pairs]
    size = math.sqrt(math.fsum(errors) / max(1, len(errors)))
    # NaN fails the comparison, and so counts as a difference.
    if size <= CHECK_TOLERANCE.get(dtype, LOW_PRECISION_TOLERANCE):
        return None
    return f"log-likelihoods differ by {size:.2g} of themselves"


@torch.no_grad()
def _head_problem(model: PreTrainedModel, ids: Ids) -> str | None:
    """Why the logits are not the output head's on the last hidden states, or None."""
    tokens = torch.tensor([ids], device=model.device)
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(hidden).float()
    if ours.shape == logits.shape and torch.allclose(ours, logits, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE):
        return None
    return "its logits are more than its output head"

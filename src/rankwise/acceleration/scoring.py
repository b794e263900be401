"""log p(continuation | context) for many pairs. Shared contexts are computed once, with almost no padding.

    score(context, continuation) = sum_t log p(y_t | context, y_<t),   greedy: whether each y_t is the argmax

Equal to lm-evaluation-harness, which scores pair by pair, up to float32 rounding. V vocabulary, P scored positions.

Sequences with common prefixes are packed so that no token is computed twice. A ``Tree`` is a trie of token sequences.
Its nodes are concatenated in a row, which may hold several trees:

    row      [context of q1 | its choice A | choice B | context of q2 | ...]
    position  0 1 2 3 4       5 6            5 6 7      0 1 2 ...

A token attends to the earlier tokens of its own node and to the node's ancestors, and to nothing else. So each path
through the tree gets the same logits as in a row of its own.  R tokens in a row, B rows in a batch, N nodes in a row.
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
from rankwise.acceleration.layouts import common_length
from rankwise.compat.transformers import attention_of
from rankwise.errors import ModelError, warn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Ids = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Node:
    """Consecutive tokens, and the index of their parent node (-1 for a root)."""

    ids: Ids
    parent: int
    # Position of the first token in its path.
    start: int
    # Column of the first token in the tree.
    offset: int


@dataclasses.dataclass(frozen=True)
class Tree:
    """Sequences with common prefixes. ``paths[i]`` holds the columns of sequence i in the tree, in order."""

    # Indices of the tree's sequences among the given ones.
    members: tuple[int, ...]
    nodes: tuple[Node, ...]
    paths: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        return sum(len(node.ids) for node in self.nodes)


def build_trees(sequences: Sequence[Ids], *, longest: int) -> list[Tree]:
    """Trees over ``sequences``. Those that share at least a quarter of their tokens with a neighbour are in one tree.

    A tree has at most ``longest`` tokens, unless a single sequence is longer. The result depends on the set of
    sequences only, not on their order.
    """
    order = sorted(range(len(sequences)), key=lambda index: sequences[index])
    trees: list[Tree] = []
    group: list[int] = []
    size = 0
    for index in order:
        ids = sequences[index]
        shared = common_length(sequences[group[-1]], ids) if group else 0
        if group and (4 * shared < len(ids) or size + len(ids) - shared > longest):
            trees.append(_tree(group, sequences))
            group, size, shared = [], 0, 0
        group.append(index)
        size += len(ids) - shared
    return [*trees, _tree(group, sequences)] if group else trees


def _tree(group: Sequence[int], sequences: Sequence[Ids]) -> Tree:
    """A trie over lexicographically sorted sequences: each is attached to the path of the one before it."""
    nodes: list[Node] = []
    columns: list[tuple[int, ...]] = []
    # For each sequence, the (node, column) of each of its tokens.
    chains: list[list[tuple[int, int]]] = []
    before: Ids = ()
    for index in group:
        ids = sequences[index]
        shared = common_length(before, ids)
        chain = list(chains[-1][:shared]) if chains else []
        if shared < len(ids):
            offset = nodes[-1].offset + len(nodes[-1].ids) if nodes else 0
            nodes.append(Node(ids[shared:], chain[-1][0] if chain else -1, shared, offset))
            chain += [(len(nodes) - 1, offset + step) for step in range(len(ids) - shared)]
        chains.append(chain)
        columns.append(tuple(column for _, column in chain))
        before = ids
    return Tree(tuple(group), tuple(nodes), tuple(columns))


@dataclasses.dataclass(frozen=True)
class PackedRow:
    """Trees in one row, each with its first column."""

    trees: tuple[tuple[int, Tree], ...]

    @property
    def length(self) -> int:
        return sum(tree.length for _, tree in self.trees)


def pack(trees: Iterable[Tree], capacity: int) -> list[PackedRow]:
    """Rows of at most ``capacity`` tokens (or one tree), filled first-fit by decreasing length."""
    ordered = sorted(trees, key=lambda tree: (-tree.length, tree.nodes[0].ids, tree.members))
    rows: list[list[Tree]] = []
    free: list[int] = []
    for tree in ordered:
        place = next((index for index, left in enumerate(free) if left >= tree.length), None)
        if place is None:
            rows.append([tree])
            free.append(max(0, capacity - tree.length))
        else:
            rows[place].append(tree)
            free[place] -= tree.length
    return [_row(row) for row in rows]


def _row(trees: Sequence[Tree]) -> PackedRow:
    placed, column = [], 0
    for tree in trees:
        placed.append((column, tree))
        column += tree.length
    return PackedRow(tuple(placed))


def batches_of(rows: Sequence[PackedRow], budget: int) -> Iterator[list[PackedRow]]:
    """Batches of rows with similar lengths: up to ``budget`` tokens with padding, or a single row."""
    batch: list[PackedRow] = []
    for row in sorted(rows, key=lambda row: -row.length):
        if batch and (len(batch) + 1) * batch[0].length > budget:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def members_of(rows: Sequence[PackedRow]) -> tuple[int, ...]:
    """Indices of the sequences that were packed into these rows, in the order of the rows."""
    return tuple(member for row in rows for _, tree in row.trees for member in tree.members)


@dataclasses.dataclass(frozen=True)
class PackedBatch:
    """``ids`` and ``positions`` (B, R); ``mask`` (B, 1, R, R), True if the second attends to the first's keys."""

    ids: Tensor
    positions: Tensor
    mask: Tensor


def lay_out(rows: Sequence[PackedRow], pad: int, device: torch.device | str) -> PackedBatch:
    """The tensors of a batch. Padding attends to padding, so that no softmax has an empty range."""
    width = max(row.length for row in rows)
    ids = torch.full((len(rows), width), pad)
    positions = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), 1, width, width), dtype=torch.bool)
    for index, row in enumerate(rows):
        sees = mask[index, 0]
        for start, tree in row.trees:
            _lay_tree(tree, start, ids[index], positions[index], sees)
        end = row.length
        sees[end:, end:] = True
    return PackedBatch(ids.to(device), positions.to(device), mask.to(device))


def _lay_tree(tree: Tree, start: int, ids: Tensor, positions: Tensor, sees: Tensor) -> None:
    for node in tree.nodes:
        first, count = start + node.offset, len(node.ids)
        span = slice(first, first + count)
        ids[span] = torch.tensor(node.ids)
        positions[span] = torch.arange(node.start, node.start + count)
        sees[span, span] = torch.ones(count, count, dtype=torch.bool).tril()
        parent, upto = node.parent, node.start
        while parent >= 0:
            above = tree.nodes[parent]
            # A node may branch off inside its parent, whose positions below ``upto`` belong to its path.
            kept = min(len(above.ids), upto - above.start)
            sees[span, start + above.offset : start + above.offset + kept] = True
            parent, upto = above.parent, above.start


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
HEAD_POSITIONS = 8


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
    """The target for the trained tokens of ``ids``; None if no trained token follows another token."""
    places = tuple(place for place in range(len(ids) - 1) if trained[place + 1])
    return Target(tuple(ids[:-1]), places, tuple(ids[place + 1] for place in places)) if places else None


def loss_scorer(model: PreTrainedModel, *, max_rows: int | None = None, autocast: torch.dtype | None = None) -> Scorer:
    """The scorer of every reported loss, in training and in evaluations.

    In 16 bits, a token's loss may round differently in a different batch, so the batches depend on the rows only.
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
        longest = max(ROW_TOKENS, *(len(target.ids) for target in targets))
        # The mask shows whole sequences, also to layers with a window.
        if self.window is not None and self.window < longest:
            self.packs = False
            self._say(f"layers see {self.window:,} tokens, and a row has {longest:,}")
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
            trees = (build_trees([ids], longest=0)[0] for ids in sequences)
            rows = pack((dataclasses.replace(tree, members=(index,)) for index, tree in enumerate(trees)), 0)
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
        at_once = max(1, self.logits_at_once // _vocabulary(self.model))
        with self._computing():
            if self.packs:
                hidden = hidden_states(self.model, batch.ids, batch.positions, batch.mask)
                head = self.model.get_output_embeddings()
                return _gathered(lambda at: head(hidden[at[:, 0], at[:, 1]]), where, asked, at_once)
            # Right padding needs no mask under causal attention.
            logits = self.model(input_ids=batch.ids, use_cache=False).logits
            return _gathered(lambda at: logits[at[:, 0], at[:, 1]], where, asked, at_once)

    def _computing(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, dtype=self.autocast, enabled=self.autocast is not None)

    def _all(self, targets: Sequence[Target]) -> dict[int, Score]:
        batches = (self.score_batch(batch, targets) for batch in self.batches(targets))
        return {index: score for batch in batches for index, score in batch.items()}

    def _packing_is_right(self, targets: Sequence[Target]) -> bool:
        """Compare a packed row with the same sequences separately, once per model; warn (RW573) if they differ."""
        probe = _probe(targets)
        self.packs = False
        # One by one, since these logits are computed at all positions.
        plain = {number: self._all([target])[0] for number, target in enumerate(probe)}
        name = attention_of(self.model.config.get_text_config(decoder=True))
        if name in ("sdpa", "eager", attention.NAME):
            problem = self._measured_problem(probe, plain)
        else:
            problem = f"attention {name} does not support such a mask"
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


def window_of(model: PreTrainedModel) -> int | None:
    """The number of tokens in the narrowest window of the layers; None if all layers see everything."""
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


def _gathered(
    logits_of: Callable[[Tensor], Tensor], where: Tensor, wanted: Tensor, at_once: int
) -> tuple[list[float], list[bool]]:
    # Several choices start at the end of one context, whose logits are computed once.
    distinct, inverse = torch.unique(where, dim=0, return_inverse=True)
    log_p, likeliest = torch.empty(len(wanted)), torch.empty(len(wanted), dtype=torch.bool)
    order = torch.argsort(inverse, stable=True)
    counts = torch.bincount(inverse, minlength=len(distinct))
    for start in range(0, len(distinct), at_once):
        logits = logits_of(distinct[start : start + at_once]).float()
        first, last = int(counts[:start].sum()), int(counts[: start + at_once].sum())
        chosen = order[first:last]
        local = inverse[chosen] - start
        normalizer = torch.logsumexp(logits, dim=-1)
        log_p[chosen.cpu()] = (logits[local, wanted[chosen]] - normalizer[local]).cpu()
        likeliest[chosen.cpu()] = (logits.argmax(-1)[local] == wanted[chosen]).cpu()
        # Not beside the next part's.
        del logits
    return log_p.tolist(), likeliest.tolist()


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
    # A few positions show it, and take less memory.
    logits = model(input_ids=tokens, use_cache=False).logits[:, -HEAD_POSITIONS:].float()
    hidden = model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
    ours = model.get_output_embeddings()(hidden[:, -HEAD_POSITIONS:]).float()
    if ours.shape == logits.shape and torch.allclose(ours, logits, rtol=HEAD_TOLERANCE, atol=HEAD_TOLERANCE):
        return None
    return "its logits are more than its output head"

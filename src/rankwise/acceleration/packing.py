"""Sequences with common prefixes, packed so that no token is computed twice and there is almost no padding.

A ``Tree`` is a trie of token sequences. Its nodes are concatenated in a row, which may hold several trees:

    row      [context of q1 | its choice A | choice B | context of q2 | ...]
    position  0 1 2 3 4       5 6            5 6 7      0 1 2 ...

A token attends to the earlier tokens of its own node and to the node's ancestors, and to nothing else. So each path
through the tree gets the same logits as it would alone.

R tokens in a row, B rows in a batch, N nodes in a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

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


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """The length of the common prefix of ``a`` and ``b``."""
    for index, (x, y) in enumerate(zip(a, b)):
        if x != y:
            return index
    return min(len(a), len(b))


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
        place = next((index for index, room in enumerate(free) if room >= tree.length), None)
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
    """``ids`` and ``positions`` (B, R); ``mask`` (B, 1, R, R), True where the second attends to the first's keys."""

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

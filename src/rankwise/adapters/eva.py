"""EVA (Paischer et al. 2024, arXiv 2410.07170, section 3 and algorithm 1):  A = the first r right singular vectors of
the layer's inputs on training rows, B = 0.

An incremental PCA (Ross et al. 2008) takes the inputs at trained positions, batch by batch, until the vectors settle:
until each has a cosine similarity of at least 0.99 (the paper's tau) to its value before the last batch. With rho > 1 a
layer may get up to rho times its rank: the components of all layers are sorted by the share of their layer's variance
that they explain, and the first sum(r) of them are kept (algorithm 1, lines 13 to 16).

Steps, seed and dtypes are PEFT 0.21's (``tuners/lora/eva.py``, ``utils/incremental_pca.py``), so that the same batches
in the same order give the same vectors. Shapes: X (n, in), components (k, in).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.constants import IGNORED
from rankwise.errors import AdapterError, warn

# Inputs of a model: input_ids (B, L), and attention_mask (B, L) and labels (B, L) where there are any.
Batch = Mapping[str, Tensor]
TAU = 0.99
# Seed and power iterations of the randomised SVD, which computes twice as many vectors as it returns.
SEED, ITERATIONS = 42, 4
# The limit on batches, which PEFT does not have.
MOST_BATCHES = 256


@dataclasses.dataclass
class Components:
    """The incremental PCA of one layer's inputs."""

    count: int
    vectors: Tensor | None = None
    singular: Tensor | None = None
    mean: Tensor | None = None
    # Sum of squared deviations from the mean over all inputs so far: (in,).
    scatter: Tensor | None = None
    seen: int = 0
    # Share of the variance that each vector explains: (count,).
    explained: Tensor | None = None
    # Inputs so far where they are fewer than ``count``, too few to be decomposed.
    waiting: Tensor | None = None
    # Whether the last batch left each vector unchanged, up to TAU: (count,).
    settled: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.settled = torch.zeros(self.count, dtype=torch.bool)

    def add(self, X: Tensor) -> None:
        """Add a batch of inputs X (n, in). Fewer than ``count`` rows wait for the next batch (PEFT drops them)."""
        X = X if self.waiting is None else torch.cat([self.waiting, X])
        self.waiting = X if len(X) < self.count else None
        if self.waiting is not None:
            return
        before = self.vectors
        X, total = self._centred(X), self.seen + len(X)
        S, V = _right_vectors(X, self.count)
        self.seen, self.vectors, self.singular = total, V, S
        assert self.scatter is not None
        self.explained = S.square() / self.scatter.sum()
        if before is not None:
            self.settled = F.cosine_similarity(V, before) >= TAU

    def _centred(self, X: Tensor) -> Tensor:
        """The earlier components times their singular values, the centred batch, and a row for the mean's shift."""
        n, sums = len(X), X.sum(dim=0, dtype=torch.float64)
        scatter = (X - sums / n).square().sum(dim=0)
        if self.vectors is None or self.mean is None or self.singular is None or self.scatter is None:
            self.mean, self.scatter = sums / n, scatter
            return (X - self.mean).to(X.dtype)
        moved = self.mean - X.mean(dim=0)
        weight = self.seen * n / (self.seen + n)
        rows = (self.singular[:, None] * self.vectors, X - X.mean(dim=0), weight**0.5 * moved[None])
        # The scatter of the union of two sets, from their exact means.
        self.scatter = self.scatter + scatter + weight * (self.mean - sums / n).square()
        self.mean = (self.mean * self.seen + sums) / (self.seen + n)
        return torch.vstack(rows)


def _right_vectors(X: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The first singular values (count,) and right singular vectors (count, in) of X. The sign makes the entry of
    largest magnitude positive."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        _, S, V = torch.svd_lowrank(X, q=min(2 * count, *X.shape), niter=ITERATIONS)
    V = V.T[:count]
    signs = V.gather(1, V.abs().argmax(dim=1, keepdim=True)).sign()
    return S[:count], V * signs


@torch.no_grad()
def input_directions(
    model: nn.Module, ranks: Mapping[str, int], batches: Iterable[Batch], rho: float = 1.0
) -> dict[str, Tensor]:
    """{layer: A (r, in)} of the linear layers in ``ranks``, in float32 on the CPU. With ``rho`` > 1 ranks may change.

    Raises AdapterError: RW427 without batches, RW429 for too few trained tokens or a layer that is not called. Warns
    (RW430) of layers that have not settled after 256 batches.
    """
    rows = iter(batches)
    first = next(rows, None)
    if first is None:
        raise AdapterError("RW427", "eva got no training rows; give batches of input_ids.")
    training = model.training
    model.eval()
    try:
        leaders = _leaders(model, ranks, first)
        wanted = {name: round(rank * rho) for name, rank in ranks.items()}
        most = {name: max(wanted[other] for other in wanted if leaders[other] == leaders[name]) for name in wanted}
        pca = {name: Components(most[name]) for name in dict.fromkeys(leaders.values())}
        given = _until_settled(model, pca, leaders, sum(ranks.values()), itertools.chain([first], rows))
    finally:
        model.train(training)
    return {name: _vectors(pca[leaders[name]])[:rank].to("cpu", torch.float32) for name, rank in given.items()}


def _until_settled(
    model: nn.Module,
    pca: Mapping[str, Components],
    leaders: Mapping[str, str],
    budget: int,
    batches: Iterable[Batch],
) -> dict[str, int]:
    """Run batches in a cycle until all needed vectors settle. Returns each layer's rank."""
    given = {name: pca[leader].count for name, leader in leaders.items()}
    for batch in itertools.islice(itertools.cycle(batches), MOST_BATCHES):
        open_ = [name for name, layer in pca.items() if not _is_settled(layer, given[name])]
        if not open_:
            return given
        with _inputs_of(model, open_, batch, lambda name, X: pca[name].add(X.float())):
            _forward(model, batch)
        if all(layer.vectors is not None for layer in pca.values()):
            given = _ranks(pca, leaders, budget)
    if missing := [name for name, layer in pca.items() if layer.vectors is None]:
        raise AdapterError(
            "RW429",
            f"eva's rows have fewer than the {pca[missing[0]].count} trained tokens that {missing[0]} needs; give more "
            "rows or a smaller rank.",
        )
    if open_ := [name for name, layer in pca.items() if not _is_settled(layer, given[name])]:
        warn(
            "RW430",
            f"after {MOST_BATCHES} batches the directions of {len(open_)} of {len(pca)} layers have not settled "
            f"({open_[0]}); their last values are used.",
        )
    return given


def _is_settled(layer: Components, rank: int) -> bool:
    return bool(layer.settled[:rank].all())


def _ranks(pca: Mapping[str, Components], leaders: Mapping[str, str], budget: int) -> dict[str, int]:
    """{layer: number of its components among the best ``budget``}. Of layers with one input, the leader has most."""
    named = [(name, share) for name in leaders for share in _explained(pca[leaders[name]])]
    order = torch.stack([share for _, share in named]).argsort(descending=True)[:budget]
    counts = Counter(named[index][0] for index in order.tolist())
    given = {name: counts[name] for name in leaders}
    for name, leader in leaders.items():
        if given[name] > given[leader]:
            given[name], given[leader] = given[leader], given[name]
    return given


def _explained(layer: Components) -> Tensor:
    assert layer.explained is not None, "after a batch"
    return layer.explained


def _vectors(layer: Components) -> Tensor:
    assert layer.vectors is not None, "after a batch"
    return layer.vectors


def _leaders(model: nn.Module, names: Mapping[str, int], batch: Batch) -> dict[str, str]:
    """{layer: the first layer that reads the same input}, leaders first, so that each input is decomposed once."""
    inputs: dict[str, int] = {}
    with _inputs_of(
        model, names, batch, lambda name, X: inputs.update({name: hash(X.float().cpu().numpy().tobytes())})
    ):
        _forward(model, batch)
    if unseen := [name for name in names if name not in inputs]:
        raise AdapterError(
            "RW429", f"the forward pass does not call {unseen[0]}, so eva has no inputs of it; exclude that layer."
        )
    first_with = {inputs[name]: name for name in reversed(list(names))}
    found = {name: first_with[inputs[name]] for name in names}
    return {name: name for name in names if found[name] == name} | found


@contextmanager
def _inputs_of(
    model: nn.Module, names: Iterable[str], batch: Batch, take: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """A context in which ``take(name, X)`` gets each layer's inputs X (n, in) at trained positions."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    if "labels" in batch:
        mask = mask & (batch["labels"] != IGNORED)

    def hook(name: str, _: nn.Module, given: tuple[Tensor, ...]) -> None:
        X = given[0].flatten(0, -2)
        # A layer of a mixture may get only some positions, in another order.
        take(name, X[mask.flatten().to(X.device)] if len(X) == mask.numel() else X)

    layers = {name: model.get_submodule(name) for name in names}
    handles = [layer.register_forward_pre_hook(functools.partial(hook, name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _forward(model: nn.Module, batch: Batch) -> None:
    device = next(model.parameters()).device
    model(**{name: value.to(device) for name, value in batch.items() if name != "labels"})

"""DoRA as LoRA of a given rank, with its error: dW' = P_R dW, the best of rank R for the layer's own inputs X.

DoRA's dW = diag(g - 1) W + diag(g) s B A has full rank. Of all matrices of rank R, the one that minimises
||(dW' - dW) X||_F is U_R U_R^T dW, where U_R holds the R leading left-singular vectors of dW X (Eckart-Young on dW X):
B' = U_R, A' = U_R^T dW. No split of R between the two terms does better. Without inputs X = I.

The error over all layers says little of some of them: in SmolLM2 one layer, which writes the outliers of the residual
stream, has 85 % of ||dW X||^2 and needs one direction. So the rank grows until held-out rows are as likely, too.

Shapes: W, dW (out, in), X (T, in) for T tokens, U (out, R), A = U^T dW (R, in).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from rankwise.adapters.attached import adapted_layers
from rankwise.adapters.base_layer import dense_weight
from rankwise.adapters.dora import Dora
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.low_rank import gain
from rankwise.errors import AdapterError
from rankwise.export.pairs import Pair

RANKS_TRIED = (64, 512)
"""To find the least rank, so many directions of each layer are looked at first, and then so many."""
SPARE_DIRECTIONS = 8
POWER_ITERATIONS = 4
MOST_TOKENS = 4096
DEFAULT_ERROR = 0.05
# How far the perplexity of held-out rows may be from the trained adapter's, relatively; more with a --max-error above
# the default, in proportion.
PERPLEXITY_CHANGE = 0.01
RANK_GROWTH = 1.5


@dataclasses.dataclass(frozen=True)
class Conversion:
    """What converting cost. Errors are relative: ||(dW' - dW) X|| / ||dW X||, or without inputs in Frobenius norm."""

    r: int
    least_r: int
    # The least rank that keeps the error; `r` keeps the perplexity of held-out rows too.
    error: float
    # Over all layers: sqrt of the sums of squares.
    by_layer: Mapping[str, float]
    tokens: int
    # Of the inputs X; 0: Frobenius.


@dataclasses.dataclass(frozen=True)
class Directions:
    """Of one layer: U (out, q), A (q, in), the energy ||u_i^T dW X||^2 of each, and that of the whole ||dW X||^2."""

    U: Tensor
    A: Tensor
    energies: Tensor
    total: float

    def lost(self, r: int) -> float:
        return max(0.0, self.total - float(self.energies[:r].sum()))

    def pair(self, r: int) -> Pair:
        return Pair(self.A[:r], self.U[:, :r])


@torch.no_grad()
def convert(
    model: nn.Module,
    name: str,
    rows: Sequence[Tensor],
    *,
    r: int | None,
    max_error: float | None,
    keeps: Callable[[dict[str, Pair]], bool] | None = None,
) -> tuple[dict[str, Pair], Conversion]:
    """The layers of the adapter ``name``, which is at work, as pairs of one rank: ``r``, or the least that keeps
    ``max_error`` (default 0.05), and from there the first that ``keeps`` is true of. ``rows``: token ids whose inputs
    weigh the error.

    Raises AdapterError (RW732) where no rank that was tried keeps it.
    """
    layers = dict(adapted_layers(model, name))
    inputs = inputs_of(model, layers, rows) if rows else {}
    limit = max_error if max_error is not None or r is not None else DEFAULT_ERROR
    tried = 0
    for most in RANKS_TRIED if r is None else (r,):
        found = {path: _directions(layer, name, inputs.get(path), most) for path, layer in layers.items()}
        least = r or _least_rank(found, most, limit or 0.0)
        ranks = () if least is None else _grown(max(least, tried + 1), most)
        chosen = next((one for one in ranks if keeps is None or keeps(_pairs(found, one))), None)
        if chosen is not None:
            break
        tried = 0 if least is None else most
    best = _error(found, least or most)
    if chosen is None or least is None or (limit is not None and best > limit):
        _refuse(best, most, limit or 0.0, is_weighed=bool(rows))
    errors = {path: _error({path: one}, chosen) for path, one in found.items()}
    tokens = min(MOST_TOKENS, sum(map(len, rows)))
    return _pairs(found, chosen), Conversion(chosen, least, _error(found, chosen), errors, tokens)


def allowed_change(max_error: float | None) -> float:
    """Of the perplexity of held-out rows, relatively."""
    return PERPLEXITY_CHANGE * max(1.0, (max_error or DEFAULT_ERROR) / DEFAULT_ERROR)


def _pairs(found: Mapping[str, Directions], r: int) -> dict[str, Pair]:
    return {path: one.pair(r) for path, one in found.items()}


def _grown(r: int, most: int) -> Iterator[int]:
    """``r``, and larger ranks up to ``most``."""
    while r < most:
        yield r
        r = math.ceil(r * RANK_GROWTH)
    yield most


def _refuse(best: float, most: int, limit: float, *, is_weighed: bool) -> NoReturn:
    advice = "" if is_weighed else "; on the inputs of real rows far lower ranks do, so give --data"
    missed = (
        "" if best > limit else f", but the perplexity of held-out rows changes by over {allowed_change(limit):.1%}"
    )
    raise AdapterError(
        "RW732",
        f"as LoRA of rank {most} this adapter keeps a relative error of {best:.3g}, and --max-error allows {limit:g}"
        f"{missed}{advice}; allow more, or write a merged model with --merged.",
    )


@torch.no_grad()
def update_of(layer: AdaptedLayer, name: str) -> Tensor:
    """``dW = diag(g - 1) W + diag(g) s B A`` in float32, with g = 1 for LoRA: (out, in). After pissa W is what the base
    holds, and s B_0 A_0, which was taken out of it, is subtracted."""
    # A Lora, Dora or EmbeddingLora: what they share beyond the protocol.
    adapter: Any = layer.adapter(name)
    base = layer.base_layer
    dW = adapter.scaling * (adapter.full_B().float() @ adapter.lora_A.float())
    first = 0.0 if layer.origin is None else layer.origin.scaling * (layer.origin.B.float() @ layer.origin.A.float())
    if adapter.magnitude is None:
        return dW - first
    m = adapter.full_magnitude(base) if isinstance(adapter, Dora) else adapter.magnitude
    g = gain(m.float(), adapter.row_norms(base))[:, None]
    return (g - 1) * dense_weight(base).float() + g * dW - first


def inputs_of(model: Any, layers: Mapping[str, AdaptedLayer], rows: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """What each layer reads of the first ``MOST_TOKENS`` tokens, row by row: (t, in), of an embedding ids (t,)."""
    kept: dict[str, list[Tensor]] = {path: [] for path in layers}
    left = MOST_TOKENS
    with _watching(layers, kept):
        for row in rows:
            model(input_ids=row[None, :left].to(model.device), use_cache=False)
            left -= len(row)
            if left <= 0:
                break
    return kept


@contextmanager
def _watching(layers: Mapping[str, AdaptedLayer], kept: Mapping[str, list[Tensor]]) -> Iterator[None]:
    def keep(path: str) -> Any:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            # A view: layers that read one tensor keep it once.
            kept[path].append(given[0].detach().flatten(0, 1))

        return hook

    handles = [layer.register_forward_pre_hook(keep(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _directions(layer: AdaptedLayer, name: str, inputs: list[Tensor] | None, most: int) -> Directions:
    dW = update_of(layer, name)
    if inputs is None:
        Y = dW
    else:
        X = torch.cat(inputs)
        Y = dW[:, X] if isinstance(layer.base_layer, nn.Embedding) else dW @ X.float().T
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        U, _, _ = torch.svd_lowrank(Y, min(most + SPARE_DIRECTIONS, *Y.shape), niter=POWER_ITERATIONS)
    U = U[:, :most]
    energies = (U.T @ Y).double().square().sum(dim=1)
    return Directions(U.cpu(), (U.T @ dW).cpu(), energies.cpu(), float(Y.double().square().sum()))


def _error(found: Mapping[str, Directions], r: int) -> float:
    total = sum(layer.total for layer in found.values())
    return math.sqrt(sum(layer.lost(r) for layer in found.values()) / total) if total else 0.0


def _least_rank(found: Mapping[str, Directions], most: int, limit: float) -> int | None:
    return next((r for r in range(1, most + 1) if _error(found, r) <= limit), None)

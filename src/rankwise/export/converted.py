"""Convert DoRA to LoRA of a given rank, with its error: dW' = P_R dW, the best of rank R for the layer's inputs X.

DoRA's dW = diag(g - 1) W + diag(g) s B A has full rank. Of all matrices of rank R, the one that minimises
||(dW' - dW) X||_F is U_R U_R^T dW, where U_R holds the R leading left-singular vectors of dW X (Eckart-Young on dW X):
B' = U_R, A' = U_R^T dW. No split of R between the two terms does better. Without inputs X = I.

The error over all layers says little about single layers: in SmolLM2 one layer, which writes the outliers of the
residual stream, has 85 % of ||dW X||^2 and needs one direction. So the rank also grows until the perplexity of held-out
rows is kept. On the rows that chose U the error is too small by a factor of two or more, so it is measured on others.

Shapes: W, dW (out, in), X (T, in) for T tokens, U (out, R), A = U^T dW (R, in)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.functional import cross_entropy

from rankwise.adapters import adapter_disabled, remove_adapter, set_adapter
from rankwise.adapters.base_layer import dense_weight
from rankwise.adapters.checkpoint import AdapterFile
from rankwise.adapters.layer import AdaptedLayer
from rankwise.adapters.lora import Dora, EmbeddingLora, Lora
from rankwise.adapters.low_rank import gain
from rankwise.adapters.state import adapted_layers
from rankwise.constants import IGNORED
from rankwise.errors import AdapterError
from rankwise.export.pairs import Pair, Pairs, attach_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# Number of directions of each layer that the search for the least rank computes: first, and if these do not suffice.
RANKS_TRIED = (64, 512)
MOST_TOKENS, MOST_HELD_OUT_TOKENS = 4096, 2048
DEFAULT_ERROR = 0.05
# Largest relative change of the held-out rows' perplexity; in proportion more with a --max-error above the default.
PERPLEXITY_CHANGE = 0.01
RANK_GROWTH = 1.5


@dataclasses.dataclass(frozen=True)
class Conversion:
    """The error of a conversion, relative: ||(dW' - dW) X|| / ||dW X||, or without inputs in Frobenius norm."""

    r: int
    # The least rank within the error; `r` also keeps the perplexity of held-out rows.
    least_r: int
    # Over all layers: square root of the ratio of the sums of squares.
    error: float
    by_layer: Mapping[str, float]
    # Tokens of the inputs X on which the error is measured; 0 for Frobenius norm.
    tokens: int


@dataclasses.dataclass(frozen=True)
class Directions:
    """The leading directions of one layer's update: U (out, q), A = U^T dW (q, in), and for every rank from 0 the
    squared error ||(dW' - dW) X||^2, which is ||dW X||^2 at rank 0; X did not choose U where other rows are given."""

    U: Tensor
    A: Tensor
    lost: Tensor

    def pair(self, r: int) -> Pair:
        return Pair(self.A[:r], self.U[:, :r])


@torch.no_grad()
def convert(
    model: PreTrainedModel,
    name: str,
    rows: Sequence[Tensor],
    held_out: Sequence[Tensor] = (),
    *,
    r: int | None,
    max_error: float | None,
    keeps: Callable[[dict[str, Pair]], bool] | None = None,
) -> tuple[dict[str, Pair], Conversion]:
    """Convert the layers of the active adapter ``name`` to pairs of one rank.

    The rank is ``r``, or the smallest one within ``max_error`` (default 0.05). From there on, it is the first one that
    ``keeps`` accepts. The inputs of ``rows`` (token ids) choose the directions, and those of ``held_out`` measure the
    error; without ``held_out`` those of ``rows`` do.

    Raises AdapterError (RW732) if no rank up to the largest one is accepted.
    """
    layers = dict(adapted_layers(model, name))
    inputs = inputs_of(model, layers, rows, MOST_TOKENS) if rows else {}
    measured = inputs_of(model, layers, held_out, MOST_HELD_OUT_TOKENS) if rows and held_out else {}
    limit = max_error if max_error is not None else (DEFAULT_ERROR if r is None else math.inf)
    tried = 0
    for most in RANKS_TRIED if r is None else (r,):
        directions = _directions(layers, name, inputs, measured, most)
        errors = _errors(directions.values(), most)
        # Beyond ``most`` if none of these ranks is within the limit.
        least = r or 1
        while least <= most and errors[least] > limit:
            least += 1
        for chosen in _grown(max(least, tried + 1), most):
            pairs = {path: layer.pair(chosen) for path, layer in directions.items()}
            if keeps is None or keeps(pairs):
                by_layer = {path: _errors([layer], chosen)[chosen] for path, layer in directions.items()}
                tokens = sum(map(len, next(iter((measured or inputs).values()), ())))
                return pairs, Conversion(chosen, least, errors[chosen], by_layer, tokens)
            tried = chosen
    raise _refusal(errors[most], most, limit, is_weighed=bool(rows))


def allowed_change(max_error: float | None) -> float:
    """The relative change that the perplexity of held-out rows may have."""
    return PERPLEXITY_CHANGE * max(1.0, (max_error or DEFAULT_ERROR) / DEFAULT_ERROR)


def _grown(r: int, most: int) -> Iterator[int]:
    """``r``, and larger ranks up to ``most``; none where ``r`` is beyond it."""
    while r < most:
        yield r
        r = min(most, math.ceil(r * RANK_GROWTH))
    if r == most:
        yield most


def _refusal(best: float, largest: int, limit: float, *, is_weighed: bool) -> AdapterError:
    if best > limit:
        why = f"differs from what was trained by a relative error of {best:.3g}, and --max-error allows {limit:g}"
    else:
        why = f"changes the perplexity of held-out rows by more than the allowed {allowed_change(limit):.1%}"
    advice = "" if is_weighed else "give --data (with the inputs of real rows far lower ranks suffice), "
    return AdapterError(
        "RW732",
        f"as LoRA of rank {largest} this adapter {why}; {advice}allow more with --max-error, or write a merged model "
        "with --merged.",
    )


@torch.no_grad()
def update_of(layer: AdaptedLayer, name: str) -> Tensor:
    """``dW = diag(g - 1) W + diag(g) s B A`` in float32, with g = 1 for LoRA: (out, in). After pissa, W is the base's
    rest, and s B_0 A_0, which was subtracted from the base, is subtracted from dW."""
    # What these kinds share beyond the protocol.
    adapter: Any = layer.adapter(name)
    base = layer.base_layer
    if type(adapter) not in (Lora, Dora, EmbeddingLora):
        W = dense_weight(base).float()
        return adapter.sum(base, W) - W
    dW = adapter.scaling * (adapter.full_B().float() @ adapter.lora_A.float())
    first = 0.0 if layer.origin is None else layer.origin.scaling * (layer.origin.B.float() @ layer.origin.A.float())
    if adapter.magnitude is None:
        return dW - first
    m = adapter.full_magnitude(base) if isinstance(adapter, Dora) else adapter.magnitude
    g = gain(m.float(), adapter.row_norms(base))[:, None]
    return (g - 1) * dense_weight(base).float() + g * dW - first


def inputs_of(
    model: PreTrainedModel, layers: Mapping[str, AdaptedLayer], rows: Sequence[Tensor], most: int
) -> dict[str, list[Tensor]]:
    """{layer: its inputs for the first ``most`` tokens, row by row}: (t, in), or ids (t,) of an embedding."""
    kept: dict[str, list[Tensor]] = {path: [] for path in layers}
    left = most
    with _watching(layers, kept):
        for row in rows:
            model(input_ids=row[None, :left].to(model.device), use_cache=False)
            left -= len(row)
            if left <= 0:
                break
    return kept


@contextmanager
def _watching(layers: Mapping[str, AdaptedLayer], kept: Mapping[str, list[Tensor]]) -> Iterator[None]:
    def keep(path: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            # A view, so that layers that read one tensor share its memory.
            kept[path].append(given[0].detach().flatten(0, 1))

        return hook

    handles = [layer.register_forward_pre_hook(keep(path)) for path, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _directions(
    layers: Mapping[str, AdaptedLayer],
    name: str,
    inputs: Mapping[str, list[Tensor]],
    measured: Mapping[str, list[Tensor]],
    most: int,
) -> dict[str, Directions]:
    """{layer's path: the ``most`` leading directions of its update on its inputs, with the error on ``measured``}."""
    found: dict[str, Directions] = {}
    read, R = 0, torch.empty(0)
    for path, layer in layers.items():
        dW = Y = update_of(layer, name)
        if inputs.get(path) and isinstance(layer.base_layer, nn.Embedding):
            Y = dW[:, torch.cat(inputs[path])]
        elif inputs.get(path):
            # ||M X|| = ||M R^T|| for X^T = Q R, which has at most as many columns as dW. q, k and v share one X, and so
            # do gate and up.
            if inputs[path][0].data_ptr() != read:
                read = inputs[path][0].data_ptr()
                R = torch.linalg.qr(torch.cat(inputs[path]).float(), mode="r").R
            Y = dW @ R.T
        U, energies = _left_singular(Y.double(), most)
        total = energies.sum()
        if measured.get(path):
            X = torch.cat(measured[path])
            Y = (dW[:, X] if isinstance(layer.base_layer, nn.Embedding) else dW @ X.float().T).double()
            total, energies = Y.square().sum(), (U.double().T @ Y).square().sum(dim=1)
        lost = total - F.pad(energies.cumsum(dim=0), (1, 0))
        found[path] = Directions(U.cpu(), (U.T @ dW).cpu(), lost.clamp(min=0.0).cpu())
    return found


def _left_singular(Y: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The ``most`` leading left-singular vectors of Y in float32, and the squares of all its singular values, by the
    Gram matrix of its smaller side: two products and one eigendecomposition for every rank."""
    is_wide = Y.shape[0] <= Y.shape[1]
    energies, vectors = torch.linalg.eigh(Y @ Y.T if is_wide else Y.T @ Y)
    leading = vectors.flip(1)[:, :most]
    # The columns of Y V are orthogonal up to rounding; QR repairs those of negligible norm.
    U = leading if is_wide else torch.linalg.qr(Y @ leading).Q
    return U.float(), energies.flip(0).clamp(min=0.0)


def _errors(layers: Iterable[Directions], largest: int) -> list[float]:
    """The relative error of an export, over all ``layers`` together, at each rank from 0 to ``largest``."""
    # A layer smaller than the rank has all of its directions.
    lost = torch.stack([one.lost[torch.arange(largest + 1).clamp(max=len(one.lost) - 1)] for one in layers]).sum(dim=0)
    return (lost / lost[0]).nan_to_num().sqrt().tolist()


EXPORTED = "rankwise_exported"


@dataclasses.dataclass(frozen=True)
class HeldOutRow:
    """A row's token ids and labels, both (T,); -100 is not a label."""

    ids: Tensor
    labels: Tensor


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How close the exported adapter is to the trained one, over the labels of all rows."""

    tokens: int
    perplexity_base: float
    perplexity_adapter: float
    perplexity_exported: float
    # Mean difference of a label's log-probability, in nats.
    difference: float


@torch.no_grad()
def keeps_perplexity(
    model: PreTrainedModel, file: AdapterFile, name: str, rows: Sequence[HeldOutRow], share: float
) -> Callable[[Pairs], bool]:
    """A function that tests whether pairs keep the perplexity of ``rows`` within ``share`` of the trained adapter's.

    |mean d| + 2 standard errors <= log(1 + share), where d are the differences of the labels' losses. The errors take
    at most half of that: few rows, or rounding to 16 bits, would otherwise refuse every rank.
    """
    trained, most = _losses(model, rows), math.log1p(share)

    def keeps(pairs: Pairs) -> bool:
        with _laid_over(model, file, name, pairs):
            d = _losses(model, rows) - trained
        return float(d.mean().abs() + min(2 * d.std() / len(d) ** 0.5, most / 2)) <= most

    return keeps


@torch.no_grad()
def likeness(
    model: PreTrainedModel, file: AdapterFile, name: str, pairs: Pairs, rows: Sequence[HeldOutRow]
) -> Likeness:
    """Compare the exported pairs with the active adapter ``name``."""
    with adapter_disabled(model):
        base = _losses(model, rows)
    trained = _losses(model, rows)
    with _laid_over(model, file, name, pairs):
        exported = _losses(model, rows)
    of_base, of_adapter, of_exported = (float(losses.mean().exp()) for losses in (base, trained, exported))
    return Likeness(len(base), of_base, of_adapter, of_exported, float((trained - exported).abs().mean()))


@contextmanager
def _laid_over(model: PreTrainedModel, file: AdapterFile, name: str, pairs: Pairs) -> Iterator[None]:
    """A context in which the pairs are the active adapter instead of ``name``."""
    attach_pairs(model, file, pairs, EXPORTED, trainable=False)
    try:
        yield
    finally:
        remove_adapter(model, EXPORTED)
        set_adapter(model, name)


def _losses(model: PreTrainedModel, rows: Sequence[HeldOutRow]) -> Tensor:
    """The loss of every label, row by row."""
    losses = []
    for row in rows:
        logits = model(input_ids=row.ids[None].to(model.device), use_cache=False).logits[0].float()
        labels = row.labels[1:].to(logits.device)
        losses.append(cross_entropy(logits[:-1][labels != IGNORED], labels[labels != IGNORED], reduction="none"))
    return torch.cat(losses)

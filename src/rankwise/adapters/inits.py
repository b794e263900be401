"""Initialisations of an adapter other than the default (PEFT's ``init_lora_weights``).

Shapes: W (out, in), A (r, in), B (out, r); s is the adapter's scale.

| init | A | B | base |
|---|---|---|---|
| pissa | sqrt(S_r / s) V_r^T of W = U S V^T | U_r sqrt(S_r / s) | W - s B A, then quantized if the base is 4-bit |
| loftq | as pissa, of W - Q with Q = dequant(quant(W)) | as pissa | Q, unchanged |
| eva | right singular vectors of the layer's inputs (`adapters.eva`) | 0 | W, unchanged |
| orthogonal | random, with B A = 0 | random | W, unchanged |

As in PEFT, embeddings start with the default; with loftq, so do layers that are not 4-bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from rankwise.adapters.attached import AdaptedModule
from rankwise.adapters.base_layer import dense_weight, is_quantized, weight_device
from rankwise.adapters.eva import Batch, input_directions
from rankwise.adapters.state import base_modules
from rankwise.errors import AdapterError
from rankwise.lora_config import Init, LoraConfig
from rankwise.quantization.linear import Linear4bit

# A and B in float32.
Pair = tuple[Tensor, Tensor]
NEEDS_ORIGINALS = ("pissa", "loftq")


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What an initialisation computed, before the model changes."""

    config: LoraConfig
    planned: list[AdaptedModule]
    # {module: its dense layer before quantization} of 4-bit layers.
    originals: Mapping[str, nn.Module]
    # eva: {module: A}.
    directions: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)

    def weight(self, item: AdaptedModule, base: nn.Module) -> Tensor:
        """W (out, in) before quantization, on the base's device."""
        return dense_weight(self.originals.get(item.name, base)).to(weight_device(base))

    @torch.no_grad()
    def pair(self, item: AdaptedModule, base: nn.Module) -> Pair | None:
        """The pair with which a layer starts; None for the default."""
        init, s = self.config.init, self.config.scaling(item.r, item.lora_alpha)
        if not _takes_part(init, item, base):
            return None
        if init.kind == "pissa":
            return principal_pair(self.weight(item, base).float(), item.r, s, init.niter)
        if init.kind == "loftq":
            return principal_pair(self.weight(item, base).float() - dense_weight(base).float(), item.r, s)
        if init.kind == "orthogonal":
            return orthogonal_pair(item.out_features, item.in_features, item.r)
        return self.directions[item.name], torch.zeros(item.out_features, item.r)


def beginning(
    model: nn.Module,
    config: LoraConfig,
    planned: list[AdaptedModule],
    originals: nn.Module | None,
    batches: Iterable[Batch] | None,
) -> Beginning | None:
    """Check and compute what ``config.init`` needs; None for "default" and "random".

    Raises AdapterError: RW423 for a rank above that of a layer's weight, RW425 without the original weights, RW426
    where no target can use the init, RW427 without batches for eva, RW429 for batches that give eva no directions.
    """
    init = config.init
    if init.kind in ("default", "random"):
        return None
    modules = dict(base_modules(model))
    taking = [item for item in planned if _takes_part(init, item, modules[item.path])]
    _check_ranks(init, taking)
    if not taking:
        raise AdapterError(
            "RW426",
            f"init_lora_weights is {config.init_lora_weights!r}, and none of the {len(planned)} targets can start so"
            + ("; load the base in 4 bits (--method qlora)." if init.kind == "loftq" else "; leave it at True."),
        )
    if init.kind == "eva":
        if batches is None:
            raise AdapterError(
                "RW427", "init_lora_weights is 'eva', which needs training rows; give them as add_adapter(batches=)."
            )
        found = input_directions(model, {item.name: item.r for item in taking}, batches, init.rho)
        return _redistributed(config, planned, found)
    packed = [item.name for item in taking if init.kind in NEEDS_ORIGINALS and is_quantized(modules[item.name])]
    return Beginning(config, planned, _original_layers(model, packed, originals))


def principal_pair(W: Tensor, r: int, s: float, niter: int | None = None) -> Pair:
    """``A = sqrt(S_r / s) V_r^T`` (r, in) and ``B = U_r sqrt(S_r / s)`` (out, r) of ``W = U S V^T``, in float32.

    s B A is then the best approximation of W of rank r. For W the weight, this is PiSSA (Meng et al. 2024, arXiv
    2404.02948, equations 2 to 4); ``niter`` selects a randomised SVD of that many subspace iterations (their section on
    fast SVD). For W the rounding error W - Q, this is LoftQ with one iteration (Li et al. 2023, arXiv 2310.08659,
    algorithm 1 with T = 1), which has s = 1. PEFT omits s in LoftQ, and gives the same pair where lora_alpha = r.
    """
    if niter is None:
        U, S, Vt = torch.linalg.svd(W, full_matrices=False)
    else:
        U, S, V = torch.svd_lowrank(W, r, niter=niter)
        Vt = V.T
    root = (S[:r] / s).sqrt()
    return (root[:, None] * Vt[:r]).contiguous(), (U[:, :r] * root).contiguous()


def orthogonal_pair(out_features: int, in_features: int, r: int) -> Pair:
    """``A = (X Q_odd)^T / 10`` and ``B = Y Q_even / 10``, both nonzero, with B A = 0.

    Q (r, r) is a random orthogonal matrix, Q_odd and Q_even are its odd and even rows, X (in, r/2) and Y (out, r/2) are
    standard normal. Rows of different halves are orthogonal, so B A = Y Q_even Q_odd^T X^T / 100 = 0. As in PEFT, after
    https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation.
    """
    Q, _ = torch.linalg.qr(torch.randn(r, r))
    A = torch.randn(in_features, r // 2).mm(Q[0::2]).T / 10
    B = torch.randn(r // 2, out_features).T.mm(Q[1::2]) / 10
    return A.contiguous(), B.contiguous()


def _takes_part(init: Init, item: AdaptedModule, base: nn.Module) -> bool:
    if item.experts is not None or not item.is_pair or isinstance(base, nn.Embedding):
        return False
    if init.kind in NEEDS_ORIGINALS and is_quantized(base):
        return isinstance(base, Linear4bit)
    return init.kind != "loftq"


def _check_ranks(init: Init, taking: list[AdaptedModule]) -> None:
    if init.kind == "orthogonal":
        return
    room = {item.name: item.in_features for item in taking}
    if init.kind != "eva":
        room = {item.name: min(item.in_features, item.out_features) for item in taking}
    small = [f"{item.name} has {room[item.name]} for r = {item.r}" for item in taking if item.r > room[item.name]]
    if small:
        raise AdapterError(
            "RW423",
            f"{init.kind} needs as many singular vectors as the rank, and {len(small)} layers have fewer ({small[0]}); "
            "lower --r, or give those layers another rank with --rank-pattern.",
        )


def _original_layers(model: nn.Module, packed: list[str], originals: nn.Module | None) -> Mapping[str, nn.Module]:
    """{name: dense layer} of the layers ``packed``, from ``originals`` or from the model's source files."""
    if not packed:
        return {}
    load_again: Callable[[], nn.Module] | None = getattr(model, "rankwise_originals", None)
    if originals is None and load_again is not None:
        originals = load_again()
    modules = {} if originals is None else dict(base_modules(originals))
    missing = [name for name in packed if name not in modules or is_quantized(modules[name])]
    if missing:
        raise AdapterError(
            "RW425",
            f"the weights before quantization are needed and unknown for {len(missing)} layers "
            f"({missing[0]}); give the dense model as add_adapter(originals=), or load the 4-bit one with load_model "
            "from dense files.",
        )
    return {name: modules[name] for name in packed}


def _redistributed(config: LoraConfig, planned: list[AdaptedModule], found: Mapping[str, Tensor]) -> Beginning:
    """The plan with the ranks of ``found``, each at the layer's earlier scale; layers of rank 0 are not adapted."""
    kept, ranks, alphas = [], dict(config.rank_pattern), dict(config.alpha_pattern)
    for item in planned:
        if item.name not in found:
            kept.append(item)
            continue
        r = found[item.name].shape[0]
        if r == 0:
            continue
        grown = (r / item.r) ** (0.5 if config.use_rslora else 1)
        if r != item.r:
            # The first match counts, so a whole name goes before the patterns that also match it.
            ranks = {item.name: r} | {key: value for key, value in ranks.items() if key != item.name}
            alphas = {item.name: item.lora_alpha * grown} | {k: v for k, v in alphas.items() if k != item.name}
        kept.append(dataclasses.replace(item, r=r, lora_alpha=item.lora_alpha * grown))
    if kept != planned:
        targets = [item.name for item in kept if item.is_pair]
        config = dataclasses.replace(config, target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    return Beginning(config, kept, {}, found)

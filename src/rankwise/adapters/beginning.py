"""Initialisations of an adapter other than the default (PEFT's ``init_lora_weights``), with W (out, in), A (r, in),
B (out, r) and the adapter's scale s:

| init | A | B | base |
|---|---|---|---|
| pissa | sqrt(S_r / s) V_r^T of W = U S V^T | U_r sqrt(S_r / s) | W - s B A, then quantized if the base is 4-bit |
| loftq | as pissa, of W - Q with Q = dequant(quant(W)) | as pissa | Q, unchanged |

As in PEFT, embeddings start with the default; with loftq, so do layers that are not 4-bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from rankwise.adapters.base_layer import dense_weight, is_quantized, weight_device
from rankwise.adapters.state import AdaptedModule, base_modules
from rankwise.errors import AdapterError
from rankwise.lora_config import Init, LoraConfig
from rankwise.quantization.linear import Linear4bit

# A and B in float32.
Pair = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What an initialisation computed, before the model changes."""

    config: LoraConfig
    # {module: its dense layer before quantization} of 4-bit layers.
    originals: Mapping[str, nn.Module]

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
        return principal_pair(self.weight(item, base).float() - dense_weight(base).float(), item.r, s)


def beginning(
    model: nn.Module,
    config: LoraConfig,
    planned: list[AdaptedModule],
    originals: nn.Module | None,
) -> Beginning | None:
    """Check and compute what ``config.init`` needs; None for "default" and "random".

    Raises AdapterError: RW426 for a rank above that of a layer's weight, without the original weights, and
    where no target can use the init.
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
    packed = [item.name for item in taking if is_quantized(modules[item.name])]
    return Beginning(config, _original_layers(model, packed, originals))


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


def _takes_part(init: Init, item: AdaptedModule, base: nn.Module) -> bool:
    if item.experts is not None or not item.is_pair or isinstance(base, nn.Embedding):
        return False
    if is_quantized(base):
        return isinstance(base, Linear4bit)
    return init.kind != "loftq"


def _check_ranks(init: Init, taking: list[AdaptedModule]) -> None:
    largest = {item.name: min(item.in_features, item.out_features) for item in taking}
    small = [f"{item.name} has {largest[item.name]} for r = {item.r}" for item in taking if item.r > largest[item.name]]
    if small:
        raise AdapterError(
            "RW426",
            f"{init.kind} needs as many singular vectors as the rank, and {len(small)} layers have fewer ({small[0]}); "
            "lower --r, or give those layers a lower rank with --rank-pattern.",
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
            "RW426",
            f"the weights before quantization are needed and unknown for {len(missing)} layers "
            f"({missing[0]}); give the dense model as add_adapter(originals=), or load the 4-bit one with load_model "
            "from dense files.",
        )
    return {name: modules[name] for name in packed}

"""The losses, each as in its paper, as sums over targets. ``Loop`` divides them by the targets of all processes.

B pairs or answers of a micro-batch; sigma the logistic function; log-ratios
r(y) = log p(y | x) - log p_ref(y | x), each log p summed over the tokens of an answer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

# --- pairs ---


@dataclasses.dataclass(frozen=True)
class Pairs:
    """The log-ratios (B,) of the better and the worse answers, and their numbers of tokens (B,)."""

    chosen: Tensor
    rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


def sigmoid(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """-log sigma(beta (r_w - r_l))        Rafailov et al. 2023, arXiv 2305.18290, equation 7."""
    return -F.logsigmoid(beta * (pairs.chosen - pairs.rejected))


def hinge(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """max(0, 1 - beta (r_w - r_l))        SLiC: Zhao et al. 2023, arXiv 2305.10425; as in RSO, arXiv 2309.06657."""
    return torch.relu(1 - beta * (pairs.chosen - pairs.rejected))


def ipo(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """(r_w / |y_w| - r_l / |y_l| - 1 / (2 beta))^2        Azar et al. 2023, arXiv 2310.12036, equation 17.

    Means over tokens, as the authors confirmed to trl.
    """
    chosen = pairs.chosen / pairs.chosen_tokens.clamp(min=1)
    rejected = pairs.rejected / pairs.rejected_tokens.clamp(min=1)
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def robust(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """(-(1 - e) log sigma(d) + e log sigma(-d)) / (1 - 2 e),  d = beta (r_w - r_l), e the share of flipped pairs.

    Chowdhury et al. 2024, arXiv 2403.00409, equation 9.
    """
    d = beta * (pairs.chosen - pairs.rejected)
    clean, flipped = -(1 - smoothing) * F.logsigmoid(d), -smoothing * F.logsigmoid(-d)
    return (clean - flipped) / (1 - 2 * smoothing)


def apo_zero(pairs: Pairs, beta: float, smoothing: float) -> Tensor:
    """1 - sigma(beta r_w) + sigma(beta r_l)        D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7."""
    return 1 - torch.sigmoid(beta * pairs.chosen) + torch.sigmoid(beta * pairs.rejected)


# The losses (B,) of --objective dpo, by name.
PAIR_LOSSES: dict[str, Callable[[Pairs, float, float], Tensor]] = {
    "sigmoid": sigmoid,
    "ipo": ipo,
    "hinge": hinge,
    "robust": robust,
    "apo_zero": apo_zero,
}


# --- answers marked good or bad ---


def kto(r: Tensor, is_good: Tensor, z: Tensor, beta: float) -> Tensor:
    """(B,)  1 - sigma(beta (r - z)) of a good answer, 1 - sigma(beta (z - r)) of a bad one; z = max(0, KL estimate).

    Ethayarajh et al. 2024, arXiv 2402.01306, equation 7.
    """
    return 1 - torch.sigmoid(beta * torch.where(is_good, r - z, z - r))


def apo_zero_unpaired(r: Tensor, is_good: Tensor, z: Tensor, beta: float) -> Tensor:
    """(B,)  1 - sigma(beta r) of a good answer, sigma(beta r) of a bad one: ``apo_zero`` for answers without pairs."""
    kept = torch.sigmoid(beta * r)
    return torch.where(is_good, 1 - kept, kept)


# The losses of --objective kto, by name.
MARKED_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kto": kto,
    "apo_zero_unpaired": apo_zero_unpaired,
}


# --- answers with rewards ---


def advantages(rewards: Tensor, group: int) -> Tensor:
    """A = (r - mean r) / (std r + 1e-4) over the answers to a prompt; 0 for an answer without reward (NaN).

    Shao et al. 2024, arXiv 2402.03300, section 4.1.2.
    """
    r = rewards.view(-1, group)
    above = r - r.nanmean(1, keepdim=True)
    counts = (~r.isnan()).sum(1, keepdim=True)
    std = (above.square().nansum(1, keepdim=True) / (counts - 1)).sqrt()
    return (above / (std + 1e-4)).nan_to_num(0.0).flatten()


def policy_losses(log_p: Tensor, reference: Tensor | None, A: Tensor, beta: float) -> tuple[Tensor, Tensor | None]:
    """(l, KL) of each token (B, L):  l = -rho (A - beta KL),  KL = exp(d) - d - 1,  d = log p_ref - log p.

    Shao et al. 2024, equations 3 and 4, with the unbiased gradient of KL: DeepSeek-V3.2, arXiv 2512.02556, section 3.1.
    rho = p / p_old is 1 where it is computed, so clipping it has no effect: the model takes one step with its answers.
    """
    rho = torch.exp(log_p - log_p.detach())
    if reference is None:
        return -rho * A, None
    d = reference - log_p
    kl = torch.exp(d) - d - 1
    return -rho * (A - beta * kl), kl


# (lengths |o_i| of a micro-batch's answers, longest possible answer L, tokens of this micro-batch in all processes)
# -> (factors w_i of the answers' tokens, targets):  loss = sum_i w_i sum_t l_it / sum of targets over the step.
Normalised = tuple[list[float], float]


def grpo(lengths: Sequence[int], longest: int, together: int) -> Normalised:
    """mean_i 1 / |o_i| sum_t l_it        Shao et al. 2024, arXiv 2402.03300, equation 3."""
    return [1 / length for length in lengths], len(lengths)


def dapo(lengths: Sequence[int], longest: int, together: int) -> Normalised:
    """sum_i sum_t l_it / sum_i |o_i|  over the answers of a step        Yu et al. 2025, arXiv 2503.14476, 3.3."""
    return [1.0] * len(lengths), sum(lengths)


def dr_grpo(lengths: Sequence[int], longest: int, together: int) -> Normalised:
    """mean_i 1 / L sum_t l_it        Liu et al. 2025, arXiv 2503.20783, section 3.2."""
    return [1 / longest] * len(lengths), len(lengths)


def bnpo(lengths: Sequence[int], longest: int, together: int) -> Normalised:
    """dapo over the answers of a micro-batch, then the mean over micro-batches        TRL's ``loss_type="bnpo"``."""
    return [1 / together] * len(lengths), sum(lengths) / together


# The normalisations of --objective grpo, by name.
NORMALISED: dict[str, Callable[[Sequence[int], int, int], Normalised]] = {
    "dapo": dapo,
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "bnpo": bnpo,
}

"""The learning rate of a run that names none. Imports no torch."""

from __future__ import annotations

from typing import NamedTuple

from rankwise.errors import ConfigError
from rankwise.foreign import Fields
from rankwise.methods import method_of
from rankwise.objectives import OBJECTIVES

FULL_RATE, TIMES_FOR_ADAPTERS, REFERENCE_WIDTH, REFERENCE_ALPHA = 5e-5, 10, 2000, 32
LLAMA, SMALL = 0.781, 0.0775
# Fitted on our own grids (benchmarks/results/default_rates.md, article/claims).
OF_PISSA, OF_RSLORA, POWER_OF_ALPHA, OF_SMALL_FULL = 1 / 5, 1 / 2, 0.75, 1 / 3
# Neighbours in a grid of rates.
HALF_DECADE = 10**0.5


class DefaultRate(NamedTuple):
    rate: float
    # What it follows from.
    reason: str
    # Whether a search can look for a better one: of one grid of ours the regret is 50 %.
    searchable: bool = False

    def __str__(self) -> str:
        remedy = (
            "data may want another: --learning-rate auto tries three"
            if self.searchable
            else "--learning-rate to change"
        )
        return f"{self.rate:.1e} ({self.reason}; {remedy})".replace("e-0", "e-")

    @property
    def around(self) -> tuple[float, float, float]:
        """The rate between its neighbours, half a decade lower and higher."""
        return _short(self.rate / HALF_DECADE), self.rate, _short(self.rate * HALF_DECADE)


def default_rate(family: str, width: int, settings: Fields) -> DefaultRate:
    """The learning rate, to two digits, for a model of this ``model_type`` and width with these settings of ``train``.

        rate = 5e-5 m (2000 / width)^p

    m is 10 (32 / alpha)^0.75 for adapters, 1 for all weights, and p is 0.781 for Llamas (*LoRA Without Regret*, by
    Thinking Machines, 2025, with alpha = 32; tinker-cookbook's ``hyperparam_utils.py``). Qwens have 0.0775 there. Any
    other family gets the p with the lower rate, which is 0.781 from a width of 2,000 on; so do Qwens, whose regret it
    lowers in tinker-cookbook's own sweep. With 0.0775, all weights get m = 1/3: fitted on grids of a Qwen of 0.5B, and
    tried on Gemma's. docs/hyperparameters.md holds the regret on that sweep and on our grids.

    Raises ConfigError (RW103) for a width of 0, where the model's config does not give it.
    """
    if not width:
        raise ConfigError("RW103", "the model's config gives no width for a default; give --learning-rate.")
    reasons = [f"{family} of width {width:,}"]
    power = LLAMA if family == "llama" or width >= REFERENCE_WIDTH else SMALL
    rate = FULL_RATE * TIMES_FOR_ADAPTERS * (REFERENCE_WIDTH / width) ** power
    # Options of an adapter have no effect on other methods.
    method = method_of(settings["method"])
    of_adapter = settings if method.has_adapter else {}
    # LoRA+: the rate is A's; B's, ``ratio`` times as high, is that of LoRA.
    ratio = of_adapter.get("loraplus_ratio")
    alpha = of_adapter.get("lora_alpha", REFERENCE_ALPHA)
    share_of_full = OF_SMALL_FULL if power == SMALL else 1
    objective = OBJECTIVES[settings["objective"]]
    factors = {
        "all weights": share_of_full / TIMES_FOR_ADAPTERS if method.trains_all else None,
        f"alpha {alpha:g}": (REFERENCE_ALPHA / alpha) ** POWER_OF_ALPHA if alpha != REFERENCE_ALPHA else None,
        settings["objective"]: objective.rate_share if objective.rate_share != 1 else None,
        "PiSSA": OF_PISSA if str(of_adapter.get("init")).startswith("pissa") else None,
        "rsLoRA": OF_RSLORA if of_adapter.get("use_rslora") else None,
        "LoRA+": 1 / ratio if ratio else None,
    }
    for reason, factor in factors.items():
        if factor is not None:
            rate *= factor
            reasons.append(reason)
    return DefaultRate(_short(rate), f"for {', '.join(reasons)}", objective.of_demonstrations)


def _short(rate: float) -> float:
    return float(f"{rate:.1e}")

"""The learning rate of a run that names none.

    rate = 5e-5 m (2000 / width)^p

m is 10 for adapters and 1 for all weights, and p is 0.781 for Llamas (*LoRA Without Regret*, Thinking Machines, 2025;
tinker-cookbook's ``hyperparam_utils.py``). For Qwens the latter has 0.0775. Every other family gets the p with the
lower rate, which is 0.781 from a width of 2,000 on; so do Qwens, whose regret it lowers in tinker-cookbook's own sweep.
docs/hyperparameters.md holds the regret on that sweep and on our grids.
"""

from __future__ import annotations

from typing import NamedTuple

from rankwise.errors import ConfigError
from rankwise.foreign import Fields

BASE, ADAPTERS, REFERENCE_WIDTH = 5e-5, 10, 2000
LLAMA, SMALL = 0.781, 0.0775
# TRL's defaults: 2e-5 for SFT, and 1e-6 for DPO, KTO and GRPO.
OF_PREFERENCES = 1 / 20
# Fitted on our own grids (benchmarks/results/default_rates.md).
OF_PISSA, OF_RSLORA = 1 / 5, 1 / 2
# Neighbours in a grid of rates.
HALF_DECADE = 10**0.5


class DefaultRate(NamedTuple):
    rate: float
    # What it follows from.
    reason: str

    def __str__(self) -> str:
        return f"{self.rate:.1e} ({self.reason}; --learning-rate to change)".replace("e-0", "e-")

    @property
    def around(self) -> tuple[float, float, float]:
        """The rate between its neighbours, half a decade lower and higher."""
        return _short(self.rate / HALF_DECADE), self.rate, _short(self.rate * HALF_DECADE)


def default_rate(family: str, width: int, settings: Fields) -> DefaultRate:
    """The learning rate, to two digits, for a model of this ``model_type`` and width with these settings of ``train``.

    Raises ConfigError (RW103) for a width of 0, where the model's config does not give it.
    """
    if not width:
        raise ConfigError("RW103", "the model's config gives no width for a default; give --learning-rate.")
    reasons = [f"{family} of width {width:,}"]
    power = LLAMA if family == "llama" or width >= REFERENCE_WIDTH else SMALL
    rate = BASE * ADAPTERS * (REFERENCE_WIDTH / width) ** power
    # LoRA+: the rate is A's; B's, ``ratio`` times as high, is that of LoRA.
    ratio = settings.get("loraplus_ratio")
    factors = {
        "all weights": 1 / ADAPTERS if settings["method"] == "full" else None,
        settings["objective"]: OF_PREFERENCES if settings["objective"] not in ("sft", "classify") else None,
        "PiSSA": OF_PISSA if str(settings.get("init")).startswith("pissa") else None,
        "rsLoRA": OF_RSLORA if settings.get("use_rslora") else None,
        "LoRA+": 1 / ratio if ratio else None,
    }
    for reason, factor in factors.items():
        if factor is not None:
            rate *= factor
            reasons.append(reason)
    return DefaultRate(_short(rate), f"for {', '.join(reasons)}")


def _short(rate: float) -> float:
    return float(f"{rate:.1e}")

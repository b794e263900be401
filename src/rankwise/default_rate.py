"""The learning rate of a run that names none.

    rate = 5e-5 m (2000 / width)^0.781

m is 10 for adapters and 1 for all weights: *LoRA Without Regret* (Thinking Machines, 2025), with the exponent that
tinker-cookbook's ``hyperparam_utils.py`` has for Llamas. docs/training.md holds the regret on our own grids.
"""

from __future__ import annotations

from rankwise.errors import ConfigError
from rankwise.foreign import Fields

# TRL's defaults: 2e-5 for SFT, and 1e-6 for DPO, KTO and GRPO.
OF_PREFERENCES = 1 / 20
# Neighbours in a grid of rates.
HALF_DECADE = 10**0.5


def default_rate(width: int, settings: Fields) -> float:
    """The learning rate for a model of this width with these settings of ``rankwise train``, to two digits.

    Raises ConfigError (RW103) for a width of 0, where the model's config does not give it.
    """
    if not width:
        raise ConfigError("RW103", "the model's config gives no width for a default; give --learning-rate.")
    rate = 5e-5 * (1 if settings["method"] == "full" else 10) * (2000 / width) ** 0.781
    if settings["objective"] != "sft":
        rate *= OF_PREFERENCES
    # The rate of LoRA+ is A's. That of B, ``ratio`` times as high, is LoRA's.
    return _short(rate / (settings.get("loraplus_ratio") or 1))


def rates_around(rate: float) -> tuple[float, float, float]:
    """The rate between its neighbours, half a decade lower and higher."""
    return _short(rate / HALF_DECADE), rate, _short(rate * HALF_DECADE)


def reason_of(width: int, settings: Fields) -> str:
    """What the default follows from: ``for width 576``."""
    parts = [f"width {width:,}"]
    parts += ["all weights"] if settings["method"] == "full" else []
    parts += [settings["objective"]] if settings["objective"] != "sft" else []
    parts += ["LoRA+"] if settings.get("loraplus_ratio") else []
    return f"for {', '.join(parts)}"


def _short(rate: float) -> float:
    return float(f"{rate:.1e}")

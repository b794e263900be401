"""The default learning rate: the published formula, and what it follows from."""

from __future__ import annotations

from typing import Any

import pytest

from rankwise.default_rate import default_rate
from rankwise.errors import ConfigError


def given(**options: Any) -> dict[str, Any]:
    return {"method": "lora", "objective": "sft", "loraplus_ratio": None, **options}


@pytest.mark.parametrize(
    ("family", "width", "options", "rate"),
    [
        ("llama", 2000, {}, 5e-4),
        ("llama", 576, {}, 1.3e-3),
        ("gemma3_text", 640, {}, 5.5e-4),
        ("qwen3", 8192, {"method": "qdora"}, 1.7e-4),
        ("llama", 576, {"method": "full"}, 1.3e-4),
        ("qwen2", 896, {"method": "full"}, 1.8e-5),
        ("qwen3", 2048, {"method": "full"}, 4.9e-5),
        ("llama", 576, {"objective": "dpo"}, 6.6e-5),
        ("llama", 576, {"loraplus_ratio": 16.0}, 8.3e-5),
        ("llama", 576, {"init": "pissa:4"}, 2.6e-4),
        ("llama", 576, {"use_rslora": True}, 6.6e-4),
        ("llama", 576, {"lora_alpha": 8.0}, 3.7e-3),
        ("llama", 576, {"lora_alpha": 128.0, "method": "qdora"}, 4.7e-4),
        ("llama", 576, {"lora_alpha": 8.0, "method": "full"}, 1.3e-4),
    ],
)
def test_the_default_follows_from_the_model_the_method_and_the_objective(
    family: str, width: int, options: Any, rate: float
) -> None:
    found = default_rate(family, width, given(**options))
    assert found.rate == rate
    assert found.around[0] < rate / 3 < rate < 3 * rate < found.around[2]


def test_the_default_says_what_it_follows_from() -> None:
    assert str(default_rate("llama", 576, given())) == (
        "1.3e-3 (for llama of width 576; data may want another: --learning-rate auto tries three)"
    )
    # The search is of demonstrations only.
    assert str(default_rate("llama", 576, given(objective="dpo"))).endswith("; --learning-rate to change)")
    assert default_rate("qwen3", 4096, given(method="full", objective="kto")).reason == (
        "for qwen3 of width 4,096, all weights, kto"
    )
    with pytest.raises(ConfigError, match="RW103"):
        default_rate("llama", 0, given())

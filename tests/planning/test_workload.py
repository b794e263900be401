"""Impossible settings are refused with every fault named."""

from __future__ import annotations

import pytest

from rankwise.errors import ConfigError
from rankwise.planning import Workload, estimate


def test_every_wrong_field_is_named():
    with pytest.raises(ConfigError, match=r"batch_size is 0.*max_length is 1.*dtype is 'int8'") as caught:
        Workload(batch_size=0, max_length=1, dtype="int8")
    assert caught.value.code == "RW130"


@pytest.mark.parametrize(
    "settings",
    [
        {"devices": 0},
        {"devices": 2},
        {"block_size": 48},
        {"trained_share": 0},
        {"activation_offloading": True, "device_type": "cpu"},
        {"strategy": "zero"},
        {"devices": 2, "strategy": "single"},
    ],
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigError, match="RW130"):
        Workload(**settings)


def test_a_rank_of_zero_is_refused_as_in_training():
    with pytest.raises(ConfigError, match="RW101"):
        Workload(r=0)


def test_unknown_methods_and_optimizers(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "vocab_size": 8, "n_embd": 8, "n_layer": 1}')
    with pytest.raises(ConfigError, match="RW130"):
        estimate(tmp_path, "prefix", Workload())
    with pytest.raises(ConfigError, match="RW132"):
        estimate(tmp_path, "lora", Workload(optimizer="lamb"))


def test_trained_tokens_leave_out_the_last_position():
    assert Workload(batch_size=3, max_length=10).trained_tokens == 27
    assert Workload(batch_size=3, max_length=10, trained_share=0.1).trained_tokens == 3

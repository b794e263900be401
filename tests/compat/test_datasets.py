"""Canary of ``compat.datasets``."""

from __future__ import annotations

import datasets
import huggingface_hub
import pytest

from rankwise.compat.datasets import hub_or_cache


def test_HF_HUB_OFFLINE_keeps_datasets_from_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    def unreachable() -> None:
        raise OSError("no route")

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", unreachable)
    with hub_or_cache() as answers:
        assert not answers
        assert datasets.config.HF_HUB_OFFLINE
        with pytest.raises((OSError, ValueError, RuntimeError)):
            datasets.load_dataset("nobody/has-this-one", split="train")
    assert not datasets.config.HF_HUB_OFFLINE

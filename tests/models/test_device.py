"""Device and dtype are chosen from what is there, and what is not there is refused."""

from __future__ import annotations

import pytest
import torch

from rankwise.errors import ModelError
from rankwise.models import choose_device
from rankwise.models import device as device_module


def pretend(monkeypatch: pytest.MonkeyPatch, *, cards: int = 0, bf16: bool = True, mps: bool = False) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cards > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cards)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"Card {index}")
    # Emulated bfloat16 counts as present unless it is asked not to, as on a T4.
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.delenv("LOCAL_RANK", raising=False)


def test_automatic_on_a_card_with_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=1)
    choice = choose_device()

    assert (choice.device, choice.dtype) == ("cuda:0", torch.bfloat16)
    assert choice.reason == "cuda:0: Card 0; bfloat16: the GPU computes in it"


def test_automatic_on_a_t4_is_float16_with_loss_scaling(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=1, bf16=False)
    choice = choose_device()

    assert choice.dtype == torch.float16
    assert "loss scaling" in choice.reason
    with pytest.raises(ModelError, match="use float16"):
        choose_device("cuda", "bfloat16")


def test_every_process_takes_its_own_card(monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, cards=4)
    monkeypatch.setenv("LOCAL_RANK", "3")

    assert choose_device().device == choose_device("cuda").device == "cuda:3"
    assert choose_device("cuda:1").device == "cuda:1"


@pytest.mark.parametrize("has_bfloat16", [True, False])
def test_automatic_on_a_processor(has_bfloat16: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    monkeypatch.setattr(device_module, "cpu_has_bfloat16", lambda: has_bfloat16)
    choice = choose_device()

    assert choice.device == "cpu"
    assert choice.dtype == (torch.bfloat16 if has_bfloat16 else torch.float32)


@pytest.mark.parametrize("new_macos", [True, False])
def test_an_apple_gpu_is_taken_only_if_asked_for(new_macos: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch, mps=True)
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: new_macos)
    assert choose_device().device == "cpu"
    choice = choose_device("mps")

    assert (choice.device, choice.dtype) == ("mps", torch.bfloat16 if new_macos else torch.float32)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "tpu", "cuda:x"])
def test_a_device_that_is_not_there_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend(monkeypatch)
    with pytest.raises(ModelError) as caught:
        choose_device(name)
    assert caught.value.code == "RW312"

"""loralib's files become PEFT adapters that compute what loralib computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import rankwise as rw
from rankwise.errors import AdapterError
from rankwise_article.__main__ import main
from rankwise_article.converter import convert

R, ALPHA, WIDTH = 2, 8.0, 32


@pytest.fixture
def model(tmp_path: Path) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "n_positions": 64, "n_embd": WIDTH, "n_layer": 2, "n_head": 4}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    made = GPT2LMHeadModel(config).eval()
    made.save_pretrained(tmp_path / "model")
    return made


def state(prefix: str = "") -> dict[str, torch.Tensor]:
    """As loralib's MergedLinear of q and v saves it: A (2 r, in), B (2 out/3, r)."""
    shapes = {"lora_A": (2 * R, WIDTH), "lora_B": (2 * WIDTH, R)}
    return {
        f"{prefix}transformer.h.{layer}.attn.c_attn.{name}": torch.randn(shape)
        for layer in range(2)
        for name, shape in shapes.items()
    }


def test_a_converted_adapter_adds_what_loralib_adds(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    stored = state("module.")
    torch.save({"model_state_dict": stored}, tmp_path / "lora.pt")
    files = ("--model", str(tmp_path / "model"), "--output", str(tmp_path / "peft"))
    assert main(["convert", str(tmp_path / "lora.pt"), *files, "--lora-alpha", "8"]) == 0
    for layer in range(2):
        A, B = (stored[f"module.transformer.h.{layer}.attn.c_attn.lora_{end}"] for end in "AB")
        update = torch.zeros(3 * WIDTH, WIDTH)
        for part, start in enumerate((0, 2 * WIDTH)):
            update[start : start + WIDTH] = B[part * WIDTH : (part + 1) * WIDTH] @ A[part * R : (part + 1) * R]
        model.transformer.h[layer].attn.c_attn.weight.data += ALPHA / R * update.T
    ids = torch.arange(3, 20)[None]
    loaded, _ = rw.load_model(str(tmp_path / "model"), dtype=torch.float32)
    rw.load_adapter(loaded, tmp_path / "peft")
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)


ATTENTION = "transformer.h.{}.attn.c_attn.lora_{}"


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({ATTENTION.format(0, "A"): torch.zeros(3, WIDTH)}, "RA260"),
        ({"classifier.weight": torch.zeros(2, 2)}, "RA260"),
        ({ATTENTION.format(7, "A"): torch.zeros(4, WIDTH), ATTENTION.format(7, "B"): torch.zeros(64, 2)}, "RW411"),
    ],
)
def test_what_does_not_fit_is_refused(model: GPT2LMHeadModel, change: dict, code: str, tmp_path: Path) -> None:
    torch.save(state() | change, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match=code):
        convert(tmp_path / "lora.pt", tmp_path / "peft", str(tmp_path / "model"), ALPHA)
    assert not (tmp_path / "peft").exists()


def test_code_in_a_pickle_does_not_run(model: GPT2LMHeadModel, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple:
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"model_state_dict": Bomb()}, tmp_path / "lora.pt")
    with pytest.raises(AdapterError, match="RA260"):
        convert(tmp_path / "lora.pt", tmp_path / "peft", str(tmp_path / "model"), ALPHA)
    assert not (tmp_path / "ran").exists()

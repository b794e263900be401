"""Adapted layers and whole Llama shapes of random weights, ours and the peers', as multiples of the frozen products.

Each contender is built, timed in turn with the floor, and freed before the next: two 8B models do not fit one card.

Legend: T = tokens of a micro-batch, N = out features, K = in features.
"""

from __future__ import annotations

import dataclasses
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator
from typing import Any

import contenders
import timing
import torch
from torch import Tensor, nn

import rankwise as rw

ROUNDS, LAYER_ROUNDS = 5, 20
LLAMA = {
    "1B": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "tie_word_embeddings": False,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 256,
        "tie_word_embeddings": True,
    },
}
# Shapes of Llama 3.2 1B and Llama 3.1 8B.


@dataclasses.dataclass
class Row:
    """One contender. ``note`` says why there are no numbers."""

    what: str
    method: str
    side: str
    step_ms: float | None = None
    floor_ms: float | None = None
    with_optimizer_ms: float | None = None
    saved_bytes_per_token: float | None = None
    peak_bytes: int | None = None
    tokens_per_second: float | None = None
    note: str = ""

    @property
    def multiple(self) -> float | None:
        return None if self.step_ms is None or self.floor_ms is None else self.step_ms / self.floor_ms


class Deadline:
    """Seconds that may still be spent; what is known to take longer is left out and said."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        return self._end - time.monotonic()


def sides() -> list[str]:
    return ["ours", *(["peft"] if importlib.util.find_spec("peft") else [])]


def contended(
    what: str, device: str, deadline: Deadline, measure: Callable[[str, str], Row], side_names: list[str]
) -> Iterator[Row]:
    """Every method on every side; a contender that fails, or for which no time is left, becomes a note."""
    longest = 0.0
    for side in side_names:
        for method in contenders.METHODS:
            row = Row(what, method, side)
            if side == "peft" and contenders.is_four_bit(method) and importlib.util.find_spec("bitsandbytes") is None:
                row.note = "bitsandbytes is not installed"
            elif deadline.left() < 1.5 * longest:
                row.note = "no time left"
            else:
                started = time.monotonic()
                row = _measured(row, measure)
                _free(device)
                longest = max(longest, time.monotonic() - started)
            yield row


def _measured(row: Row, measure: Callable[[str, str], Row]) -> Row:
    try:
        return measure(row.method, row.side)
    except torch.OutOfMemoryError:
        row.note = "out of memory"
    except Exception as error:  # noqa: BLE001  a peer of another version must not end a run on a rented card
        row.note = f"{type(error).__name__}: {error}".splitlines()[0][:200]
    return row


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# --- one layer ---


class OneLayer(nn.Module):
    """A frozen N x N product without a bias, to be adapted."""

    def __init__(self, size: int, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def layer_row(size: int, T: int, device: str, method: str, side: str) -> Row:
    torch.manual_seed(0)
    model = adapted(OneLayer(size, device), method, side, targets=["layer"])
    x = torch.randn(T, size, device=device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(T, size, device=device, dtype=torch.bfloat16)

    def forget() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None

    steps = {"step": (lambda: model(x).backward(dy), forget)}
    row = Row(f"layer {size}", method, side)
    return timed_row(row, steps, [(size, size)], T, device, lambda: model(x), model, LAYER_ROUNDS)


# --- a whole model ---


def model_row(shape: str, batch: int, length: int, device: str, method: str, side: str) -> Row:
    model = adapted(random_llama(shape, length, device), method, side, targets=contenders.ALL_LINEAR)
    return time_model(Row(f"Llama {shape}", method, side), model, shape, batch, length, device)


def time_model(row: Row, model: Any, shape: str, batch: int, length: int, device: str) -> Row:
    ids = torch.randint(0, LLAMA[shape]["vocab_size"], (batch, length), device=device)
    step, full = contenders.Step(model, ids), contenders.Step(model, ids, optimizer=True)
    steps = {"step": (step, step.forget), "with optimizer": (full, full.forget)}
    return timed_row(row, steps, llama_shapes(shape), ids.numel(), device, step.forward, model, ROUNDS)


def random_llama(shape: str, length: int, device: str) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    config = LlamaConfig(**LLAMA[shape], max_position_embeddings=max(length, 64))
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def llama_shapes(shape: str) -> list[tuple[int, int]]:
    """(N, K) of every linear layer, the head included."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        return timing.linear_shapes(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA[shape])))


def timed_row(
    row: Row,
    steps: dict[str, timing.Prepared],
    shapes: list[tuple[int, int]],
    T: int,
    device: str,
    forward: Callable[[], object],
    model: nn.Module,
    rounds: int,
) -> Row:
    """``row`` with its numbers; memory is measured without the floor's tensors."""
    floor = timing.Floor(shapes, T, device=device, share_weights=True)
    calls = {"step": steps["step"], "floor": (floor, timing.nothing)}
    median = timing.medians(timing.alternate(calls, rounds, warmup=2, device_type=device))
    del floor, calls
    _free(device)
    # In rounds of their own: the optimizer makes DoRA's norms new.
    full = {name: call for name, call in steps.items() if name != "step"}
    median |= timing.medians(timing.alternate(full, rounds, device_type=device))
    peak = torch.cuda.max_memory_allocated() if device == "cuda" and full else None
    return dataclasses.replace(
        row,
        step_ms=1e3 * median["step"],
        floor_ms=1e3 * median["floor"],
        with_optimizer_ms=1e3 * median["with optimizer"] if full else None,
        saved_bytes_per_token=timing.saved_bytes(model, forward) / T,
        peak_bytes=peak,
        tokens_per_second=T / median["step"],
    )


# --- adapters on models made here ---


def adapted(model: Any, method: str, side: str, *, targets: Any) -> Any:
    """With the adapter of ``method``, and for qlora and qdora in 4 bits, by one side's means; in training mode."""
    if side == "ours":
        return _ours(model, method, targets)
    from peft import LoraConfig, get_peft_model

    if contenders.is_four_bit(method):
        _to_bitsandbytes(model)
    options = {"r": contenders.R, "lora_alpha": contenders.ALPHA, "target_modules": targets}
    task = {"task_type": "CAUSAL_LM"} if hasattr(model, "config") else {}
    return get_peft_model(model, LoraConfig(**options, **task, use_dora=contenders.is_dora(method))).train()


def _ours(model: Any, method: str, targets: Any) -> Any:
    if contenders.is_four_bit(method):
        rw.quantize(model, rw.Nf4Config(double_quant=True))
    options = {"r": contenders.R, "lora_alpha": contenders.ALPHA, "target_modules": targets}
    rw.add_adapter(model, rw.LoraConfig(**options, use_dora=contenders.is_dora(method)))
    model.train()
    if hasattr(model, "config"):
        rw.optimize_for_training(model)
    return model


def _to_bitsandbytes(model: nn.Module) -> None:
    """As transformers does while it loads: NF4 with double quantization, bfloat16 products, the head left alone."""
    import bitsandbytes

    for name, layer in list(model.named_modules()):
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        packed = bitsandbytes.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=False,
            compute_dtype=torch.bfloat16,
            compress_statistics=True,
            quant_type="nf4",
            device="meta",
        )
        weight = layer.weight.data
        packed.weight = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4"
        ).to(weight.device)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, packed)
    # What PEFT asks for.
    model.is_loaded_in_4bit = True

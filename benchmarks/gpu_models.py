"""Adapted layers and whole Llama shapes of random weights, as multiples of the frozen products; other libraries too.

A contender is timed in turn with the floor. Each has a process of its own: two 8B models do not fit one card.

Legend: T = tokens of a micro-batch, N = out features, K = in features.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import importlib.util
from collections.abc import Callable
from typing import Any

import contenders
import timing
import torch
from gpu_jobs import Job
from torch import Tensor, nn

import rankwise as rw
from rankwise.acceleration import LossOptions
from rankwise.acceleration.loss import scored_positions
from rankwise.constants import IGNORED

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

# Calls between two events, of single layers: their launches would count otherwise.
CALLS = 10
# Of the rows that a step as `train` runs it scores.
SCORED = 0.5
# Tokens that the second row of a padded batch lacks.
PADDING = 3


@dataclasses.dataclass
class Row:
    """One contender. ``note`` says why there are no numbers."""

    step_ms: float | None = None
    floor_ms: float | None = None
    floor_tflops: float | None = None
    with_optimizer_ms: float | None = None
    saved_bytes_per_token: float | None = None
    peak_bytes: int | None = None
    tokens_per_second: float | None = None
    note: str = ""


def measured(job: Job) -> Row:
    """The job's row; a contender that fails becomes a note."""
    if job.side == "peft" and contenders.is_four_bit(job.method) and importlib.util.find_spec("bitsandbytes") is None:
        return Row(note="bitsandbytes is not installed")
    try:
        return layer_row(job) if job.kind == "layer" else time_model(job, contender(job))
    except torch.OutOfMemoryError:
        return Row(note="out of memory")
    except Exception as error:  # noqa: BLE001  a peer of another version must not end a run on a rented card
        return Row(note=f"{type(error).__name__}: {error}".splitlines()[0][:200])


# --- one layer ---


class OneLayer(nn.Module):
    """A frozen N x N product without a bias, to be adapted."""

    def __init__(self, size: int, device: str) -> None:
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False, device=device, dtype=torch.bfloat16).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)  # type: ignore[no-any-return]


def layer_row(job: Job) -> Row:
    (size,), T = job.sizes, job.batch * job.length
    torch.manual_seed(0)
    model = adapted(OneLayer(size, job.device), job.method, job.side, targets=["layer"])
    x = torch.randn(T, size, device=job.device, dtype=torch.bfloat16, requires_grad=True)
    dy = torch.randn(T, size, device=job.device, dtype=torch.bfloat16)

    def step() -> None:
        with precision(job):
            y = model(x)
        y.backward(dy)

    def forget() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None

    steps = {"step": (step, forget)}
    return timed_row(job, model, steps, [(size, size)], lambda: model(x), LAYER_ROUNDS)


# --- a whole model ---


def contender(job: Job, layers: int | None = None) -> Any:
    """The adapted model of a side, whole or of so many layers."""
    return adapted(random_llama(job, layers), job.method, job.side, targets=contenders.ALL_LINEAR)


class TrainStep:
    """A step as `rankwise train` runs it: one micro-batch, half of its tokens scored, clipping, fused AdamW, and one
    reading of loss and gradient norm."""

    def __init__(self, model: Any, job: Job, *, optimizer: bool) -> None:
        self.model, self.batch = model, batch_of(job)
        self.scored = scored_positions(self.batch["labels"])
        trained = contenders.trained(model)
        self.optimizer = torch.optim.AdamW(trained, fused=True) if optimizer else None

    def forward(self) -> Tensor:
        options = LossOptions(want_stats=True, scored=self.scored)
        out = self.model(**self.batch, num_items_in_batch=len(self.scored), loss_options=options, use_cache=False)
        return out.loss  # type: ignore[no-any-return]

    def __call__(self) -> None:
        loss = self.forward()
        loss.backward()
        if self.optimizer is not None:
            optimizer_step(self.model, self.optimizer, [loss.detach()])

    def forget(self) -> None:
        self.model.zero_grad(set_to_none=True)


def optimizer_step(model: Any, optimizer: torch.optim.Optimizer, losses: list[Tensor]) -> None:
    trained = [parameter for parameter in model.parameters() if parameter.grad is not None]
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0, foreach=True)
    # The trainer's one reading of a step.
    bool(torch.stack([*losses, norm]).isfinite().all())
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def batch_of(job: Job) -> dict[str, Any]:
    """As trl's collator gives it: rows of one length padded on the right, the second a little shorter, or laid end to
    end. The first half of each row is a prompt."""
    ids = torch.randint(0, LLAMA[job.shape]["vocab_size"], (job.batch, job.length), device=job.device)
    labels = ids.clone()
    labels[:, : int(job.length * (1 - SCORED))] = IGNORED
    if job.form == "padded":
        mask = torch.ones_like(ids)
        mask[1:2, -PADDING:], labels[1:2, -PADDING:] = 0, IGNORED
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    bounds = torch.arange(0, ids.numel() + 1, job.length, dtype=torch.int32, device=job.device)
    return {
        "input_ids": ids.view(1, -1),
        "position_ids": torch.arange(job.length, device=job.device).repeat(1, job.batch),
        "labels": labels.view(1, -1),
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": job.length,
        "max_length_k": job.length,
    }


def step_of(job: Job, model: Any, *, optimizer: bool = False) -> Any:
    """Something to call, with ``forward`` and ``forget``."""
    if job.form != "loop":
        return TrainStep(model, job, optimizer=optimizer)
    ids = torch.randint(0, LLAMA[job.shape]["vocab_size"], (job.batch, job.length), device=job.device)
    return contenders.Step(model, ids, optimizer=optimizer)


def time_model(job: Job, model: Any) -> Row:
    step, full = step_of(job, model), step_of(job, model, optimizer=True)

    def under(call: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            with precision(job):
                call()

        return run

    steps = {"step": (under(step), step.forget), "with optimizer": (under(full), full.forget)}
    return timed_row(job, model, steps, llama_shapes(job.shape), under(step.forward), ROUNDS)


def precision(job: Job) -> Any:
    """PEFT keeps adapters in float32; without autocast it would copy every input to float32."""
    if job.side == "peft" and job.device == "cuda":
        return torch.autocast("cuda", torch.bfloat16)
    return contextlib.nullcontext()


def random_llama(job: Job, layers: int | None = None) -> Any:
    from transformers import AutoModelForCausalLM, LlamaConfig

    torch.manual_seed(0)
    shape = LLAMA[job.shape] if layers is None else {**LLAMA[job.shape], "num_hidden_layers": layers}
    config = LlamaConfig(**shape, max_position_embeddings=max(job.length, 64))
    with torch.device(job.device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


def llama_shapes(shape: str) -> list[tuple[int, int]]:
    """(N, K) of every linear layer, the head included."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device("meta"):
        return timing.linear_shapes(AutoModelForCausalLM.from_config(LlamaConfig(**LLAMA[shape])))


def timed_row(
    job: Job,
    model: nn.Module,
    steps: dict[str, timing.Prepared],
    shapes: list[tuple[int, int]],
    forward: Callable[[], object],
    rounds: int,
) -> Row:
    """The numbers; memory is measured without the floor's tensors."""
    T, calls = job.batch * job.length, CALLS if job.kind == "layer" else 1
    floor = timing.Floor(shapes, T, device=job.device, share_weights=True)
    timed = {"step": steps["step"], "floor": (floor, timing.nothing)}
    median = timing.medians(timing.alternate(timed, rounds, warmup=2, device_type=job.device, calls=calls))
    del floor, timed
    _free(job.device)
    # In rounds of their own: the optimizer makes DoRA's norms new.
    full = {name: call for name, call in steps.items() if name != "step"}
    median |= timing.medians(timing.alternate(full, rounds, device_type=job.device))
    return Row(
        step_ms=1e3 * median["step"],
        floor_ms=1e3 * median["floor"],
        floor_tflops=4e-12 * T * sum(N * K for N, K in shapes) / median["floor"],
        with_optimizer_ms=1e3 * median["with optimizer"] if full else None,
        saved_bytes_per_token=timing.saved_bytes(model, forward) / T,
        peak_bytes=torch.cuda.max_memory_allocated() if job.device == "cuda" and full else None,
        tokens_per_second=T / median["step"],
    )


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


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

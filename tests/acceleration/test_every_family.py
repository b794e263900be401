"""Every causal family of the installed transformers, tiny: a fast step has the loss and the gradients of a plain one,
with and without gradient checkpointing; a trace plans it; its adapter is saved, loaded and merged.

What a family computes at random, or cannot be made this small, is skipped with the reason. `make families`.
"""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
import transformers
from families import small_config, without_dropout
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rankwise as rw
from rankwise.acceleration import restore
from rankwise.errors import ModelError
from rankwise.export.merged import merge_to_folder
from rankwise.models import load_model
from rankwise.planning import Workload
from rankwise.planning.trace import Traced

pytestmark = pytest.mark.families

LEFT_OUT = {
    "bailing_hybrid": "its settings, made small, do not fit each other",
    "big_bird": "attends to blocks drawn at random",
    "kimi_linear": "its recurrence takes minutes in PyTorch",
    "phimoe": "chooses experts at random",
    "xmod": "wants to be told a language",
}
# Rounding grows with their steps.
RECURRENT = {"hrm_text", "prophetnet", "xlstm"}
# Their forward asks for values: RW327 says so.
NEEDS_VALUES = {"jetmoe"}
# Never skipped.
WELL_KNOWN = {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo2", "granite"}
WELL_KNOWN |= {"smollm3", "gpt2", "mixtral", "qwen2_moe", "qwen3_moe"}
# Parameters: what stays larger however small its settings are.
LARGEST = 60_000_000


def leave_out(family: str, reason: str) -> NoReturn:
    if family in WELL_KNOWN:
        pytest.fail(reason)
    pytest.skip(reason)


def tiny(family: str, device: str = "cpu") -> Any:
    if reason := LEFT_OUT.get(family):
        leave_out(family, reason)
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family]
    kind = getattr(transformers, name if isinstance(name, str) else name[0])
    try:
        with torch.device("meta"):
            model = kind(small_config(family))
        if sum(parameter.numel() for parameter in model.parameters()) > LARGEST:
            leave_out(family, "not made small")
        if device != "meta":
            model = kind(small_config(family))
    except Exception as error:  # noqa: BLE001
        leave_out(family, f"not made small: {type(error).__name__}: {error}")
    return without_dropout(model.train())


def loss_and_gradients(model: Any) -> tuple[float, dict[str, Tensor]]:
    ids = torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    given = {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    model.zero_grad()
    loss = model(**given).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits_of(model: Any) -> Tensor:
    given: dict[str, Any] = {"input_ids": torch.tensor([[1, 5, 9, 14, 33, 60, 89, 4]])}
    if "use_cache" in inspect.signature(model.forward).parameters:
        given["use_cache"] = False
    with torch.no_grad():
        return model.eval()(**given).logits


def assert_same(found: tuple[float, dict[str, Tensor]], plain: tuple[float, dict[str, Tensor]], error: float) -> None:
    assert found[0] == pytest.approx(plain[0], rel=1e-4)
    # Where layers share an input, one whose output nobody uses gets zeros in place of no gradient.
    assert not any(grad.any() for name, grad in found[1].items() if name not in plain[1])
    for name, grad in plain[1].items():
        assert float((found[1][name] - grad).norm()) <= error * float(grad.norm()) + 1e-6, name


@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_fast_step_is_the_plain_step(family: str) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    try:
        loss_and_gradients(model)
    except Exception as error:  # noqa: BLE001
        leave_out(family, f"no step without an adapter: {type(error).__name__}: {error}")
    rw.add_adapter(model, rw.LoraConfig(r=4, use_dora=True, init_lora_weights=False))
    for checkpointing in (False, True):
        if checkpointing:
            if not model.supports_gradient_checkpointing:
                return
            model.gradient_checkpointing_enable()
        plain = loss_and_gradients(model)
        rw.optimize_for_training(model)
        for _ in range(2):
            assert_same(loss_and_gradients(model), plain, 2e-2 if family in RECURRENT else 1e-3)
        restore(model)


@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_trace_plans_it(family: str) -> None:
    checkpointing = tiny(family, "meta").supports_gradient_checkpointing
    for device in ("cpu", "cuda"):
        workload = Workload(
            batch_size=2, max_length=32, r=4, dtype="float32", device_type=device, gradient_checkpointing=checkpointing
        )
        expected = pytest.raises(ModelError, match="RW327") if family in NEEDS_VALUES else nullcontext()
        with expected:
            assert Traced(tiny(family, "meta"), "dora", workload).peaks(workload)


@pytest.mark.parametrize("family", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_a_merged_folder_is_the_adapted_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = tiny(family)
    try:
        plain = logits_of(model)
        model.save_pretrained(tmp_path / "base")
        again = load_model(str(tmp_path / "base"), dtype=torch.float32)[0]
        torch.testing.assert_close(logits_of(again), plain, rtol=1e-4, atol=1e-5)
        rw.add_adapter(model, rw.LoraConfig(r=4, init_lora_weights=False))
        loss_and_gradients(model)
    except Exception as error:  # noqa: BLE001
        reason = str(error).replace(f"{tmp_path}/", "")
        leave_out(family, f"not saved, loaded and trained: {type(error).__name__}: {reason}")
    for parameter in rw.adapter_parameters(model).values():
        # The forward pass uses no such layer, and `train` refuses its adapter (RW523).
        if parameter.grad is None:
            parameter.data.zero_()
    adapted = logits_of(model)
    assert not torch.allclose(adapted, plain, atol=1e-3)
    rw.save_adapter(model, tmp_path / "adapter", base_model=str(tmp_path / "base"))
    rw.load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(again), adapted, rtol=1e-4, atol=1e-5)
    merge_to_folder(tmp_path / "adapter", tmp_path / "merged")
    merged = load_model(str(tmp_path / "merged"), dtype=torch.float32)[0]
    torch.testing.assert_close(logits_of(merged), adapted, rtol=1e-3, atol=1e-3 if family in RECURRENT else 1e-4)

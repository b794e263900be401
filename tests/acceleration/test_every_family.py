"""Every causal family of the installed transformers, tiny: a fast step has the loss and the gradients of a plain one,
with and without gradient checkpointing; a dry run plans it; its adapter is saved, loaded and merged.

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
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import rankwise as rw
from rankwise.acceleration import restore
from rankwise.errors import ModelError
from rankwise.export.merged import merge_to_folder
from rankwise.models import load_model
from rankwise.planning import Workload
from rankwise.planning.architectures import FAMILIES
from rankwise.planning.dry_run import trace

pytestmark = pytest.mark.families

WIDTHS = {
    32: "hidden_size n_embd d_model word_embed_proj_dim",
    48: "intermediate_size n_inner d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim",
    24: "moe_intermediate_size shared_expert_intermediate_size",
    16: "q_lora_rank kv_lora_rank sliding_window",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim rotary_dim",
    4: "num_attention_heads n_head num_heads n_heads encoder_attention_heads decoder_attention_heads num_experts "
    "num_local_experts n_routed_experts",
    2: "num_hidden_layers n_layer num_layers n_layers encoder_layers decoder_layers num_key_value_heads "
    "num_experts_per_tok eos_token_id",
    64: "max_position_embeddings n_positions",
    97: "vocab_size vocab_size_per_layer_input",
    1: "n_group topk_group first_k_dense_replace bos_token_id",
    0: "pad_token_id",
}
SMALL = {name: width for width, names in WIDTHS.items() for name in names.split()}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": MAMBA,
    "deepseek_v2": {"num_experts_per_tok": 2, "topk_method": "greedy"},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": [0.0, 0.0],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8},
    "ministral": {"head_dim": 8},
}
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
# Never skipped: those of the closed form, without the one that sees pictures too.
WELL_KNOWN = FAMILIES.keys() - {"gemma3"}
# Parameters: what stays larger however small its settings are.
LARGEST = 60_000_000


def small_config(family: str) -> Any:
    """Raises whatever a family's configuration has against being small."""
    plain = transformers.CONFIG_MAPPING[family]().get_text_config()
    had = plain.to_dict()
    chosen = {name: width for name, width in SMALL.items() if had.get(name) is not None}
    heads = had.get("num_key_value_heads")
    if heads is not None and heads in (1, had.get("num_attention_heads")):
        chosen["num_key_value_heads"] = 1 if heads == 1 else chosen["num_attention_heads"]
    return type(plain)(**{**chosen, **SPECIAL.get(family, {})})


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
    model.train()
    for module in model.modules():
        for field in [name for name in vars(module) if name == "p" or "dropout" in name]:
            if isinstance(getattr(module, field), float):
                setattr(module, field, 0.0)
    return model


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
def test_a_dry_run_plans_it(family: str) -> None:
    checkpointing = tiny(family, "meta").supports_gradient_checkpointing
    for device in ("cpu", "cuda"):
        workload = Workload(
            batch_size=2, max_length=32, r=4, dtype="float32", device_type=device, gradient_checkpointing=checkpointing
        )
        expected = pytest.raises(ModelError, match="RW327") if family in NEEDS_VALUES else nullcontext()
        with expected:
            assert trace(tiny(family, "meta"), "dora", workload).peak_bytes > 0


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

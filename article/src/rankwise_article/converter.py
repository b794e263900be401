"""loralib's ``.pt`` files as PEFT adapters: what ``lora.lora_state_dict`` saves, as in the LoRA paper's releases.

A ``.pt`` file is a pickle. ``torch.load(weights_only=True)`` admits only tensors and plain containers.

loralib's ``MergedLinear`` holds a pair for each enabled part of a fused projection: A (n r, in), B (n out/parts, r).
PEFT holds one pair of rank n r with a block-structured B (out, n r), and n times alpha for the same scale alpha / r.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rankwise.adapters import load_adapter
from rankwise.disk import whole_folder
from rankwise.errors import AdapterError
from rankwise.foreign import JsonObject
from rankwise.models import load_skeleton

# GPT-2's c_attn holds q, k and v, of which the paper's runs adapt q and v.
PARTS = (True, False, True)


def convert(path: Path, output: Path, model: str, alpha: float, parts: Sequence[bool] = PARTS) -> JsonObject:
    """Write ``path`` as a PEFT folder, checked against ``model``. loralib's files do not hold ``alpha``.

    Raises AdapterError: RA260 for a file that is not loralib's, RW411 for shapes that the model does not have.
    """
    pairs = _pairs(path)
    ranks = {B.shape[1] for _, B in pairs.values()}
    fused = {name: sum(parts) if A.shape[0] == sum(parts) * B.shape[1] else 1 for name, (A, B) in pairs.items()}
    if len(ranks) > 1 or any(A.shape[0] != fused[name] * B.shape[1] for name, (A, B) in pairs.items()):
        raise AdapterError(
            "RA260", f"{path} holds pairs of A and B whose ranks differ; --parts says which parts adapt."
        )
    r, widest, skeleton = ranks.pop(), max(fused.values()), load_skeleton(model)
    tensors = {}
    for name, (A, B) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = A.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = _blocks(B, parts) if fused[name] > 1 else B.contiguous()
    narrow = [name for name, count in fused.items() if count < widest]
    document = {
        "alpha_pattern": dict.fromkeys(narrow, alpha),
        "base_model_name_or_path": model,
        "bias": "none",
        "fan_in_fan_out": type(dict(skeleton.named_modules()).get(next(iter(pairs)))).__name__ == "Conv1D",
        "inference_mode": True,
        "lora_alpha": widest * alpha,
        "peft_type": "LORA",
        "r": widest * r,
        "rank_pattern": dict.fromkeys(narrow, r),
        "target_modules": sorted({name.rpartition(".")[2] for name in pairs}),
        "task_type": "CAUSAL_LM",
    }
    with whole_folder(output) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(document, indent=2, sort_keys=True), encoding="utf-8")
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        load_adapter(skeleton, folder)
    return {"output": str(output), "modules": len(pairs), "r": r, "lora_alpha": alpha}


def _blocks(B: Tensor, parts: Sequence[bool]) -> Tensor:
    """B (n p, r) as the block-structured matrix (parts p, n r): zero where row and column are of different parts."""
    blocks = iter(torch.block_diag(*B.chunk(sum(parts))).chunk(sum(parts)))
    size, width = B.shape[0] // sum(parts), sum(parts) * B.shape[1]
    return torch.cat([next(blocks) if enabled else B.new_zeros(size, width) for enabled in parts])


def _pairs(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: (A, B)}. Raises AdapterError (RA260)."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        state = state.get("model_state_dict", state)
        found = {key.removeprefix("module."): value.float() for key, value in state.items()}
    except (OSError, pickle.UnpicklingError, EOFError, RuntimeError, AttributeError) as error:
        raise AdapterError("RA260", f"{path} is no state of loralib's adapters: {str(error)[:200]}") from None
    names = sorted({key.removesuffix(".lora_A") for key in found if key.endswith(".lora_A")})
    wanted = {f"{name}.lora_{end}" for name in names for end in "AB"}
    if not names or wanted != set(found) or any(value.dim() != 2 for value in found.values()):
        other = ", ".join(sorted(wanted ^ set(found))[:3])
        raise AdapterError("RA260", f"{path} holds other tensors than pairs of lora_A and lora_B: {other or 'none'}.")
    return {name: (found[f"{name}.lora_A"], found[f"{name}.lora_B"]) for name in names}

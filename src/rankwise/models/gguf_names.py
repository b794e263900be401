"""llama.cpp's names of a model's tensors, and the order of their rows.

llama's family, and SmolLM3, interleave the two halves of each head of q and k, since llama.cpp rotates neighbours where
transformers rotates halves. Qwen 3.5's linear attention has several heads of values for each of keys: transformers
keeps those of one key together, llama.cpp the first of all keys. Stacked experts lie in one tensor for each of gate, up
and down.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rankwise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# transformers' model_type: llama.cpp's architecture.
ARCHITECTURES = {
    "gemma2": "gemma2",
    "gemma3": "gemma3",
    "gemma3_text": "gemma3",
    "gemma4": "gemma4",
    "gemma4_text": "gemma4",
    "gpt2": "gpt2",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "llama",
    "phi": "phi2",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_5": "qwen35",
    "qwen3_5_text": "qwen35",
    "qwen3_moe": "qwen3moe",
    "smollm3": "smollm3",
}
# Those whose adapters are written, and whose files are not read in their own bits.
ONLY_ADAPTERS = ("gemma4", "gemma4_text", "mixtral", "phi", "qwen3_5", "qwen3_5_text", "smollm3")


@dataclasses.dataclass(frozen=True)
class Part:
    """A tensor of the GGUF file, and the rows of transformers' tensor that it takes: one half, or all."""

    name: str
    half: int | None = None

    def of(self, W: Tensor) -> Tensor:
        """W (out, ...), or of stacked experts (E, out, ...)."""
        return W if self.half is None else W.chunk(2, dim=1)[self.half]


class GgufNames:
    """The names for a model of ``config``. Raises ModelError (RW740) for a family that is not converted."""

    def __init__(self, config: PreTrainedConfig) -> None:
        import gguf

        self.config = config.get_text_config()
        kind = str(config.model_type)
        if kind not in ARCHITECTURES:
            raise ModelError(
                "RW740",
                f"models of type {kind} are not converted to GGUF here (those of type {', '.join(ARCHITECTURES)} are); "
                "merge with rankwise merge, and convert that folder with llama.cpp's convert_hf_to_gguf.py.",
            )
        self.architecture = ARCHITECTURES[kind]
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        self._map = gguf.get_tensor_name_map(arch, self.config.num_hidden_layers)

    def of(self, name: str) -> list[Part]:
        """The GGUF's tensors of a parameter or module of transformers'. Raises ModelError (RW740) for one without."""
        plain = name.replace("language_model.", "")
        path, _, leaf = plain.rpartition(".")
        if path.endswith(".experts") and leaf == "gate_up_proj":
            gate, up = (self._name(f"{path}.{half}_proj", name) for half in ("gate", "up"))
            return [Part(f"{gate}.weight", 0), Part(f"{up}.weight", 1)]
        found = self._name(plain, name)
        return [Part(found if found.endswith((".weight", ".bias")) else f"{found}.weight")]

    def _name(self, plain: str, name: str) -> str:
        found = self._map.get_name(plain, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise ModelError(
                "RW740",
                f"llama.cpp's {self.architecture} has no tensor for {name}; leave it, and what is tied to it, out of "
                "the adapter, or merge with rankwise merge.",
            )
        return str(found)

    def adds_one(self, name: str) -> bool:
        """Whether llama.cpp stores the parameter plus one."""
        if self.architecture == "qwen35":
            return name.endswith("norm.weight") and ".linear_attn." not in name
        return self.architecture in ("gemma2", "gemma3") and name.endswith("norm.weight")

    def rows(self, name: str, W: Tensor) -> Tensor:
        """W (out, ...) with its rows in llama.cpp's order."""
        module = name.removesuffix(".weight").removesuffix(".bias")
        if self.architecture == "qwen35" and ".linear_attn." in module:
            return self._value_heads(module.rpartition(".")[2], W)
        if self.architecture not in ("llama", "smollm3") or not module.endswith((".q_proj", ".k_proj")):
            return W
        config = self.config
        heads = config.num_attention_heads if module.endswith(".q_proj") else config.num_key_value_heads
        return W.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(W.shape)

    def columns(self, name: str, A: Tensor) -> Tensor:
        """A (r, in) with its columns in llama.cpp's order."""
        if self.architecture == "qwen35" and name.endswith(".linear_attn.out_proj"):
            return self._by_key(A.T, self.config.linear_value_head_dim).T
        return A

    def _value_heads(self, leaf: str, W: Tensor) -> Tensor:
        keys = 2 * self.config.linear_num_key_heads * self.config.linear_key_head_dim
        if leaf in ("in_proj_qkv", "conv1d"):
            return torch.cat([W[:keys], self._by_key(W[keys:], self.config.linear_value_head_dim)])
        if leaf == "in_proj_z":
            return self._by_key(W, self.config.linear_value_head_dim)
        return self._by_key(W, 1) if leaf in ("in_proj_a", "in_proj_b", "A_log", "dt_bias") else W

    def _by_key(self, W: Tensor, width: int) -> Tensor:
        """Heads of ``width`` rows, those of one key together -> the first of every key, then the second."""
        return W.unflatten(0, (self.config.linear_num_key_heads, -1, width)).transpose(0, 1).reshape(W.shape)

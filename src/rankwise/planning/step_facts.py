"""The values of a step that the equations of the closed form use. Imports no torch.

T tokens, L of them a row, h hidden width, q and k widths of queries and of keys, f MLP width, s bytes per element,
R ranks of the layer's adapters, H heads, V vocabulary, P = T L H scores. The same letters stand in `planning.saved`,
`planning.head`, `planning.backward` and `planning.phases`.
"""

from __future__ import annotations

import dataclasses
import functools
from math import prod
from pathlib import Path

from rankwise.config import DORA, FOUR_BITS
from rankwise.constants import ALIGNED, FLASH_WIDTH
from rankwise.models.device import cpu_flags
from rankwise.planning.adapted import STACKS, Adaptation, adaptation
from rankwise.planning.shape import Module, Shape
from rankwise.planning.workload import DTYPE_BYTES, Workload


@dataclasses.dataclass(frozen=True)
class StepFacts:
    shape: Shape
    method: str
    workload: Workload
    # None for full fine-tuning.
    adaptation: Adaptation | None

    @classmethod
    def of(cls, shape: Shape, method: str, workload: Workload) -> StepFacts:
        """Raises AdapterError as ``adaptation`` does."""
        config = workload.lora_config(use_dora=method in DORA)
        return cls(shape, method, workload, None if method == "full" else adaptation(shape, config))

    @property
    def T(self) -> int:
        return self.workload.tokens

    @property
    def s(self) -> int:
        return DTYPE_BYTES[self.workload.dtype]

    @property
    def base_element_bytes(self) -> int:
        """4 for full fine-tuning, whose weights the trainer keeps in float32; else s."""
        return 4 if self.is_full else self.s

    @property
    def pair_element_bytes(self) -> int:
        """Bytes per element of A and B."""
        return 4 if self.workload.adapter_dtype == "float32" else self.base_element_bytes

    @functools.cached_property
    def ranks(self) -> float:
        """R, on average over the layers."""
        return 0 if self.adaptation is None else sum(x.rank for x in self.adaptation.adapted) / self.shape.layers

    @functools.cached_property
    def adapted(self) -> frozenset[str]:
        """Last name components of the modules that are adapted or train whole: q_proj, mlp.down_proj, ..."""
        if self.adaptation is None:
            return frozenset()
        modules = [item.module for item in self.adaptation.adapted] + list(self.adaptation.whole)
        ends = frozenset(".".join(module.name.split(".")[-2:]) for module in modules)
        return ends | frozenset(name.rpartition(".")[2] for name in ends)

    @functools.cached_property
    def layer_weights(self) -> int:
        """Parameters of the first layer."""
        return sum(module.parameters for module in self.shape.modules if ".0." in module.name)

    @property
    def whole_head(self) -> bool:
        """Whether the output head trains whole in addition to adapters."""
        return self.adaptation is not None and self.shape.modules[-1] in self.adaptation.whole

    @functools.cached_property
    def expert_ranks(self) -> tuple[float, float]:
        """The ranks of the adapters on stacked experts, for the first and the second product, averaged over layers."""
        stacks = () if self.adaptation is None else self.adaptation.stacks
        first, second = (sum(x.r for x in stacks if x.leaf == leaf) / self.shape.layers for leaf in STACKS)
        return first, second

    @functools.cached_property
    def expert_share(self) -> float:
        """The share of the layers whose experts are adapted."""
        stacks = () if self.adaptation is None else self.adaptation.stacks
        return len({item.module.name for item in stacks}) / self.shape.layers

    def four_bit_weights(self, module: Module) -> list[tuple[int, ...]]:
        """Shapes of the module's weights that are 4-bit: linear layers except the output head, and stacks of experts
        whose matrices are whole blocks."""
        if self.method not in FOUR_BITS:
            return []
        if module.is_linear and module is not self.shape.modules[-1]:
            return [(module.outputs, module.inputs)]
        return [stack for stack in module.stacks if prod(stack[1:]) % self.workload.block_size == 0]

    @property
    def made_dense(self) -> list[int]:
        """The bytes N K s of each 4-bit weight that a product dequantizes (of a stack: of one expert). Empty where CPU
        kernels decode weights in the caches."""
        if self.decodes_in_caches:
            return []
        return [prod(size[-2:]) * self.s for module in self.shape.modules for size in self.four_bit_weights(module)]

    @property
    def decodes_in_caches(self) -> bool:
        if self.on_card:
            return False
        dtype = self.workload.dtype
        return (dtype == "bfloat16" and multiplies_pairs()) or (dtype != "float16" and computes_in_float32())

    @property
    def P(self) -> int:
        return self.T * self.row_tokens * self.shape.heads

    @property
    def stream_bytes(self) -> int:
        """The bytes T h s of the hidden states between two layers, or of their gradient; s = 4 in full fine-tuning."""
        return self.T * self.shape.hidden * (4 if self.is_full else self.s)

    @property
    def is_full(self) -> bool:
        return self.method == "full"

    @property
    def autocasts(self) -> bool:
        """Whether products use 16-bit copies of float32 weights (full fine-tuning in 16 bits)."""
        return self.is_full and self.s == 2

    @property
    def on_card(self) -> bool:
        return self.workload.device_type == "cuda"

    @property
    def wide(self) -> bool:
        """Whether rankwise's operators support the dtype: float32 and bfloat16; full fine-tuning always uses these."""
        return self.is_full or self.workload.dtype != "float16"

    @property
    def native(self) -> bool:
        """Whether the operators of the native library run."""
        return self.workload.fast and self.wide and not self.on_card and self.shape.family != "gpt2"

    @property
    def fused(self) -> bool:
        """Whether norms, rotary positions and gated MLPs are fused: by the native library on a CPU, Triton on a GPU."""
        return (self.native or self.workload.has_triton_parts) and self.shape.family != "gpt2"

    @property
    def fused_mlp(self) -> bool:
        """Whether the MLP is fused. Phi-3's is not, since gate and up are one projection there."""
        return self.fused and self.shape.family != "phi3"

    @property
    def keeps_read(self) -> bool:
        """Whether adapters save their input. They do not where a fused norm made it, which saves its own input.

        OLMo 2 has its norms after attention and MLP, so its adapters read no norm's output. In float16 adapters always
        save their input.
        """
        return not self.fused or self.workload.dtype == "float16" or self.shape.family == "olmo2"

    @property
    def own_attention(self) -> bool:
        """Whether attention takes concatenated rows by their bounds: rankwise's kernel on a CPU; on a GPU flash
        attention, for 16-bit weights and heads of at most FLASH_WIDTH columns."""
        if not self.workload.fast or self.scores:
            return False
        dtype = "float32" if self.is_full else self.workload.dtype
        if self.on_card:
            takes_heads = self.shape.head_dim <= FLASH_WIDTH and self.shape.head_dim % ALIGNED == 0
            return self.workload.flash and dtype != "float32" and takes_heads
        return self.workload.dtype != "float16" and (dtype == "bfloat16" or computes_in_float32())

    @property
    def trains_without_masks(self) -> bool:
        """Whether a training step needs no mask for right padding, as on a GPU."""
        return self.on_card and self.workload.fast and not self.workload.evaluation and not self.shape.eager

    @property
    def trl_head(self) -> bool:
        """Whether a GPU computes the loss with trl's fused head: with --no-fast, a plain head, no label smoothing."""
        plain = not self.whole_head and "lm_head" not in self.adapted and not self.workload.label_smoothing
        return self.on_card and not self.workload.fast and not self.workload.evaluation and plain

    @property
    def four_bit_experts(self) -> bool:
        """Whether `rankwise.quantization.experts` computes 4-bit experts, one after the other."""
        return any(module.stacks and self.four_bit_weights(module) for module in self.shape.modules)

    @property
    def expert_adapters(self) -> bool:
        """Whether stacked experts are adapted, so that `rankwise.ops.expert_lora` computes them."""
        return self.expert_share > 0

    @property
    def routing_bytes(self) -> int:
        """The bytes of a routing weight of a token. Mixtral keeps routing weights in float32."""
        return 4 if self.shape.family == "mixtral" else self.s

    @property
    def drops_scores(self) -> bool:
        """Whether attention dropout runs in PyTorch's plain kernel, as on a CPU, which saves the attention weights."""
        return bool(self.shape.attention_dropout) and not self.on_card and not self.shape.eager

    @property
    def scores(self) -> bool:
        """Whether a layer saves numbers for each head and pair of positions."""
        return self.shape.eager or self.drops_scores

    @property
    def flat(self) -> bool:
        """Whether the trainer concatenates the rows of a batch: packed rows always, others with ``own_attention``."""
        return self.own_attention or self.packed

    @property
    def packed(self) -> bool:
        """Whether rows hold several examples; rows of an evaluation do not."""
        return self.workload.packing and not self.workload.evaluation

    @property
    def row_tokens(self) -> int:
        """Tokens of a row in the model's input."""
        return self.T if self.flat else self.workload.max_length

    @property
    def masked(self) -> float:
        """Share of the layers that are given a mask: none where bounds take its place. Packed rows: all layers. Several
        rows: all layers, since one row is padded. A single row: the layers whose window is no longer than the row."""
        if self.own_attention:
            return 0.0
        if self.packed or (self.workload.sequences > 1 and not self.trains_without_masks):
            return 1.0
        window = self.shape.window
        return self.shape.windowed_share if window is not None and self.workload.max_length >= window else 0.0

    @property
    def kept_keys(self) -> float:
        """The width of the keys, and of the values, that attention saves.

        With a mask, transformers repeats keys and values for every head. A single key head is not copied, except by
        eager attention.
        """
        shape = self.shape
        if self.own_attention or (shape.kv_heads == 1 and not shape.eager):
            return shape.keys
        masked = 1.0 if shape.eager else self.masked
        return masked * shape.queries + (1 - masked) * shape.keys

    @property
    def keeps_v(self) -> bool:
        """Whether attention saves v as its projection returned it, without a repeated copy."""
        shape = self.shape
        return self.own_attention or shape.heads == shape.kv_heads or (not self.masked and not shape.eager)

    @property
    def norms_after(self) -> bool:
        """Whether a norm follows attention and MLP."""
        return self.shape.norms_per_layer == 4 or self.shape.family == "olmo2"

    def has(self, *names: str) -> bool:
        return any(name in self.adapted for name in names)


@functools.cache
def computes_in_float32() -> bool:
    """Whether the native products and attention compute in float32 on this CPU, and so support float32 too.

    The same rule as csrc/common/level.cpp, without torch, which a plan does not import.
    """
    return _is_built() and "avx2" in cpu_flags() and not multiplies_pairs()


@functools.cache
def multiplies_pairs() -> bool:
    """Whether the native products multiply pairs of bfloat16 on this CPU."""
    return _is_built() and "avx512_bf16" in cpu_flags()


@functools.cache
def _is_built() -> bool:
    return any((Path(__file__).parents[1] / "ops" / "cpu").glob("_native*"))

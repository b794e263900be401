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
    # None: full fine-tuning.
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
        """Of A and B."""
        return 4 if self.workload.adapter_dtype == "float32" else self.base_element_bytes

    @functools.cached_property
    def ranks(self) -> float:
        """R, on average over the layers."""
        return 0 if self.adaptation is None else sum(x.rank for x in self.adaptation.adapted) / self.shape.layers

    @functools.cached_property
    def adapted(self) -> frozenset[str]:
        """Last names of the modules that adapt or train whole: q_proj, mlp.down_proj, ..."""
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
        """The output head trains as a whole beside adapters."""
        return self.adaptation is not None and self.shape.modules[-1] in self.adaptation.whole

    @functools.cached_property
    def expert_ranks(self) -> tuple[float, float]:
        """Ranks of the adapters on stacked experts, of the first and of the second product, on average over the
        layers."""
        stacks = () if self.adaptation is None else self.adaptation.stacks
        first, second = (sum(x.r for x in stacks if x.leaf == leaf) / self.shape.layers for leaf in STACKS)
        return first, second

    @functools.cached_property
    def expert_share(self) -> float:
        """Share of the layers whose experts adapt."""
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
        """Bytes of each 4-bit weight as its product makes it dense, N K s; of stacked experts of one expert. None where
        a CPU's sums of products decode weights in the caches."""
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
        """The hidden states between two layers, T h s, or the gradient of them; in float32 for full fine-tuning."""
        return self.T * self.shape.hidden * (4 if self.is_full else self.s)

    @property
    def is_full(self) -> bool:
        return self.method == "full"

    @property
    def autocasts(self) -> bool:
        """Full fine-tuning in 16 bits computes with copies of float32 weights."""
        return self.is_full and self.s == 2

    @property
    def on_card(self) -> bool:
        return self.workload.device_type == "cuda"

    @property
    def wide(self) -> bool:
        """Our parts take float32 and bfloat16. In full fine-tuning they get one of these in any dtype."""
        return self.is_full or self.workload.dtype != "float16"

    @property
    def native(self) -> bool:
        """Whether the native library's parts run."""
        return self.workload.fast and self.wide and not self.on_card and self.shape.family != "gpt2"

    @property
    def fused(self) -> bool:
        """Norms, rotary positions and gated MLPs are ours: native ones on a CPU, Triton's on a card."""
        return (self.native or self.workload.has_triton_parts) and self.shape.family != "gpt2"

    @property
    def fused_mlp(self) -> bool:
        """Phi-3's MLP stays PyTorch's, since gate and up are one projection there."""
        return self.fused and self.shape.family != "phi3"

    @property
    def keeps_read(self) -> bool:
        """Whether adapters keep their input. They do not where one of our norms made it: that norm keeps its own input.

        OLMo 2 has its norms after attention and MLP, so its adapters read no norm's output. In float16 adapters always
        keep their input.
        """
        return not self.fused or self.workload.dtype == "float16" or self.shape.family == "olmo2"

    @property
    def own_attention(self) -> bool:
        """Rows reach it by their bounds, in evaluation too: our kernel on a CPU, flash attention on a card, for
        16-bit weights and heads of FLASH_WIDTH columns at the most."""
        if not self.workload.fast or self.scores:
            return False
        dtype = "float32" if self.is_full else self.workload.dtype
        if self.on_card:
            takes_heads = self.shape.head_dim <= FLASH_WIDTH and self.shape.head_dim % ALIGNED == 0
            return self.workload.flash and dtype != "float32" and takes_heads
        return self.workload.dtype != "float16" and (dtype == "bfloat16" or computes_in_float32())

    @property
    def trains_without_masks(self) -> bool:
        """On a card a training step needs no mask for right padding."""
        return self.on_card and self.workload.fast and not self.workload.evaluation and not self.shape.eager

    @property
    def trl_head(self) -> bool:
        """Whether a card computes the loss by trl's fused head: with --no-fast, a plain head and no label smoothing."""
        plain = not self.whole_head and "lm_head" not in self.adapted and not self.workload.label_smoothing
        return self.on_card and not self.workload.fast and not self.workload.evaluation and plain

    @property
    def four_bit_experts(self) -> bool:
        """`rankwise.quantization.experts` computes one expert after the other."""
        return any(module.stacks and self.four_bit_weights(module) for module in self.shape.modules)

    @property
    def expert_adapters(self) -> bool:
        """Experts adapt, so that `rankwise.ops.expert_lora` computes them."""
        return self.expert_share > 0

    @property
    def routing_bytes(self) -> int:
        """Bytes of an expert's weight for a token. Mixtral leaves these weights in float32."""
        return 4 if self.shape.family == "mixtral" else self.s

    @property
    def drops_scores(self) -> bool:
        """On a CPU, attention dropout runs in PyTorch's plain kernel, which keeps the weights."""
        return bool(self.shape.attention_dropout) and not self.on_card and not self.shape.eager

    @property
    def scores(self) -> bool:
        """A layer keeps one number or several for each head and pair of positions."""
        return self.shape.eager or self.drops_scores

    @property
    def flat(self) -> bool:
        """Whether the trainer lays the rows of a batch end to end in one: packed rows always, others where our
        attention is in the model.
        """
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
        """Width of the keys, and of the values, that attention keeps.

        With a mask transformers repeats them for every head. Kernels take a single key head for all heads without a
        copy; eager products copy it.
        """
        shape = self.shape
        if self.own_attention or (shape.kv_heads == 1 and not shape.eager):
            return shape.keys
        masked = 1.0 if shape.eager else self.masked
        return masked * shape.queries + (1 - masked) * shape.keys

    @property
    def keeps_v(self) -> bool:
        """Attention keeps v as its projection gave it, and no repeated copy."""
        shape = self.shape
        return self.own_attention or shape.heads == shape.kv_heads or (not self.masked and not shape.eager)

    @property
    def norms_after(self) -> bool:
        """Attention and MLP are each followed by a norm."""
        return self.shape.norms_per_layer == 4 or self.shape.family == "olmo2"

    def has(self, *names: str) -> bool:
        return any(name in self.adapted for name in names)


@functools.cache
def computes_in_float32() -> bool:
    """Whether our products and attention compute in float32 on this CPU, so that they take float32 beside bfloat16.

    csrc/common/level.cpp decides so; here it is decided without torch, whose import a plan avoids.
    """
    return _is_built() and "avx2" in cpu_flags() and not multiplies_pairs()


@functools.cache
def multiplies_pairs() -> bool:
    """Whether our products multiply pairs of bfloat16 on this CPU."""
    return _is_built() and "avx512_bf16" in cpu_flags()


@functools.cache
def _is_built() -> bool:
    return any((Path(__file__).parents[1] / "ops" / "cpu").glob("_native*"))

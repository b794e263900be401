"""The values of a step that the equations of the closed form use. Imports no torch.

T tokens, L of them a row, h hidden width, q and k widths of queries and of keys, f MLP width, s bytes per element,
R ranks of the layer's adapters, H heads, V vocabulary, P = T L H scores. The same letters stand in `planning.saved`,
`planning.head`, `planning.backward` and `planning.phases`.
"""

from __future__ import annotations

import dataclasses

from rankwise.config import FOUR_BITS
from rankwise.constants import ALIGNED, FLASH_WIDTH
from rankwise.planning.shape import Shape
from rankwise.planning.weights import DTYPE_BYTES, computes_in_float32, has_packed_experts
from rankwise.planning.workload import Workload


@dataclasses.dataclass(frozen=True)
class StepFacts:
    shape: Shape
    method: str
    workload: Workload
    # R, on average over the layers.
    ranks: float
    # Last names of the modules that adapt or train whole: q_proj, mlp.down_proj, ...
    adapted: frozenset[str]
    # Parameters of one layer, on average.
    layer_weights: float
    # The output head trains as a whole beside adapters.
    whole_head: bool = False
    # Ranks of the adapters on stacked experts, of the first and of the second product, on average over the layers.
    expert_ranks: tuple[float, float] = (0, 0)
    # Share of the layers whose experts adapt.
    expert_share: float = 0

    @property
    def T(self) -> int:
        return self.workload.tokens

    @property
    def s(self) -> int:
        return DTYPE_BYTES[self.workload.dtype]

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
        return self.method in FOUR_BITS and has_packed_experts(self.shape, self.workload)

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

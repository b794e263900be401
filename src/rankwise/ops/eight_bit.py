"""Products of frozen weights in 8 bits, in plain PyTorch: the specification of the native ones.

    W_q = round(W c / w)     w = max_k |W c| / 127          x_q = round(x / c / a)    a = max_k |x / c| / 127
    W x ~ a w (W_q x_q)                                     d_q = round(dz w / b)     b = max_n |dz w| / 127
    W^T dz ~ b (W_q^T d_q) / c

Sums are exact integers. Processors that multiply integers of 16 bits but none of 8 (AVX2 alone) compute the same with
1,023 in place of 127. The channel scales c_k = sqrt(max |x_k| / max |W_k|) take the outliers of the input into the
weight (SmoothQuant, arXiv 2211.10438, equation 4 with alpha = 0.5); without them a few channels of x leave no bits to
the others. Gradients are dithered: most numbers of a row are small beside its largest, and rounded to the nearest they
would be 0 in every row, an error that no sum over steps averages out (benchmarks/results/eight_bits.md).

Legend: x (T, K), W (N, K), dz (T, N); c (K,), w (N,), a and b (T,). All scales are float32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from rankwise.compat.torch import int_mm
from rankwise.ops import selection
from rankwise.ops.kept import Key, frozen_key
from rankwise.ops.packed_weight import PackedWeight
from rankwise.ops.reference import row_chunks

LARGEST = 127
# A row whose largest number is smaller counts as zero, since its quotients would overflow.
_TINY = 1e-30
# Channels that were silent in the rows of calibration count as this part of the average channel.
_LEAST_PART = 1e-2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """c (K,) and w (N,) of one weight, and their reciprocals. ``largest``: the integer of the largest number.
    ``rounded``: W_q (N, K), as W lies in memory, where it is kept."""

    channel: Tensor
    row: Tensor
    per_channel: Tensor
    per_row: Tensor
    largest: int = LARGEST
    rounded: Tensor | None = None

    @classmethod
    def of(cls, W: Tensor, channel: Tensor, largest: int = LARGEST) -> Scales:
        """The scales of W (N, K) for channel scales (K,)."""
        return cls.of_parts([W], channel, largest)

    @classmethod
    def of_parts(cls, parts: Iterable[Tensor], channel: Tensor, largest: int = LARGEST) -> Scales:
        """The same of a weight whose rows are those of the parts (N_i, K), one after the other."""
        most = [(W[rows].float() * channel).abs().amax(dim=1) for W in parts for rows in row_chunks(*W.shape)]
        row = torch.cat(most).clamp(min=_TINY) / largest
        return cls(channel=channel, row=row, per_channel=1 / channel, per_row=1 / row, largest=largest)


class Weight(Protocol):
    """A frozen weight (N, K), or those of a layer's experts, one after the other."""

    @property
    def weight(self) -> Tensor | PackedWeight: ...

    def parts(self, dtype: torch.dtype) -> Iterable[Tensor]:
        """Dense matrices with its rows, in their order."""


class EightBit:
    """The scales of one frozen weight. The first rows that reach it give the channel scales, which then stay.

    ``keeps_rounded``: a dense weight's integers are kept beside it, instead of being made in every pass.
    """

    def __init__(self, channel: Tensor | None = None) -> None:
        self.channel = channel
        self.keeps_rounded = False
        self._scales: Scales | None = None
        self._key: Key = ()

    def __reduce__(self) -> tuple[type[EightBit], tuple[Tensor | None]]:
        return EightBit, (self.channel,)

    def scales(self, frozen: Weight) -> Scales | None:
        """None before `calibrate`."""
        if self.channel is None:
            return None
        W = frozen.weight
        key, largest = frozen_key(codes := W.codes if isinstance(W, PackedWeight) else W), _largest(codes)
        if self._scales is None or self._key[1:] != key[1:] or self._scales.largest != largest:
            dtype = torch.bfloat16 if isinstance(W, PackedWeight) else W.dtype
            self._scales, self._key = Scales.of_parts(frozen.parts(dtype), self.channel, largest), key
        if self.keeps_rounded and self._scales.rounded is None and isinstance(W, Tensor) and largest == LARGEST:
            self._scales = dataclasses.replace(self._scales, rounded=_rounded(W, self._scales))
        return self._scales


def _largest(weight: Tensor) -> int:
    """The largest integer of the products that run with this weight."""
    if not selection.takes_native(weight):
        return LARGEST
    from rankwise.ops.cpu import native

    return int(native.library().rw_products_largest()) or LARGEST


def calibrate(rows: Tensor, weights: Sequence[tuple[EightBit | None, Weight]]) -> None:
    """Give channel scales from rows (T, K) to those weights that have none yet; all of them get the same."""
    new = [(eight_bit, weight) for eight_bit, weight in weights if eight_bit and eight_bit.channel is None]
    if not new:
        return
    of_weights = [_largest_of_columns(weight.parts(rows.dtype)) for _, weight in new]
    channel = channel_scales(rows.detach().abs().amax(dim=0).float(), torch.stack(of_weights).amax(dim=0).float())
    for eight_bit, _ in new:
        eight_bit.channel = channel


def _largest_of_columns(parts: Iterable[Tensor]) -> Tensor:
    most = [W[rows].abs().amax(dim=0) for W in parts for rows in row_chunks(*W.shape)]
    return torch.stack(most).amax(dim=0)


def settle(weights: Sequence[tuple[EightBit | None, Weight]]) -> None:
    """Compute what is kept of calibrated weights once the pass that calibrated them has ended, and move their channel
    scales: kept between activations, small tensors would part the memory of the next step's."""
    moved: dict[Tensor, Tensor] = {}
    for eight_bit, weight in weights:
        if eight_bit is not None and eight_bit.channel is not None:
            if eight_bit.channel not in moved:
                moved[eight_bit.channel] = eight_bit.channel.clone()
            eight_bit.channel = moved[eight_bit.channel]
            eight_bit.scales(weight)


def channel_scales(of_rows: Tensor, of_weight: Tensor) -> Tensor:
    """``sqrt(max |x_k| / max |W_k|)`` from the two maxima (K,)."""
    of_rows, of_weight = (most.clamp(min=_TINY + _LEAST_PART * most.mean()) for most in (of_rows, of_weight))
    return (of_rows / of_weight).sqrt()


def quantize_rows(x: Tensor, factor: Tensor, largest: int = LARGEST, *, dither: bool = False) -> tuple[Tensor, Tensor]:
    """Integers (T, K) = round(x factor / scale), scale = max |x factor| / largest, (T,). ``dither``: see `noise`."""
    z = x.float() * factor
    most = z.abs().amax(dim=1)
    inverse = torch.where(most < _TINY, 0.0, largest / most)
    z = z * inverse[:, None]
    rounded = (z + noise(z.shape[0], z.shape[1], z.device) if dither else z).round()
    return rounded.to(_dtype_of(largest)), torch.where(most < _TINY, 0.0, most / largest)


def noise(T: int, K: int, device: torch.device | None = None) -> Tensor:
    """What is added to dithered rows before they are rounded: (T, K) of a Weyl sequence, between -1/2 and 1/2. Small
    numbers beside a large one then keep their sum, as some are rounded up; all would be 0 otherwise."""
    # The low 32 bits, whose sum wraps around.
    t, k = ((torch.arange(n, device=device) * factor).int() for n, factor in ((T, 2246822519), (K, 2654435769)))
    return (t[:, None] + k >> 20 & 0xFFF).float() / 4096 + (0.5 / 4096 - 0.5)


def quantize_weight(W: Tensor, scales: Scales) -> Tensor:
    """W_q, integers (N, K)."""
    if scales.rounded is not None:
        return scales.rounded
    # The scales of a 4-bit weight are those of W in bfloat16: in float32 the largest element may round to 128.
    q = (W.float() * scales.channel * scales.per_row[:, None]).round()
    return q.clamp_(-scales.largest, scales.largest).to(_dtype_of(scales.largest))


def _rounded(W: Tensor, scales: Scales) -> Tensor:
    """W_q of a dense W (N, K), by parts of its rows."""
    made = torch.empty_like(W, dtype=torch.int8)
    for rows in row_chunks(*W.shape):
        made[rows] = quantize_weight(W[rows], dataclasses.replace(scales, per_row=scales.per_row[rows]))
    return made


def _dtype_of(largest: int) -> torch.dtype:
    return torch.int8 if largest <= LARGEST else torch.int16


def product(x: Tensor, W: Tensor, scales: Scales) -> Tensor:
    """``x W^T`` in float32: (T, N)."""
    q, a = quantize_rows(x, scales.per_channel, scales.largest)
    return integer_product(q, quantize_weight(W, scales).T) * (a[:, None] * scales.row)


def input_grad(dz: Tensor, W: Tensor, scales: Scales, gain: Tensor | None = None) -> Tensor:
    """``(dz gain) W`` in float32, of dithered rows: dz (T, N) -> (T, K)."""
    q, b = quantize_rows(dz, scales.row if gain is None else scales.row * gain, scales.largest, dither=True)
    return integer_product(q, quantize_weight(W, scales)) * (b[:, None] * scales.per_channel)


def error_of_rows(found: Tensor, exact: Tensor) -> float:
    """The norm of the difference beside that of the exact row, as the median over rows (T, N)."""
    differences = (found.float() - exact.float()).norm(dim=1)
    return float((differences / exact.float().norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)).median())


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """``a b`` of matrices of integers as float32, from exact sums."""
    # cuBLAS takes more than 16 rows and multiples of 8.
    is_odd = a.is_cuda and (a.shape[0] <= 16 or any(size % 8 for size in (*a.shape, b.shape[1])))
    if is_odd or a.dtype is not torch.int8 or not torch_is_exact():
        return (a.double() @ b.double()).float()
    return int_mm(a, b).float()


@functools.cache
def torch_is_exact() -> bool:
    """Whether torch's products of int8 are exact: on CPUs without VNNI they saturate in 16 bits."""
    ones = torch.full((64, 64), LARGEST, dtype=torch.int8)
    return bool((int_mm(ones, ones) == 64 * LARGEST**2).all())

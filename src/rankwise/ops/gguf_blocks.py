"""The blocks of files in plain PyTorch: the specification of the native decoder, equal to the gguf package's
dequantization bit for bit, and of MXFP4 to transformers'.

A row of a weight is a sequence of blocks of 32 or 256 elements. A block holds float16 numbers d and least, for 256
elements also integers s, t for parts of 16 or 32, and the elements' integers q:

    w = d (q - middle)       Q4_0, Q5_0, Q8_0          w = d q + least            Q4_1, Q5_1
    w = d s (q - 32)         Q6_K                      w = d s q - least t        Q4_K, Q5_K

in float32, each operation rounded. MXFP4, as gpt-oss' files have it, is w = q 2^(e - 127) with q in E2M1 and the
exponents e of all blocks in a tensor of their own. Legend: B = blocks. Readers take uint8 (B, bytes of a block).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rankwise.constants import MXFP4


@dataclasses.dataclass(frozen=True)
class BlockType:
    """``number``: ggml's. ``halves``: where a block's float16 numbers begin. ``read``: (B, bytes) -> float32 (B,
    elements)."""

    number: int
    elements: int
    bytes: int
    halves: tuple[int, ...]
    read: Callable[[Tensor], Tensor]

    def row_bytes(self, K: int) -> int:
        return K // self.elements * self.bytes


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 number at byte ``at``: float32 (B, 1)."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def _nibbles(codes: Tensor) -> Tensor:
    """Low halves of the bytes (..., n), then their high halves: (..., 2 n)."""
    return torch.cat([codes & 15, codes >> 4], dim=-1)


def _bits(codes: Tensor, shifts: tuple[int, ...], mask: int) -> Tensor:
    """The bits of bytes (..., n) at each shift: (..., shifts, n)."""
    return torch.stack([codes >> shift & mask for shift in shifts], dim=-2)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """16 times bit i of the four bytes from ``at`` on: (B, 32)."""
    return _bits(blocks[:, at : at + 4, None], tuple(range(8)), 1).flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 2:]).float() - 8)


def _q4_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * _nibbles(blocks[:, 4:]).float() + _half(blocks, 2)


def _q5_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * ((_nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)).float() - 16)


def _q5_1(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * (_nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)).float() + _half(blocks, 2)


def _q8_0(blocks: Tensor) -> Tensor:
    return _half(blocks, 0) * blocks[:, 2:].contiguous().view(torch.int8).float()


def _of_parts(blocks: Tensor, q: Tensor) -> Tensor:
    """``d s q - least t`` of q (B, 8, 32); s and t have six bits each, in the twelve bytes from 4 on."""
    first, second, third = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    s = torch.cat([first & 63, (third & 15) | (first >> 2 & 48)], dim=1)
    t = torch.cat([second & 63, (third >> 4) | (second >> 2 & 48)], dim=1)
    scale, least = _half(blocks, 0) * s.float(), _half(blocks, 2) * t.float()
    return (scale[:, :, None] * q.float() - least[:, :, None]).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    return _of_parts(blocks, _nibbles(blocks[:, 16:].view(-1, 4, 32)).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).view(-1, 8, 32)
    return _of_parts(blocks, low | _bits(blocks[:, 16:48], tuple(range(8)), 1) << 4)


def _q6_k(blocks: Tensor) -> Tensor:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).view(-1, 16, 16)
    high = _bits(blocks[:, 128:192].reshape(-1, 2, 32), (0, 2, 4, 6), 3).view(-1, 16, 16)
    scale = _half(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (scale[:, :, None] * ((low | high << 4).float() - 32)).flatten(1)


_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def _mxfp4(blocks: Tensor) -> Tensor:
    """q, of which byte i holds elements 2 i, in its low half, and 2 i + 1."""
    # Without a negative zero, as the native decoder's integers.
    values = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=blocks.device) + 0
    return values[torch.stack([blocks & 15, blocks >> 4], dim=2).flatten(1).int()]


# {ggml's name: type}. The names are in capitals; `rankwise.ops.packed_weight` has a q4_0 of its own.
GGUF_TYPES = {
    "Q4_0": BlockType(2, 32, 18, (0,), _q4_0),
    "Q4_1": BlockType(3, 32, 20, (0, 2), _q4_1),
    "Q5_0": BlockType(6, 32, 22, (0,), _q5_0),
    "Q5_1": BlockType(7, 32, 24, (0, 2), _q5_1),
    "Q8_0": BlockType(8, 32, 34, (0,), _q8_0),
    "Q4_K": BlockType(12, 256, 144, (0, 2), _q4_k),
    "Q5_K": BlockType(13, 256, 176, (0, 2), _q5_k),
    "Q6_K": BlockType(14, 256, 210, (208,), _q6_k),
}
BLOCK_TYPES = {**GGUF_TYPES, MXFP4: BlockType(39, 32, 16, (), _mxfp4)}
# The largest exponent whose weights, up to 6 of its powers, are finite.
LARGEST_EXPONENT = 252

# Blocks that are decoded at once.
_CHUNK = 1 << 13


def decode(
    rows: Tensor, kind: str, order: Tensor | None, dtype: torch.dtype, exponents: Tensor | None = None
) -> Tensor:
    """The weight (N, K) in ``dtype`` of stored rows (N', bytes), uint8; row n lies at ``order[n]``, or at n.

    ``exponents``: of MXFP4, those of all blocks, uint8.
    """
    found = BLOCK_TYPES[kind]
    rows = rows if order is None else rows[order.long()]
    blocks = rows.reshape(-1, found.bytes)
    out = torch.empty((len(blocks), found.elements), dtype=dtype, device=rows.device)
    for start in range(0, len(blocks), _CHUNK):
        w = found.read(blocks[start : start + _CHUNK])
        if exponents is not None:
            w = w * torch.exp2(exponents[start : start + _CHUNK, None].float() - 127)
        out[start : start + _CHUNK] = w
    return out.view(len(rows), -1)


def is_finite(rows: Tensor, kind: str) -> bool:
    """Whether the float16 numbers of all blocks are finite."""
    found = BLOCK_TYPES[kind]
    blocks = rows.view(-1, found.bytes)
    return all(bool(_half(blocks, at).isfinite().all()) for at in found.halves)

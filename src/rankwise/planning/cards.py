"""Accelerators: nominal memory, bandwidth and peak matrix throughput, from their vendors' data sheets.

Throughput is dense bfloat16 (float16 where the card has no bfloat16) with float32 accumulation, without sparsity. On
GeForce cards that is twice the float32 figure of the data sheet (the architecture white papers of GA102, AD102 and
GB202), on workstation cards of the same chips four times.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

MemoryKind = Literal["gddr", "gddr-ecc", "hbm", "unified"]

# Share of the nominal memory that is available to torch, before the context of a process.
#
# From the totals in public out-of-memory reports: RTX 4090 23.52 to 23.65 of 24 GiB, RTX 5090 31.36 of 32; A10 21.99 of
# 24 and L40 44.40 of 48 (ECC takes a sixteenth); A100 39.39 of 40. Apple's Metal recommends three quarters at most.
VISIBLE_SHARE: dict[MemoryKind, float] = {"gddr": 0.98, "gddr-ecc": 0.91, "hbm": 0.985, "unified": 0.75}


@dataclasses.dataclass(frozen=True)
class Card:
    """One accelerator, as it is sold."""

    name: str
    # Nominal.
    memory_gib: float
    kind: MemoryKind
    gigabytes_per_second: float
    # None where the vendor publishes no figure.
    teraflops: float | None
    source: str
    has_bfloat16: bool = True
    # Approximate ratio of the float32 peak to the 16-bit peak: the smallest of the card's group.
    float32_share: float = 1 / 2

    @property
    def usable_bytes(self) -> int:
        """The approximate total memory that torch reports."""
        return int(self.memory_gib * 2**30 * VISIBLE_SHARE[self.kind])


_AMPERE = "NVIDIA, GA102 and GA104 white papers, GeForce RTX 30 specifications"
_ADA = "NVIDIA, Ada (AD102) white paper, GeForce RTX 40 specifications"
_BLACKWELL = "NVIDIA, RTX Blackwell white paper, GeForce RTX 50 specifications"
_TURING = "NVIDIA, Turing white paper"
_WORKSTATION = "NVIDIA, data sheet of the RTX workstation card"
_DATACENTER = "NVIDIA, data sheet of the data-center card"
_AMD = "AMD, data sheet of the accelerator"
_APPLE = "Apple, technical specifications"


def _cards(
    kind: MemoryKind, source: str, *rows: tuple[str, float, float, float], bf16: bool = True, float32: float = 1 / 2
) -> tuple[Card, ...]:
    return tuple(
        Card(name, memory, kind, bandwidth, peak, source, bf16, float32) for name, memory, bandwidth, peak in rows
    )


def _apple(chip: str, sizes: tuple[int, ...], bandwidth: float, teraflops: float | None) -> tuple[Card, ...]:
    # Apple's GPUs compute float32 as fast as 16 bits.
    return tuple(Card(f"{chip} {size}GB", size, "unified", bandwidth, teraflops, _APPLE, True, 1.0) for size in sizes)


CARDS: tuple[Card, ...] = (
    # (name, GiB, GB/s, TFLOP/s)
    *_cards(
        "gddr",
        _TURING,
        ("RTX 2080 Ti", 11, 616, 53.8),
        ("TITAN RTX", 24, 672, 130.5),
        bf16=False,
        float32=1 / 8,
    ),
    *_cards(
        "gddr",
        _AMPERE,
        ("RTX 3050", 8, 224, 18.2),
        ("RTX 3060", 12, 360, 25.5),
        ("RTX 3060 Ti", 8, 448, 32.4),
        ("RTX 3070", 8, 448, 40.6),
        ("RTX 3070 Ti", 8, 608, 43.5),
        ("RTX 3080 10GB", 10, 760, 59.5),
        ("RTX 3080 12GB", 12, 912, 61.3),
        ("RTX 3080 Ti", 12, 912, 68.2),
        ("RTX 3090", 24, 936, 71.2),
        ("RTX 3090 Ti", 24, 1008, 80.0),
    ),
    *_cards(
        "gddr",
        _ADA,
        ("RTX 4060", 8, 272, 30.2),
        ("RTX 4060 Ti 8GB", 8, 288, 44.1),
        ("RTX 4060 Ti 16GB", 16, 288, 44.1),
        ("RTX 4070", 12, 504, 58.3),
        ("RTX 4070 Super", 12, 504, 71.0),
        ("RTX 4070 Ti", 12, 504, 80.2),
        ("RTX 4070 Ti Super", 16, 672, 88.2),
        ("RTX 4080", 16, 717, 97.5),
        ("RTX 4080 Super", 16, 736, 104.4),
        ("RTX 4090", 24, 1008, 165.2),
        ("RTX 4060 Laptop", 8, 256, 23.2),
        ("RTX 4070 Laptop", 8, 256, 31.2),
        ("RTX 4080 Laptop", 12, 432, 49.4),
        ("RTX 4090 Laptop", 16, 576, 66.0),
    ),
    *_cards(
        "gddr",
        _BLACKWELL,
        ("RTX 5060", 8, 448, 38.4),
        ("RTX 5060 Ti 8GB", 8, 448, 47.4),
        ("RTX 5060 Ti 16GB", 16, 448, 47.4),
        ("RTX 5070", 12, 672, 61.7),
        ("RTX 5070 Ti", 16, 896, 87.9),
        ("RTX 5080", 16, 960, 112.6),
        ("RTX 5090", 32, 1792, 209.5),
        ("RTX 5090 Laptop", 24, 896, 63.5),
    ),
    *_cards(
        "gddr",
        _WORKSTATION,
        ("RTX A2000 12GB", 12, 288, 31.9),
        ("RTX A4000", 16, 448, 76.7),
        ("RTX A4500", 20, 640, 94.6),
        ("RTX A5000", 24, 768, 111.1),
        ("RTX A6000", 48, 768, 154.8),
        ("RTX 2000 Ada", 16, 224, 48.0),
        ("RTX 4000 Ada", 20, 360, 106.9),
        ("RTX 4500 Ada", 24, 432, 158.5),
        ("RTX 5000 Ada", 32, 576, 261.1),
        ("RTX 6000 Ada", 48, 960, 364.2),
        ("RTX PRO 6000 Blackwell", 96, 1792, 503.8),
        float32=1 / 4,
    ),
    *_cards("hbm", _DATACENTER, ("P100", 16, 732, 18.7), bf16=False),
    *_cards("gddr-ecc", _DATACENTER, ("T4", 16, 320, 65.0), bf16=False, float32=1 / 8),
    *_cards(
        "hbm",
        _DATACENTER,
        ("V100 16GB", 16, 900, 112.0),
        ("V100 32GB", 32, 900, 112.0),
        bf16=False,
        float32=1 / 8,
    ),
    *_cards(
        "gddr-ecc",
        _DATACENTER,
        ("A10", 24, 600, 125.0),
        ("A10G", 24, 600, 70.0),
        ("A40", 48, 696, 149.7),
        ("L4", 24, 300, 121.0),
        ("L40", 48, 864, 181.0),
        ("L40S", 48, 864, 362.0),
        float32=1 / 4,
    ),
    *_cards(
        "hbm",
        _DATACENTER,
        ("A30", 24, 933, 165.0),
        ("A100 40GB", 40, 1555, 312.0),
        ("A100 80GB PCIe", 80, 1935, 312.0),
        ("A100 80GB SXM", 80, 2039, 312.0),
        ("H100 PCIe", 80, 2000, 756.0),
        ("H100 SXM", 80, 3350, 989.0),
        ("H100 NVL", 94, 3900, 835.0),
        ("GH200", 96, 4000, 989.0),
        ("H20", 96, 4000, 148.0),
        ("H200", 141, 4800, 989.0),
        float32=1 / 16,
    ),
    *_cards("hbm", _DATACENTER, ("B200", 180, 8000, 2250.0), float32=1 / 30),
    *_cards("unified", "NVIDIA, DGX Spark data sheet", ("DGX Spark", 128, 273, 125.0), float32=1 / 4),
    *_cards(
        "hbm",
        _AMD,
        ("MI210", 64, 1638, 181.0),
        ("MI250X one die", 64, 1638, 191.5),
        ("MI300X", 192, 5300, 1307.0),
        ("MI325X", 256, 6000, 1307.0),
        float32=1 / 8,
    ),
    *_cards("gddr", "AMD, Radeon specifications", ("RX 7900 XTX", 24, 960, 122.8)),
    *_apple("Apple M1", (8, 16), 68, 2.6),
    *_apple("Apple M1 Pro", (16, 32), 200, 5.2),
    *_apple("Apple M1 Max", (32, 64), 400, 10.4),
    *_apple("Apple M1 Ultra", (64, 128), 800, 20.8),
    *_apple("Apple M2", (8, 16, 24), 100, 3.6),
    *_apple("Apple M2 Pro", (16, 32), 200, 6.8),
    *_apple("Apple M2 Max", (32, 64, 96), 400, 13.6),
    *_apple("Apple M2 Ultra", (64, 128, 192), 800, 27.2),
    *_apple("Apple M3", (8, 16, 24), 100, None),
    *_apple("Apple M3 Pro", (18, 36), 150, None),
    # The variant with fewer cores and a narrower bus.
    *_apple("Apple M3 Max", (36, 96), 300, None),
    *_apple("Apple M3 Max", (48, 64, 128), 400, None),
    *_apple("Apple M3 Ultra", (96, 256, 512), 819, None),
    *_apple("Apple M4", (16, 24, 32), 120, None),
    *_apple("Apple M4 Pro", (24, 48, 64), 273, None),
    *_apple("Apple M4 Max", (36,), 410, None),
    *_apple("Apple M4 Max", (48, 64, 128), 546, None),
)

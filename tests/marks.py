"""Marks that several files use."""

from __future__ import annotations

import pytest

from rankwise.ops import selection
from rankwise.ops.cpu import native, products

# The instruction sets of the native library that this processor has, from slow to fast.
LEVELS = native.usable_levels() if native.obstacle() is None else ()

at_every_level = pytest.mark.usefixtures("level")
# For tables, whose cases take turns.
at_some_level = pytest.mark.usefixtures("some_level")

needs_products = pytest.mark.skipif(
    not (selection.native_on_cpu() and products.available()), reason="this CPU and build have no sums of products"
)

needs_avx2 = pytest.mark.skipif("avx2" not in LEVELS, reason="this CPU and build have no AVX2")

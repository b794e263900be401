"""Marks that several files use."""

from __future__ import annotations

import pytest

from rankwise.ops import selection
from rankwise.ops.cpu import products

needs_products = pytest.mark.skipif(
    not (selection.native_on_cpu() and products.available()), reason="this CPU and build have no sums of products"
)

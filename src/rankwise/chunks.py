"""The number of rows in a chunk of the loss and in a batch of answers. Also for the plan: imports no torch."""

from __future__ import annotations

# Logits of a chunk on a CPU: few enough to stay near its caches, enough rows for an efficient product.
CHUNK_BYTES = 32 << 20
# Rows of such a chunk at least.
SMALLEST_CHUNK = 16
# On a card a chunk holds whole tiles of a product, enough of them for all its processors; each chunk reads the weight
# twice. By memory as many as fit, within these bounds.
CARD_CHUNK_BYTES = 512 << 20
CARD_TILE = 256
CARD_ROWS = (1024, 2048)
# Answers that are written together at the most.
WRITTEN_ROWS = {"cpu": 64, "cuda": 256, "mps": 64}
# Their keys and values on a CPU; on a card a quarter of what is free.
CACHE_BYTES = 1 << 30


def chunk_rows(vocabulary: int, element_size: int, *, on_card: bool) -> int:
    """The number of rows whose logits make a chunk."""
    if not on_card:
        return max(SMALLEST_CHUNK, CHUNK_BYTES // (vocabulary * element_size))
    least, most = CARD_ROWS
    return min(most, max(least, CARD_CHUNK_BYTES // (vocabulary * element_size) // CARD_TILE * CARD_TILE))

"""Constants that several packages share, and the number of rows in a chunk of the loss. Imports nothing."""

from __future__ import annotations

# The label of a position that the loss ignores, as in PyTorch and transformers.
IGNORED = -100
# Admitted block sizes: the number of weights that share one 4-bit scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# The quant_type of a base in its GGUF file's own bits.
FILE_BITS = "file"
# The quant_type of experts as gpt-oss' files hold them, and transformers' name of the format.
MXFP4 = "mxfp4"
# Number of first-level scales that share one second-level scale (QLoRA, section 3).
NESTED_BLOCK = 256
# The largest head size that torch's flash attention accepts.
FLASH_WIDTH = 256
# Number of 16-bit values in 16 bytes. On a GPU, ranks are padded to a multiple of it.
ALIGNED = 8
# The native library reuses the memory of dense weights between these sizes (bytes).
KEPT_BYTES = (1 << 20, 256 << 20)
# The chat template in the folder of a run or an exported adapter.
TEMPLATE_FILE = "chat_template.jinja"

# Tokens of a pass up to which frozen weights in 8 bits are rounded once where the plan has room: rounding them in every
# pass takes 10 % of a product of 512 rows and 5.5 % of 1,024 (Sapphire Rapids).
MOST_ROUNDED_ONCE = 1024
# A run with 8-bit products of so many steps or more takes this part of them, its last, in the base's dtype. Losses are
# equal after 60 steps; after 500, demo's were 2 to 2.6 % higher without this and 0.3 to 1.1 % with it.
LONG_RUN, EXACT_PART = 100, 0.25

# Bytes of a chunk's logits on a CPU: few enough to stay near its caches, enough rows for an efficient product.
CHUNK_BYTES = 32 << 20
# The least number of rows of a chunk on a CPU.
SMALLEST_CHUNK = 16
# On a GPU a chunk is a whole number of matrix-product tiles, enough to occupy every multiprocessor. Each chunk reads
# the head's weight twice, so a chunk takes as many rows as fit into these bytes, within the row bounds below.
CARD_CHUNK_BYTES = 512 << 20
CARD_TILE = 256
CARD_ROWS = (1024, 2048)
# The largest number of answers generated together.
WRITTEN_ROWS = {"cpu": 64, "cuda": 256, "mps": 64}
# Bytes of their key-value cache on a CPU. On a GPU the limit is a quarter of the free memory.
CACHE_BYTES = 1 << 30


def chunk_rows(vocabulary: int, element_size: int, *, on_card: bool, width: int = 0) -> int:
    """The number of rows whose logits make a chunk. On a CPU they may take an eighth of a head of this ``width``."""
    if not on_card:
        return max(SMALLEST_CHUNK, CHUNK_BYTES // (vocabulary * element_size), width // 8)
    least, most = CARD_ROWS
    return min(most, max(least, CARD_CHUNK_BYTES // (vocabulary * element_size) // CARD_TILE * CARD_TILE))

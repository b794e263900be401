"""Numbers that several rooms share. Imports nothing."""

from __future__ import annotations

# The label of a position that is not scored, as PyTorch and transformers have it.
IGNORED = -100
# Weights that share one 4-bit scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
# First-level scales that share one second-level scale (QLoRA, section 3).
NESTED_BLOCK = 256
# Columns of a head that torch's flash attention takes at the most.
FLASH_WIDTH = 256
# Columns of 16 bits that lie in 16 bytes: to a multiple of it a rank is filled up on a card.
ALIGNED = 8
# Least and most bytes of a dense weight whose memory the native library keeps for the next one.
KEPT_BYTES = (1 << 20, 256 << 20)

"""Constants that several packages share. Imports nothing."""

from __future__ import annotations

# The label of a position that the loss ignores, as in PyTorch and transformers.
IGNORED = -100
# Admitted block sizes: the number of weights that share one 4-bit scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
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

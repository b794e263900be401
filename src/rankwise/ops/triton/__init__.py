"""The 4-bit kernels for CUDA tensors. `four_bit` calls them; one family per file; `tile` holds what they share."""

"""The kernels for CUDA tensors, one family per file; `tile` holds what they share."""

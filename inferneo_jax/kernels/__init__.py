"""Attention over the paged cache in kernels of one platform each, behind ``PagedAttention``."""

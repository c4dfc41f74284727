"""Attention kernels that read KV pages in place, one file per kind of accelerator."""

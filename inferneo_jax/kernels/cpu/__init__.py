"""Kernels for CPUs: C++ that is compiled on first use and called by XLA."""

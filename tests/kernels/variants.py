"""The ways in which the CPU's kernels are compiled."""

from inferneo_jax.kernels.cpu.build import Variant
from inferneo_jax.platform import cpu

VARIANTS: tuple[Variant, ...] = ("native", "avx2", "portable")


def supported(variant: Variant) -> bool:
    """Whether this machine can run it."""
    return variant != "avx2" or "avx2" in cpu.description()

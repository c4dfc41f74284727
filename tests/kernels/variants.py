"""The ways in which the CPU's kernels are compiled."""

from inferneo_jax.kernels.cpu.build import Variant
from inferneo_jax.platform.devices import cpu_description

VARIANTS: tuple[Variant, ...] = ("native", "avx2", "portable")


def supported(variant: Variant) -> bool:
    """Whether this machine can run it."""
    return variant != "avx2" or "avx2" in cpu_description()

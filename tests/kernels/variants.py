"""The ways in which the CPU's kernels are compiled."""

from pathlib import Path

from inferneo_jax.kernels.cpu.build import Variant

VARIANTS: tuple[Variant, ...] = ("native", "avx2", "portable")


def supported(variant: Variant) -> bool:
    flags = Path("/proc/cpuinfo")
    has_avx2 = flags.exists() and "avx2" in flags.read_text(encoding="utf-8", errors="replace")
    return variant != "avx2" or has_avx2

"""Kernels of each kind of device: attention that reads KV pages in place, and CPUs' products."""

from typing import Any, Literal

from jax.sharding import Mesh

from inferneo_jax.config import EngineConfig
from inferneo_jax.errors import ConfigError
from inferneo_jax.layers.cache import PagedAttention
from inferneo_jax.layers.segments import SegmentAttention
from inferneo_jax.runner.backends import compute_capability, has_products

Kernels = Literal["auto", "xla", "native"]

_TRITON_SINCE = (8, 0)
"""Pallas compiles for GPUs of this compute capability, Ampere's, and later ones."""


def attention_for(
    device: Any, kernels: Kernels, *, head_dim: int, page_len: int
) -> type[PagedAttention]:
    """The attention that suits a device, heads and pages.

    ``xla`` is the reference, which runs on any; ``native`` is made for the device, and ``auto`` is
    native where there is such a one.

    Raises:
        ConfigError: native is asked for, and there is none.
    """
    if kernels == "xla":
        return PagedAttention
    if device.platform == "tpu":
        from inferneo_jax.kernels.tpu.attention import TpuPagedAttention

        return TpuPagedAttention
    if device.platform in ("gpu", "cuda") and compute_capability(device) >= _TRITON_SINCE:
        from inferneo_jax.kernels.gpu.attention import GpuPagedAttention

        return GpuPagedAttention
    missing = f"there are none for {device.device_kind}"
    if device.platform == "cpu":
        from inferneo_jax.kernels.cpu.attention import BLOCK, CpuPagedAttention
        from inferneo_jax.kernels.cpu.build import library

        if not CpuPagedAttention.fits(head_dim, page_len):
            missing = (
                f"head_dim ({head_dim}) and page_len ({page_len}) are not multiples of {BLOCK}"
            )
        elif library():
            return CpuPagedAttention
        else:
            missing = "they could not be compiled, as the log says"
    if kernels == "native":
        raise ConfigError(f"kernels is native, and {missing}; set auto or xla")
    return PagedAttention


def segment_attention_for(config: EngineConfig, mesh: Mesh) -> SegmentAttention:
    """Attention within segments: native on one CPU that has kernels, else the reference."""
    if not has_products(config, mesh):
        return SegmentAttention()
    from inferneo_jax.kernels.cpu.dense import CpuSegmentAttention

    return CpuSegmentAttention()

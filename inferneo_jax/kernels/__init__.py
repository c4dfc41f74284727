"""Attention kernels that read KV pages in place, one file per kind of accelerator."""

from typing import Any, Literal

from inferneo_jax.cache import PagedAttention
from inferneo_jax.errors import ConfigError
from inferneo_jax.numerics import compute_capability

Kernels = Literal["auto", "xla", "native"]

_TRITON_SINCE = (8, 0)
"""Pallas compiles for GPUs of this compute capability, Ampere's, and later ones."""


def attention_for(device: Any, kernels: Kernels) -> type[PagedAttention]:
    """The attention that suits a device.

    ``xla`` is the reference, which runs on any; ``native`` is made for the device, and ``auto`` is
    native where there is such a one.

    Raises:
        ConfigError: native is asked for, and there is none.
    """
    if kernels == "xla":
        return PagedAttention
    if device.platform == "tpu":
        from inferneo_jax.kernels.tpu import TpuPagedAttention

        return TpuPagedAttention
    if device.platform in ("gpu", "cuda") and compute_capability(device) >= _TRITON_SINCE:
        from inferneo_jax.kernels.gpu import GpuPagedAttention

        return GpuPagedAttention
    if kernels == "native":
        raise ConfigError(
            f"kernels is native, and there are none for {device.device_kind}; set auto or xla"
        )
    return PagedAttention

"""Attention kernels that read KV pages in place, one file per kind of accelerator."""

from typing import Any, Literal

from inferneo_jax.cache import PagedAttention

Kernels = Literal["auto", "xla"]

_TRITON_SINCE = (8, 0)
"""Pallas compiles for GPUs of this compute capability, Ampere's, and later ones."""


def attention_for(device: Any, kernels: Kernels) -> type[PagedAttention]:
    """The attention that suits a device; ``xla`` is the reference, which runs on any."""
    if kernels == "auto" and device.platform == "tpu":
        from inferneo_jax.kernels.tpu import TpuPagedAttention

        return TpuPagedAttention
    if kernels == "auto" and device.platform in ("gpu", "cuda") and _runs_triton(device):
        from inferneo_jax.kernels.gpu import GpuPagedAttention

        return GpuPagedAttention
    return PagedAttention


def _runs_triton(device: Any) -> bool:
    capability = str(getattr(device, "compute_capability", ""))
    return tuple(int(n) for n in capability.split(".") if n.isdecimal()) >= _TRITON_SINCE

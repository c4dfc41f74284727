"""A device's own versions of layers, chosen here. The reference runs where a device has none."""

from collections.abc import Mapping
from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from inferneo_jax.errors import ConfigError
from inferneo_jax.layers.blocks import BlockPart
from inferneo_jax.layers.cache import PagedAttention
from inferneo_jax.layers.quantization import QuantizationConfig, Unquantized
from inferneo_jax.layers.segments import SegmentAttention
from inferneo_jax.platform.devices import compute_capability, multiplies

Kernels = Literal["auto", "xla", "native"]
"""``xla`` is the reference; ``native`` is made for the device; ``auto`` is native if available."""

_TRITON_SINCE = (8, 0)
"""Pallas compiles for GPUs of this compute capability, Ampere's, and later ones."""

_HOPPER = 9
"""The compute capability of GPUs with warpgroup products, which later ones lack."""


def attention_for(
    device: Any, kernels: Kernels, *, head_dim: int, page_len: int, fp8: bool = False
) -> type[PagedAttention]:
    """Attention over KV pages for a device and these sizes of heads and pages.

    Args:
        device: that it runs on.
        kernels: as configured.
        head_dim: numbers of a head.
        page_len: positions of a page.
        fp8: whether keys and values are in FP8.

    Raises:
        ConfigError: ``kernels`` is ``native``, and there are none.
    """
    if kernels == "xla":
        return PagedAttention
    if device.platform == "tpu":
        from inferneo_jax.kernels.tpu.attention import TpuPagedAttention

        return TpuPagedAttention
    missing = f"there are none for {device.device_kind}"
    if device.platform in ("gpu", "cuda") and compute_capability(device) >= _TRITON_SINCE:
        from inferneo_jax.kernels.gpu.attention import GpuPagedAttention, HopperPagedAttention

        if compute_capability(device)[0] == _HOPPER:
            return HopperPagedAttention
        if not fp8 or multiplies(device, "fp8"):
            return GpuPagedAttention
        missing = f"kv_dtype is fp8, which {device.device_kind} does not convert"
    if device.platform == "cpu":
        from inferneo_jax.kernels.cpu.attention import BLOCK, CpuPagedAttention
        from inferneo_jax.kernels.cpu.build import library

        if not CpuPagedAttention.fits(head_dim, page_len):
            missing = (
                f"head_dim ({head_dim}) and page_len ({page_len}) are not multiples of {BLOCK}"
            )
        elif fp8:
            missing = "kv_dtype is fp8, which those for CPUs do not read"
        elif library():
            return CpuPagedAttention
        else:
            missing = "they could not be compiled, as the log says"
    if kernels == "native":
        raise ConfigError(f"kernels is native, and {missing}; set auto or xla")
    return PagedAttention


def segment_attention_for(mesh: Mesh, kernels: Kernels) -> SegmentAttention:
    """Attention within texts for the devices of a mesh."""
    if not _cpu_kernels(mesh, kernels):
        return SegmentAttention()
    from inferneo_jax.kernels.cpu.dense import CpuSegmentAttention

    return CpuSegmentAttention()


def block_quantization(
    mesh: Mesh, kernels: Kernels, dtype: jnp.dtype, formats: Mapping[str, tuple[BlockPart, ...]]
) -> QuantizationConfig | None:
    """Matrices in blocks of integers; None if the mesh has no kernels for them.

    Args:
        mesh: of the devices.
        kernels: as configured.
        dtype: of what is not quantized.
        formats: of the matrices that are stored in blocks, by the name of the weight. They are
            kept as they are if there are kernels for their formats. All others are rounded to
            blocks of 8 bits.
    """
    if not _cpu_kernels(mesh, kernels):
        return None
    from inferneo_jax.kernels.cpu.linear import FORMATS, BlockQuantized

    rounded = BlockQuantized(dtype)
    return QuantizationConfig(rounded, rounded).excepting(
        {
            name: BlockQuantized(dtype, parts)
            for name, parts in formats.items()
            if all(part.format in FORMATS for part in parts)
        }
    )


def packed_quantization(
    mesh: Mesh, kernels: Kernels, dtype: jnp.dtype
) -> QuantizationConfig | None:
    """Matrices of ``dtype`` laid out for kernels with epilogues; None if the mesh has none."""
    if not _cpu_kernels(mesh, kernels):
        return None
    from inferneo_jax.kernels.cpu.dense import Packed

    return QuantizationConfig(Packed(dtype), Unquantized(dtype))


def _cpu_kernels(mesh: Mesh, kernels: Kernels) -> bool:
    """Whether ``kernels/cpu`` can run whole layers: its matrices lie on one device only."""
    device = mesh.devices.flat[0]
    if device.platform != "cpu" or mesh.devices.size > 1 or kernels == "xla":
        return False
    from inferneo_jax.kernels.cpu.build import library

    return library() is not None

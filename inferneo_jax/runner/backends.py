"""What numbers a model is kept and computed in: what ``auto`` means, on which device."""

from typing import Any, Literal

import jax.numpy as jnp
from jax.sharding import Mesh

from inferneo_jax.config import EngineConfig
from inferneo_jax.layers.quantization import QuantizationConfig, Unquantized
from inferneo_jax.platform import cpu
from inferneo_jax.sharding import mesh as meshes

_OLD_TPUS = ("TPU v2", "TPU v3")
_INT8_SINCE = (7, 5)
"""GPUs of this compute capability, Turing's, and later ones multiply int8."""


def dtype_for(config: EngineConfig, device: Any) -> jnp.dtype:
    """Of weights and products; auto is bfloat16 where the hardware multiplies it."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    native = device.platform != "cpu" or cpu.multiplies_bfloat16()
    return jnp.dtype("bfloat16" if native else "float32")


def cache_dtype_for(config: EngineConfig, device: Any, *, native: bool) -> jnp.dtype:
    """Of keys and values; auto is bfloat16, which halves their memory, where that is no loss.

    XLA:CPU writes to a bfloat16 array by copying it whole; ``native`` kernels do not.
    """
    if config.kv_dtype != "auto":
        return jnp.dtype(config.kv_dtype)
    wide = config.dtype == "float32" or (device.platform == "cpu" and not native)
    return jnp.dtype("float32" if wide else "bfloat16")


def quantization_for(
    config: EngineConfig, mesh: Mesh, bits: Literal[4, 8] = 8
) -> QuantizationConfig:
    """How matrices are kept.

    Auto quantizes nothing, but for a CPU that has native kernels: there it is blocks of integers,
    several times faster. A dtype that is asked for is what matrices are kept in.

    Args:
        config: of the engine.
        mesh: of the devices.
        bits: 4 to keep the layers' matrices in that many where blocks are chosen; such methods
            hold only what was quantized so before, and raise EncodingError for others.
    """
    device = mesh.devices.flat[0]
    dtype = dtype_for(config, device)
    if config.quantization == "auto" and config.dtype == "auto" and has_products(config, mesh):
        from inferneo_jax.kernels.cpu.linear import BlockQuantized

        return QuantizationConfig(BlockQuantized(dtype, bits), BlockQuantized(dtype))
    if config.quantization == "int8":
        products: Literal["int8", "float"] = "int8" if _multiplies_int8(device) else "float"
        return QuantizationConfig.int8(dtype, meshes.parts(mesh, "mlp"), products)
    return QuantizationConfig.unquantized(dtype)


def encoder_quantization_for(config: EngineConfig, mesh: Mesh) -> QuantizationConfig:
    """How an encoder's matrices are kept: as they are, for native kernels where a CPU has them.

    Blocks of integers were no faster where a batch is many rows, and their cosines to the float32
    vectors were 0.9985.
    """
    dtype = dtype_for(config, mesh.devices.flat[0])
    if has_products(config, mesh):
        from inferneo_jax.kernels.cpu.dense import Packed

        return QuantizationConfig(Packed(dtype), Unquantized(dtype))
    return QuantizationConfig.unquantized(dtype)


def has_products(config: EngineConfig, mesh: Mesh) -> bool:
    """Whether products can be those of ``kernels/cpu``, which know matrices of one device only."""
    device = mesh.devices.flat[0]
    if device.platform != "cpu" or mesh.devices.size > 1 or config.kernels == "xla":
        return False
    from inferneo_jax.kernels.cpu.build import library

    return library() is not None


def _multiplies_int8(device: Any) -> bool:
    if device.platform == "tpu":
        return device.device_kind not in _OLD_TPUS
    if device.platform in ("gpu", "cuda"):
        return compute_capability(device) >= _INT8_SINCE
    return True


def compute_capability(device: Any) -> tuple[int, ...]:
    """A GPU's, as ``(8, 0)``; empty where it is unknown."""
    capability = str(getattr(device, "compute_capability", ""))
    return tuple(int(n) for n in capability.split(".") if n.isdecimal())

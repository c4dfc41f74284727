"""What a loaded model is made of, and what of its devices' memory is in use."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # who only reads the figures needs no jax
    import jax

    from inferneo_jax.runner.backends import DecoderBackend, EncoderBackend


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelInfo:
    """A loaded model: what it is made of, and its memory.

    Attributes:
        dtype: of products.
        quantization: the formats of the matrices: none, int8, fp8, or those of ggml, such as
            q4_k+q6_k.
        kv_dtype: of keys and values; empty if it keeps none.
        kernels: of its layers: xla, the reference, or native, made for the device.
        mesh: axes and their sizes, as ``data=1,model=8``.
        device: the kind of its devices.
        weight_bytes: that this process's devices hold of its weights.
        cache_bytes: and of its KV cache.
        draft_model: the name of the model that drafts, whose weights and cache are counted too;
            empty if there is none.
    """

    dtype: str
    quantization: str
    kv_dtype: str
    kernels: str
    mesh: str
    device: str
    weight_bytes: int
    cache_bytes: int
    draft_model: str = ""

    @classmethod
    def of(
        cls,
        backend: "DecoderBackend | EncoderBackend",
        weights: Iterable["jax.Array"],
        cache: Iterable["jax.Array"] = (),
    ) -> "ModelInfo":
        """The info of a model whose weights and cache have been placed."""
        mesh = backend.mesh
        return cls(
            dtype=str(backend.quantization.dtype),
            quantization=_formats(backend),
            kv_dtype=backend.kv_dtype,
            kernels="native" if backend.native else "xla",
            mesh=",".join(f"{axis}={size}" for axis, size in mesh.shape.items()),
            device=mesh.devices.flat[0].device_kind,
            weight_bytes=_held(weights),
            cache_bytes=_held(cache),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceMemory:
    """Of one accelerator, in bytes: what is allocated, and what can be."""

    device: str
    used: int
    limit: int


def device_memory(devices: Sequence[Any] | None = None) -> list[DeviceMemory]:
    """Of this process's accelerators, or those given; of CPUs nothing is known."""
    import jax

    found = []
    for device in jax.local_devices() if devices is None else devices:
        # An array on a CPU is the process's own memory, of which its resident size tells.
        stats = device.memory_stats() if device.platform != "cpu" else None
        if stats and "bytes_limit" in stats:
            name = f"{device.platform}:{device.id}"
            used, limit = int(stats["bytes_in_use"]), int(stats["bytes_limit"])
            found.append(DeviceMemory(device=name, used=used, limit=limit))
    return found


def _formats(backend: "DecoderBackend | EncoderBackend") -> str:
    """The formats of the matrices, such as ``q4_k+q6_k``; ``none``: they have the dtype."""
    from inferneo_jax import models

    specs = models.weight_specs(backend.padded, backend.quantization).values()
    names = {name for spec in specs if spec.inputs for name in spec.method.name.split("+")}
    return "+".join(sorted(names - {"none"})) or "none"


def _held(arrays: Iterable["jax.Array"]) -> int:
    return sum(shard.data.nbytes for each in arrays for shard in each.addressable_shards)

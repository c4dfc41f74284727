"""How a model runs on a mesh: every ``auto`` of its configuration is resolved here, once.

What is left to others is what must be measured: the size of the KV cache (``capacity.py``), and
whether verifying drafts pays (``Runner.compile``).

``python -m inferneo_jax.runner.backends`` prints what this machine offers, for ``inferneo doctor``.
It is a program of its own because a broken driver may never return. It prints one JSON object per
line, so that what is known by then is known: the kernels, the accelerator, then the devices.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from inferneo_jax.config import DecoderConfig, EncoderConfig, EngineConfig
from inferneo_jax.kernels import (
    attention_for,
    block_quantization,
    packed_quantization,
    segment_attention_for,
)
from inferneo_jax.kernels.cpu import build
from inferneo_jax.layers.blocks import BlockPart
from inferneo_jax.layers.cache import PagedAttention
from inferneo_jax.layers.quantization import QuantizationConfig
from inferneo_jax.layers.segments import SegmentAttention
from inferneo_jax.platform import devices, flags
from inferneo_jax.platform.memory import free_memory, total_memory
from inferneo_jax.sharding import mesh as meshes
from inferneo_jax.sharding.padding import pad_for_mesh

_DECODE_STEPS = 8
"""Decode steps that an accelerator is given at once, where they are short: the host's work for a
token, and with it that of HTTP, is done for as many at a time."""


@dataclass(frozen=True, kw_only=True)
class DecoderBackend:
    """How a decoder runs on a mesh.

    Attributes:
        model: as the checkpoint describes it.
        padded: the same model with sizes that divide by the mesh.
        mesh: of the devices it runs on.
        quantization: of the weights.
        attention: how the KV cache is stored and read.
    """

    model: DecoderConfig
    padded: DecoderConfig
    mesh: Mesh
    quantization: QuantizationConfig
    attention: PagedAttention

    @property
    def platform(self) -> str:
        """Of the devices, as JAX calls it."""
        return str(self.mesh.devices.flat[0].platform)

    @property
    def native(self) -> bool:
        """Whether attention is made for the device."""
        return type(self.attention) is not PagedAttention

    @property
    def kv_dtype(self) -> str:
        """Of keys and values."""
        return str(self.attention.dtype)


@dataclass(frozen=True, kw_only=True)
class EncoderBackend:
    """How an encoder runs on a mesh.

    Attributes:
        model: as the checkpoint describes it.
        padded: the same model with sizes that divide by the mesh.
        mesh: of the devices it runs on.
        quantization: of the weights.
        attention: within texts.
    """

    model: EncoderConfig
    padded: EncoderConfig
    mesh: Mesh
    quantization: QuantizationConfig
    attention: SegmentAttention

    @property
    def native(self) -> bool:
        """Whether attention is made for the device."""
        return type(self.attention) is not SegmentAttention

    @property
    def kv_dtype(self) -> str:
        """Empty: an encoder keeps no keys and values."""
        return ""


def resolve_decoder(
    model: DecoderConfig,
    config: EngineConfig,
    mesh: Mesh,
    formats: Mapping[str, tuple[BlockPart, ...]],
) -> DecoderBackend:
    """The backend of a decoder.

    Args:
        model: as the checkpoint describes it.
        config: of the engine.
        mesh: of the devices it runs on.
        formats: of the weights that the checkpoint stores in blocks, by name.

    Raises:
        ConfigError: native kernels are asked for, and there are none.
    """
    device = mesh.devices.flat[0]
    padded = pad_for_mesh(model, meshes.parts(mesh, "kv_heads"))
    page_len = config.page_len or (64 if device.platform == "tpu" else 16)
    kind = attention_for(
        device,
        config.kernels,
        head_dim=model.head_dim,
        page_len=page_len,
        fp8=config.kv_dtype == "fp8",
    )
    return DecoderBackend(
        model=model,
        padded=padded,
        mesh=mesh,
        quantization=_decoder_quantization(config, mesh, _dtype(config, mesh), formats),
        attention=kind(
            kv_heads=padded.num_kv_heads,
            head_dim=model.head_dim,
            page_len=page_len,
            dtype=_kv_dtype(config, mesh, native=kind is not PagedAttention),
        ),
    )


def resolve_encoder(model: EncoderConfig, config: EngineConfig, mesh: Mesh) -> EncoderBackend:
    """The backend of an encoder.

    Its matrices are never quantized: blocks of integers were no faster where a batch is many rows,
    and their cosines to the float32 vectors were 0.9985.
    """
    dtype = _dtype(config, mesh)
    return EncoderBackend(
        model=model,
        padded=pad_for_mesh(model, meshes.parts(mesh, "heads")),
        mesh=mesh,
        quantization=packed_quantization(mesh, config.kernels, dtype)
        or QuantizationConfig.unquantized(dtype),
        attention=segment_attention_for(mesh, config.kernels),
    )


def decode_steps(config: EngineConfig, mesh: Mesh) -> int:
    """Maximum number of decode steps that are dispatched together."""
    # On a CPU a step takes many times as long as the host's part of it, and streams are smoother.
    return config.decode_steps or (1 if mesh.devices.flat[0].platform == "cpu" else _DECODE_STEPS)


def _dtype(config: EngineConfig, mesh: Mesh) -> jnp.dtype:
    """Of weights and products; auto is bfloat16 if the device multiplies it."""
    if config.dtype != "auto":
        return jnp.dtype(config.dtype)
    native = devices.multiplies_bfloat16(mesh.devices.flat[0])
    return jnp.dtype("bfloat16" if native else "float32")


def _kv_dtype(config: EngineConfig, mesh: Mesh, *, native: bool) -> jnp.dtype:
    """Of keys and values; auto is bfloat16, which halves their memory, where that costs nothing.

    XLA:CPU writes to a bfloat16 array by copying it whole; ``native`` kernels do not.
    """
    if config.kv_dtype == "fp8":
        return jnp.dtype("float8_e4m3fn")
    if config.kv_dtype != "auto":
        return jnp.dtype(config.kv_dtype)
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    wide = config.dtype == "float32" or (on_cpu and not native)
    return jnp.dtype("float32" if wide else "bfloat16")


def _decoder_quantization(
    config: EngineConfig,
    mesh: Mesh,
    dtype: jnp.dtype,
    formats: Mapping[str, tuple[BlockPart, ...]],
) -> QuantizationConfig:
    """The quantization of a decoder's matrices.

    Auto quantizes only on a CPU with native kernels: blocks of integers are several times faster
    there. If ``dtype`` is set, matrices keep it.
    """
    if config.quantization == "auto" and config.dtype == "auto":
        blocks = block_quantization(mesh, config.kernels, dtype, formats)
        if blocks:
            return blocks
    if config.quantization in ("int8", "fp8"):
        native = devices.multiplies(mesh.devices.flat[0], config.quantization)
        return QuantizationConfig.eight_bit(
            config.quantization, dtype, meshes.parts(mesh, "mlp"), "native" if native else "float"
        )
    return QuantizationConfig.unquantized(dtype)


def _survey_kernels() -> dict[str, object]:
    """The C++ compiler, and whether the native kernels are compiled, or why they cannot be."""
    compiler, compiled, why = build.look()
    return {"compiler": compiler, "compiled": compiled, "why": why, "help": build.HELP}


def _survey_accelerator() -> dict[str, object] | None:
    """The accelerator of this machine, its driver and the flags set for it; None: there is none."""
    platform = flags.accelerator()
    if platform is None:
        return None
    return {
        "platform": platform,
        "driver": flags.nvidia_driver(),
        "flags": [flag._asdict() for flag in flags.set_flags()],
    }


def _survey_devices() -> dict[str, object]:
    """What JAX computes on, and its memory in bytes."""
    found = jax.devices()
    return {
        "platform": found[0].platform,
        "kinds": [device.device_kind for device in found],
        "capability": ".".join(map(str, devices.compute_capability(found[0]))),
        "free_memory": free_memory(),
        "machine_memory": total_memory(),
    }


if __name__ == "__main__":
    for name, survey in (
        ("kernels", _survey_kernels),
        ("accelerator", _survey_accelerator),
        ("devices", _survey_devices),
    ):
        print(json.dumps({name: survey()}), flush=True)

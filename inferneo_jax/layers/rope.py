"""Rotary position embeddings (arXiv:2104.09864), in the layout of Hugging Face's checkpoints.

A head is split into halves: element i is rotated together with element i + head_dim / 2.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from inferneo_jax.config import RopeScaling


def frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | None
) -> Float[np.ndarray, " half"]:
    """Radians per position of each rotated pair, float32."""
    plain = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return plain.astype(np.float32)
    if scaling.kind == "linear":
        return (plain / scaling.factor).astype(np.float32)
    # Llama 3.1: wavelengths longer than the original context are stretched by the factor, short
    # ones stay, and those in between are blended.
    turns = scaling.original_context_length * plain / (2 * math.pi)
    span = scaling.high_freq_factor - scaling.low_freq_factor
    keep = np.clip((turns - scaling.low_freq_factor) / span, 0.0, 1.0)
    return (plain * (keep + (1 - keep) / scaling.factor)).astype(np.float32)


def angles(
    positions: Int[Array, "*tokens"], freqs: Float[Array, " half"]
) -> tuple[Float[Array, "*tokens half"], Float[Array, "*tokens half"]]:
    """Cosines and sines of each position's angles, float32."""
    turned = positions[..., None].astype(jnp.float32) * freqs.reshape((1,) * positions.ndim + (-1,))
    return jnp.cos(turned), jnp.sin(turned)


def rotate(
    x: Float[Array, "*tokens_and_heads dim"],
    cos: Float[Array, "*tokens half"],
    sin: Float[Array, "*tokens half"],
) -> Float[Array, "*tokens_and_heads dim"]:
    """Rotate every head of every token by its position's angles."""
    between = (1,) * (x.ndim - cos.ndim)
    cos = cos.reshape(*cos.shape[:-1], *between, -1)
    sin = sin.reshape(*sin.shape[:-1], *between, -1)
    low, high = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

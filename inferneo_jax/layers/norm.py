"""Normalisations, always computed in float32."""

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from inferneo_jax.layers.spec import vector


class RMSNorm(nnx.Module):
    """Root mean square normalisation over the last axis (arXiv:1910.07467)."""

    def __init__(self, size: int, eps: float, axis: str | None = "embed") -> None:
        self.eps = eps
        self.scale = vector((size,), (axis,))

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        return x * lax.rsqrt(mean_square + self.eps) * _over_rows(self.scale[...], x)


class LayerNorm(nnx.Module):
    """Mean and variance normalisation over the last axis (arXiv:1607.06450)."""

    def __init__(self, size: int, eps: float) -> None:
        self.eps = eps
        self.scale = vector((size,), ("embed",))
        self.bias = vector((size,), ("embed",))

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        centred = x - jnp.mean(x, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normal = centred * lax.rsqrt(variance + self.eps)
        return normal * _over_rows(self.scale[...], x) + _over_rows(self.bias[...], x)


def _over_rows(vector: Float[Array, " size"], x: Float[Array, "*rows size"]) -> Float[Array, "..."]:
    """The vector with the rank of ``x``, since implicit rank promotion raises here."""
    return vector.reshape((1,) * (x.ndim - 1) + (-1,))

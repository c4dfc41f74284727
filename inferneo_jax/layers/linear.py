"""Matrix products with weights."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from inferneo_jax.layers.spec import weight

MIN_ROWS = 2
"""XLA:CPU hands products of one row to a scalar loop, 10 times slower than those of two."""


class Linear(nnx.Module):
    """A matrix over named axes, with a bias when asked for.

    The kernel's first ``inputs`` axes are contracted with the last axes of what it is applied to;
    the others are its outputs. The product is taken in the kernel's dtype and summed in float32,
    which is also the dtype of the result.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        dtype: jnp.dtype,
        *,
        inputs: int = 1,
        bias: bool = False,
    ) -> None:
        self.inputs = inputs
        self.kernel = weight(shape, axes, dtype)
        if bias:
            self.bias = weight(shape[inputs:], axes[inputs:], jnp.dtype("float32"))

    def __call__(self, x: Float[Array, "*rows_and_inputs"]) -> Float[Array, "*rows_and_outputs"]:
        kernel = self.kernel[...]
        rows, outputs = x.shape[: x.ndim - self.inputs], kernel.shape[self.inputs :]
        width = math.prod(kernel.shape[: self.inputs])
        product = _matmul(x.reshape(-1, width), kernel.reshape(width, -1), contract=0)
        if hasattr(self, "bias"):
            product = product + self.bias[...].reshape(1, -1)
        return product.reshape(*rows, *outputs)


class Embedding(nnx.Module):
    """A table of vectors, read by row or, as a tied output layer, multiplied with."""

    def __init__(self, rows: int, embed: int, dtype: jnp.dtype, axis: str | None = None) -> None:
        self.table = weight((rows, embed), (axis, "embed"), dtype)

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows embed"]:
        return jnp.take(self.table[...], ids, axis=0, mode="clip").astype(jnp.float32)

    def attend(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows table_rows"]:
        """Products of every row of ``x`` with every row of the table, summed in float32."""
        return _matmul(x, self.table[...], contract=1)


def _matmul(
    x: Float[Array, "rows inner"], matrix: Float[Array, "_ _"], *, contract: int
) -> Float[Array, "rows outer"]:
    num_rows = x.shape[0]
    x = x.astype(matrix.dtype)
    if num_rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - num_rows), (0, 0)))
    product = lax.dot_general(
        x, matrix, (((1,), (contract,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product[:num_rows]

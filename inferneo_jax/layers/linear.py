"""Matrix products with weights."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from inferneo_jax import mesh
from inferneo_jax.layers.spec import weight

MIN_ROWS = 2
"""XLA:CPU hands products of one row to a scalar loop, 10 times slower than those of two."""


class Linear(nnx.Module):
    """A matrix over named axes, with a bias when asked for.

    The kernel's first ``inputs`` axes are contracted with the last axes of what it is applied to;
    the others are its outputs. The product is taken in the kernel's dtype and summed in float32,
    which is also the dtype of the result. Where a contracted axis is split over a mesh, the sums of
    all devices are added up, in the kernel's dtype to halve what crosses between chips.
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
        self.contracted = axes[:inputs]
        # A split axis has fewer entries on a device than it has in all.
        self.outputs = tuple(
            -1 if axis in mesh.RULES else size
            for size, axis in zip(shape[inputs:], axes[inputs:], strict=True)
        )
        self.kernel = weight(shape, axes, dtype, inputs)
        if bias:
            self.bias = weight(shape[inputs:], axes[inputs:], jnp.dtype("float32"))

    def __call__(self, x: Float[Array, "*rows_and_inputs"]) -> Float[Array, "*rows_and_outputs"]:
        kernel = self.kernel[...]
        rows = x.shape[: x.ndim - self.inputs]
        product = _matmul(x.reshape(math.prod(rows), -1), kernel, contract=0)
        if any(map(mesh.is_split, self.contracted)):
            product = mesh.reduce(product.astype(kernel.dtype), *self.contracted)
            product = product.astype(jnp.float32)
        if hasattr(self, "bias"):
            product = product + self.bias[...][None, :]
        return product.reshape(*rows, *self.outputs)


class Embedding(nnx.Module):
    """A table of vectors, read by row or, as a tied output layer, multiplied with.

    A table whose rows are split over a mesh is read by the device that holds the row; the others
    add nothing.
    """

    def __init__(self, rows: int, embed: int, dtype: jnp.dtype, axis: str | None = None) -> None:
        self.axis = axis
        self.table = weight((rows, embed), (axis, "embed"), dtype, inputs=1)

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows embed"]:
        table = self.table[...]
        if not mesh.is_split(self.axis):
            return jnp.take(table, ids, axis=0, mode="clip").astype(jnp.float32)
        local = ids - mesh.first_index(self.axis, table.shape[0])
        held = (local >= 0) & (local < table.shape[0])
        vectors = jnp.take(table, local, axis=0, mode="clip")
        zero = jnp.zeros((), table.dtype)
        return mesh.reduce(jnp.where(held[..., None], vectors, zero), self.axis).astype(jnp.float32)

    def attend(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows table_rows"]:
        """Products of every row of ``x`` with this device's rows of the table, in float32."""
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

"""Matrix products with weights."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from inferneo_jax.layers.quantization import After, Epilogue, MatrixFormat, Prologue
from inferneo_jax.layers.spec import WeightSpec, vector, weight
from inferneo_jax.sharding import mesh


class Linear(nnx.Module):
    """A matrix over named axes, with a bias when asked for.

    The kernel's first ``inputs`` axes are contracted with the last axes of what it is applied to;
    the others are its outputs. Its format says how the product is taken; the result is float32.
    Where a contracted axis is split over a mesh, the sums of all devices are added up, in the
    format's dtype to halve what crosses between chips.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        format: MatrixFormat,
        *,
        inputs: int = 1,
        bias: bool = False,
    ) -> None:
        self.inputs = inputs
        self.contracted = axes[:inputs]
        self.num_outputs = math.prod(shape[inputs:])
        # A split axis has fewer entries on a device than it has in all.
        self.outputs = tuple(
            -1 if axis in mesh.RULES else size
            for size, axis in zip(shape[inputs:], axes[inputs:], strict=True)
        )
        self.format = format
        self.kernel = weight(WeightSpec(shape, axes, format, inputs))
        if bias:
            self.bias = vector(shape[inputs:], axes[inputs:])

    def __call__(
        self,
        x: Float[Array, "*rows_and_inputs"],
        *,
        prologue: Prologue | None = None,
        residual: Float[Array, "*rows_and_outputs"] | None = None,
        epilogue: Epilogue | None = None,
        narrow: bool = False,
        live: Int[Array, ""] | None = None,
    ) -> Float[Array, "*rows_and_outputs"]:
        """``epilogue(residual + prologue(x) @ kernel + bias)``; what is None is left out.

        Args:
            x: what is multiplied.
            prologue: what is done to it before.
            residual: is added.
            epilogue: what is done to the sums.
            narrow: round the result to the format's dtype, for another product to take.
            live: rows that matter; those behind them may become anything. None: all do.
        """
        rows = x.shape[: x.ndim - self.inputs]
        x = x.reshape(math.prod(rows), -1)
        stored = self.kernel.get_value()
        after = After(
            self.bias[...] if hasattr(self, "bias") else None,
            None if residual is None else residual.reshape(x.shape[0], -1),
            epilogue,
            self.format.dtype if narrow else None,
        )
        if any(map(mesh.is_split, self.contracted)):
            product = self.format.multiply(x, stored, self.num_outputs, prologue=prologue)
            product = mesh.reduce(product.astype(self.format.dtype), *self.contracted)
            product = after(product.astype(jnp.float32))
        else:
            product = self.format.multiply(
                x, stored, self.num_outputs, prologue=prologue, after=after, live=live
            )
        if len(self.outputs) > 1:
            # XLA for TPUs would make the product in the shape below, for which it lays out the
            # whole matrix anew at every step.
            product = lax.optimization_barrier(product)
        return product.reshape(*rows, *self.outputs)


class Embedding(nnx.Module):
    """A table of vectors, read by row or, as a tied output layer, multiplied with.

    A table whose rows are split over a mesh is read by the device that holds the row; the others
    add nothing.
    """

    def __init__(
        self,
        rows: int,
        embed: int,
        format: MatrixFormat,
        axis: str | None = None,
    ) -> None:
        self.axis = axis
        self.rows = rows
        self.embed = embed
        self.format = format
        self.table = weight(WeightSpec((rows, embed), (axis, "embed"), format, 1, table=True))

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows embed"]:
        stored = self.table.get_value()
        if not mesh.is_split(self.axis):
            return self.format.take(stored, ids)[..., : self.embed].astype(jnp.float32)
        num_rows = mesh.local_size(self.axis, self.rows)
        local = ids - mesh.first_index(self.axis, num_rows)
        held = (local >= 0) & (local < num_rows)
        vectors = self.format.take(stored, local)[..., : self.embed]
        zero = jnp.zeros((), vectors.dtype)
        return mesh.reduce(jnp.where(held[..., None], vectors, zero), self.axis).astype(jnp.float32)

    def attend(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows table_rows"]:
        """Products of every row of ``x`` with this device's rows of the table, in float32."""
        return self.format.product(x, self.table.get_value(), table=True)[:, : self.rows]

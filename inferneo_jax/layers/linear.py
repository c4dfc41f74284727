"""Linear layers and embeddings."""

import math

import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from inferneo_jax.layers.quantization import Epilogue, QuantizationMethod, RowFunction
from inferneo_jax.layers.spec import WeightSpec, vector, weight
from inferneo_jax.sharding import mesh


class Linear(nnx.Module):
    """A linear layer over named axes, with an optional bias.

    The first ``inputs`` axes of the kernel are contracted with the last axes of ``x``; the others
    are the outputs. The quantization method computes the product; the result is float32. If a
    contracted axis is split over a mesh, the sums of all devices are added, in the method's dtype
    to halve the traffic between chips.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        method: QuantizationMethod,
        *,
        inputs: int = 1,
        bias: bool = False,
    ) -> None:
        self.inputs = inputs
        self.contracted = axes[:inputs]
        self.num_outputs = math.prod(shape[inputs:])
        # A device has fewer entries of a split axis than there are in all.
        self.outputs = tuple(
            -1 if axis in mesh.RULES else size
            for size, axis in zip(shape[inputs:], axes[inputs:], strict=True)
        )
        self.method = method
        self.kernel = weight(WeightSpec(shape, axes, method, inputs))
        if bias:
            self.bias = vector(shape[inputs:], axes[inputs:])

    def __call__(
        self,
        x: Float[Array, "*rows_and_inputs"],
        *,
        prologue: RowFunction | None = None,
        residual: Float[Array, "*rows_and_outputs"] | None = None,
        transform: RowFunction | None = None,
        narrow: bool = False,
        live: Int[Array, ""] | None = None,
    ) -> Float[Array, "*rows_and_outputs"]:
        """``transform(residual + prologue(x) @ kernel + bias)``, without what is None.

        Args:
            x: the rows to multiply.
            prologue: applied to them first.
            residual: added to the product.
            transform: applied to each row of the sum.
            narrow: round the result to the method's dtype, as input of another product.
            live: number of leading rows whose results are used; the others may become anything.
                None means all rows.
        """
        rows = x.shape[: x.ndim - self.inputs]
        x = x.reshape(math.prod(rows), -1)
        stored = self.kernel.get_value()
        epilogue = Epilogue(
            self.bias[...] if hasattr(self, "bias") else None,
            None if residual is None else residual.reshape(x.shape[0], -1),
            transform,
            self.method.dtype if narrow else None,
        )
        if any(map(mesh.is_split, self.contracted)):
            product = self.method.multiply(x, stored, self.num_outputs, prologue=prologue)
            product = mesh.reduce(product.astype(self.method.dtype), *self.contracted)
            product = epilogue(product.astype(jnp.float32))
        else:
            product = self.method.multiply(
                x, stored, self.num_outputs, prologue=prologue, epilogue=epilogue, live=live
            )
        if len(self.outputs) > 1:
            # XLA for TPUs would compute the product in the shape below, and for that rearrange the
            # whole matrix in every step.
            product = lax.optimization_barrier(product)
        return product.reshape(*rows, *self.outputs)


class Embedding(nnx.Module):
    """A table of vectors, read by row or, as a tied output layer, multiplied by.

    If its rows are split over a mesh, the device that holds a row reads it, and the others
    contribute zeros to a sum.
    """

    def __init__(
        self,
        rows: int,
        embed: int,
        method: QuantizationMethod,
        axis: str | None = None,
    ) -> None:
        self.axis = axis
        self.rows = rows
        self.embed = embed
        self.method = method
        self.table = weight(WeightSpec((rows, embed), (axis, "embed"), method, 1, table=True))

    def __call__(self, ids: Int[Array, "*rows"]) -> Float[Array, "*rows embed"]:
        stored = self.table.get_value()
        if not mesh.is_split(self.axis):
            return self.method.take(stored, ids)[..., : self.embed].astype(jnp.float32)
        num_rows = mesh.local_size(self.axis, self.rows)
        local = ids - mesh.first_index(self.axis, num_rows)
        held = (local >= 0) & (local < num_rows)
        vectors = self.method.take(stored, local)[..., : self.embed]
        zero = jnp.zeros((), vectors.dtype)
        return mesh.reduce(jnp.where(held[..., None], vectors, zero), self.axis).astype(jnp.float32)

    def attend(self, x: Float[Array, "rows embed"]) -> Float[Array, "rows table_rows"]:
        """``x @ table.T`` for this device's rows of the table, in float32."""
        return self.method.product(x, self.table.get_value(), table=True)[:, : self.rows]

"""How matrices lie on a device, and products with them: the one place that layers ask.

A matrix is ``inputs x outputs``; a table of vectors, whose rows are also its outputs, is kept the
other way round. What a format keeps of it is a tuple of arrays.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from inferneo_jax.sharding import mesh

MIN_ROWS = 2
"""XLA:CPU hands products of one row to a scalar loop, 10 times slower than those of two."""

Stored = tuple[Array, ...]
HostArray = np.ndarray[Any, np.dtype[Any]]
Prologue = Callable[[Float[Array, "*rows n"]], Float[Array, "*rows inputs"]]
"""What is done to the rows before they are multiplied: a normalisation, a gate."""
Epilogue = Callable[[Float[Array, "*rows outputs"]], Float[Array, "*rows outputs"]]
"""What is done to the sums in the end: an activation, a normalisation."""


class EncodingError(ValueError):
    """A matrix that a format cannot hold."""


@dataclass(frozen=True)
class After:
    """What is done to a product, in this order; what is None is left out.

    Attributes:
        bias: is added to every row.
        residual: is added.
        epilogue: makes another of each row.
        dtype: that the result is rounded to, which is float32 otherwise.
    """

    bias: Float[Array, " outputs"] | None = None
    residual: Float[Array, "rows outputs"] | None = None
    epilogue: Epilogue | None = None
    dtype: jnp.dtype | None = None

    def __call__(self, product: Float[Array, "rows outputs"]) -> Float[Array, "rows outputs"]:
        """All of it."""
        if self.bias is not None:
            product = product + self.bias[None, :]
        if self.residual is not None:
            product = self.residual + product
        if self.epilogue:
            product = self.epilogue(product)
        return product if self.dtype is None else product.astype(self.dtype)


NOTHING_AFTER = After()


class Piece(NamedTuple):
    """One of the arrays that make up a matrix: its whole shape, and the logical axes it has."""

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


@dataclass(frozen=True)
class MatrixFormat(ABC):
    """A way to keep matrices and to multiply with them.

    Products may have further columns than the matrix, and rows of a table than it has inputs: what
    a format pads. Layers cut them off.

    Padding of rows is left out in two ways, each where it lies. A batch of an encoder has all of it
    behind the last text, so ``live``, a count, says where it begins. In a decoder's step it is
    between live rows, at the end of each row of prompts; there it is rows of zeros, which kernels
    notice while they round what they multiply.

    Attributes:
        dtype: in which what is not quantized is kept, and sums cross between devices.
        padding_cost: time to multiply a row of zeros, as padding is, in that of another row.
    """

    dtype: jnp.dtype
    padding_cost: ClassVar[float] = 1.0

    @property
    def quantization(self) -> str:
        """How its numbers are rounded, for people; ``none``: they are of ``dtype``."""
        return "none"

    @abstractmethod
    def pieces(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[Piece, ...]:
        """The arrays of a matrix of this shape; ``axes`` are those by which it is split."""

    @abstractmethod
    def encode(self, part: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """The arrays of one device's part of a matrix.

        Raises:
            EncodingError: the format holds some matrices only, and not this one.
        """

    @abstractmethod
    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        """``x`` times the matrix, float32."""

    @abstractmethod
    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of a table, in ``dtype`` or float32; ids beyond it give any of its rows."""

    def multiply(
        self,
        x: Float[Array, "rows n"],
        stored: Stored,
        outputs: int,
        *,
        prologue: Prologue | None = None,
        after: After = NOTHING_AFTER,
        live: Int[Array, ""] | None = None,
    ) -> Float[Array, "rows outputs"]:
        """``after(prologue(x) @ matrix)``.

        Args:
            x: rows.
            stored: the matrix.
            outputs: that it has, of those that the format holds.
            prologue: what is done to rows before.
            after: what is done to sums.
            live: rows that matter; what those behind them become may be anything. None: all do.
        """
        del live  # all rows cost the same
        x = prologue(x) if prologue else x
        return after(self.product(x, stored, table=False)[:, :outputs])

    def feed_forward(
        self,
        x: Float[Array, "rows embed"],
        norm: Prologue,
        gate_up: Stored,
        down: Stored,
        num_gates: int,
    ) -> Float[Array, "rows embed"] | None:
        """``x + gate(norm(x) @ gate_up) @ down`` in one call, float32.

        Returns:
            None where the format has no such call: then it takes two products.
        """
        return None


@dataclass(frozen=True)
class Plain(MatrixFormat):
    """Numbers as they are; products of ``dtype``, summed in float32."""

    def pieces(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[Piece, ...]:
        """The matrix."""
        return (Piece(shape, self.dtype, axes),)

    def encode(self, part: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """The part, cast."""
        return (part.astype(self.dtype, copy=False),)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        (matrix,) = stored
        return _dot(x.astype(matrix.dtype), matrix, jnp.dtype("float32"), table=table)

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        return jnp.take(stored[0], ids, axis=0, mode="clip")


@dataclass(frozen=True)
class Int8(MatrixFormat):
    """Symmetric int8, with a float32 scale for each output.

    The rows that are multiplied are quantized too, each with a scale of its own, so that products
    are of int8 and summed exactly in int32 (LLM.int8(), arXiv:2208.07339, without its outliers;
    SmoothQuant, arXiv:2211.10438, calls it W8A8 with dynamic scales per token). Chips that
    multiply no int8 multiply numbers of ``dtype``, made of the weights on the way.

    Where inputs are split over devices, each has scales for its own part: none needs to know what
    the others hold.

    Attributes:
        parts: into how many the inputs of a matrix are split, where they are.
        products: of ``int8``, or of ``dtype``.
    """

    parts: int = 1
    products: Literal["int8", "float"] = "int8"

    @property
    def quantization(self) -> str:
        """Always int8."""
        return "int8"

    def pieces(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[Piece, ...]:
        """The matrix, and the scales of its outputs, ``[parts, outputs]``."""
        outputs, axis = shape[not table], axes[not table]
        inputs_axis = axes[int(table)]
        groups = self.parts if inputs_axis in mesh.RULES else 1
        return (
            Piece(shape, jnp.dtype("int8"), axes),
            Piece((groups, outputs), jnp.dtype("float32"), (inputs_axis, axis)),
        )

    def encode(self, part: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """The nearest multiples of each output's scale, and these."""
        part = part.astype(np.float32, copy=False)
        inputs = int(table)
        scales = np.maximum(np.abs(part).max(axis=inputs, keepdims=True), 1e-30) / 127
        return np.rint(part / scales).astype(np.int8), scales.reshape(1, -1)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        values, scales = stored
        if self.products == "float":
            wide = values.astype(self.dtype)
            return _dot(x.astype(self.dtype), wide, jnp.dtype("float32"), table=table) * scales
        quantized, row_scales = quantize(x)
        sums = _dot(quantized, values, jnp.dtype("int32"), table=table)
        return sums.astype(jnp.float32) * row_scales[:, None] * scales

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        values, scales = stored
        rows = jnp.take(values, ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * jnp.take(scales[0], ids, mode="clip")[..., None]).astype(self.dtype)


@dataclass(frozen=True)
class Formats:
    """How a model keeps its matrices.

    Attributes:
        linear: those of its layers.
        head: those that make logits, a table of embeddings that does so included.
    """

    linear: MatrixFormat
    head: MatrixFormat

    @property
    def dtype(self) -> jnp.dtype:
        """Of tables that are only read from."""
        return self.linear.dtype

    @classmethod
    def plain(cls, dtype: Any) -> "Formats":
        """Nothing is quantized."""
        return cls(Plain(jnp.dtype(dtype)), Plain(jnp.dtype(dtype)))

    @classmethod
    def int8(cls, dtype: Any, parts: int, products: Literal["int8", "float"]) -> "Formats":
        """Every matrix of the layers and the head is of int8."""
        made = Int8(jnp.dtype(dtype), parts, products)
        return cls(made, made)


def quantize(
    x: Float[Array, "*batch n"],
) -> tuple[Int[Array, "*batch n"], Float[Array, "*batch"]]:
    """Symmetric int8 along the last axis: the nearest multiples of ``absmax / 127``, and that."""
    x = x.astype(jnp.float32)
    # Some floor is needed: zeros have no scale of their own.
    scales = jnp.maximum(jnp.abs(x).max(axis=-1, keepdims=True), 1e-30) / 127
    return jnp.round(x / scales).astype(jnp.int8), scales.squeeze(-1)


def _dot(
    x: Num[Array, "rows inputs"], matrix: Num[Array, "_ _"], sums: jnp.dtype, *, table: bool
) -> Num[Array, "rows outputs"]:
    num_rows = x.shape[0]
    if num_rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - num_rows), (0, 0)))
    product = lax.dot_general(
        x, matrix, (((1,), (int(table),)), ((), ())), preferred_element_type=sums
    )
    return product[:num_rows]

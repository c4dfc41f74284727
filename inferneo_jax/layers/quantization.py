"""Quantization methods: how a weight matrix is stored on a device, and how it is multiplied.

Layers hold no numbers of their own format. Each asks its ``QuantizationMethod`` which arrays
(parameters) store its matrix and what ``x @ matrix`` is. A method with kernels for one kind of
device lives beside these kernels, such as ``kernels/cpu/linear.py``; the methods here run on any.

A matrix is ``[inputs, outputs]``. A table of vectors (embeddings) is ``[rows, inputs]``: its rows
are the outputs when it serves as an output layer, so it is stored transposed.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Num

from inferneo_jax.layers.blocks import BlockPart, BlockRows
from inferneo_jax.sharding import mesh

MIN_ROWS = 2
"""XLA:CPU computes a product of one row in a scalar loop, 10 times slower than one of two rows."""

Stored = tuple[Array, ...]
"""The parameters of one matrix on the device, in the order of ``QuantizationMethod.parameters``."""
HostArray = np.ndarray[Any, np.dtype[Any]]
RowFunction = Callable[[Float[Array, "*rows n"]], Float[Array, "*rows m"]]
"""A function applied to each row on its own, such as a normalisation, a gate or an activation."""


class EncodingError(ValueError):
    """A quantization method cannot represent a matrix."""


@dataclass(frozen=True)
class Epilogue:
    """What follows a matrix product, in the order of the attributes. None skips a step.

    Attributes:
        bias: added to every row.
        residual: added to the product.
        transform: applied to every row, such as an activation or a normalisation.
        dtype: the result is rounded to it; without one it stays float32.
    """

    bias: Float[Array, " outputs"] | None = None
    residual: Float[Array, "rows outputs"] | None = None
    transform: RowFunction | None = None
    dtype: jnp.dtype | None = None

    def __call__(self, product: Float[Array, "rows outputs"]) -> Float[Array, "rows outputs"]:
        """Apply all steps to a float32 product."""
        if self.bias is not None:
            product = product + self.bias[None, :]
        if self.residual is not None:
            product = self.residual + product
        if self.transform:
            product = self.transform(product)
        return product if self.dtype is None else product.astype(self.dtype)


NO_EPILOGUE = Epilogue()


class ParameterSpec(NamedTuple):
    """One of the arrays that store a matrix.

    Attributes:
        shape: over all devices.
        dtype: of its elements.
        axes: the logical axis of each dimension, for the sharding rules; None is never split.
    """

    shape: tuple[int, ...]
    dtype: jnp.dtype
    axes: tuple[str | None, ...]


@dataclass(frozen=True)
class QuantizationMethod(ABC):
    """One way to store matrices and to multiply by them.

    A subclass says what it stores (``parameters``, ``encode``), and how it multiplies (``product``,
    ``take``; ``multiply`` and ``feed_forward`` where one kernel does more than the product).

    A method may pad: products may have more columns than the matrix has outputs, and rows of a
    table more elements than it has inputs. Layers cut them off.

    Padded rows of ``x`` are skipped in one of two ways. In an encoder's batch, all padding follows
    the last text, so ``live`` counts the rows before it. In a decoder's step, padding lies between
    live rows, at the end of each prompt chunk; there the rows are zeros, which a kernel can detect
    while it quantizes ``x``.

    Attributes:
        dtype: of what is not quantized, and of sums exchanged between devices.
        padding_cost: time to multiply a padded row, relative to any other row.
    """

    dtype: jnp.dtype
    padding_cost: ClassVar[float] = 1.0

    @property
    def name(self) -> str:
        """The name of the number format in model information; ``none`` if numbers are ``dtype``."""
        return "none"

    @abstractmethod
    def parameters(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[ParameterSpec, ...]:
        """The arrays that store a matrix.

        Args:
            shape: of the matrix over all devices.
            axes: the logical axis of each of its dimensions; None is never split.
            table: whether it is a table of vectors.
        """

    @abstractmethod
    def encode(self, shard: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """Convert one device's shard of a matrix into that device's shards of the parameters.

        Raises:
            EncodingError: the method cannot represent this matrix.
        """

    def stores(self, parts: tuple[BlockPart, ...] | None) -> bool:
        """Whether ``encode_blocks`` takes blocks of these parts as they are."""
        return False

    def encode_blocks(self, blocks: tuple[BlockRows, ...]) -> tuple[HostArray, ...]:
        """Convert the blocks of a whole matrix into its parameters, without rounding anything."""
        raise NotImplementedError(f"{type(self).__name__} stores no blocks")

    @abstractmethod
    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        """``x @ matrix``, or ``x @ table.T``, in float32."""

    @abstractmethod
    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of a table, in ``dtype`` or float32. An id out of range returns some valid row."""

    def multiply(
        self,
        x: Float[Array, "rows n"],
        stored: Stored,
        outputs: int,
        *,
        prologue: RowFunction | None = None,
        epilogue: Epilogue = NO_EPILOGUE,
        live: Int[Array, ""] | None = None,
    ) -> Float[Array, "rows outputs"]:
        """``epilogue(prologue(x) @ matrix)``.

        Args:
            x: the rows to multiply.
            stored: the parameters of the matrix.
            outputs: columns to keep; the method may have padded the matrix to more.
            prologue: applied to the rows first.
            epilogue: applied to the product.
            live: number of leading rows whose results are used; the others may become anything.
                None means all rows.
        """
        del live  # This product costs the same for all rows.
        x = prologue(x) if prologue else x
        return epilogue(self.product(x, stored, table=False)[:, :outputs])

    def feed_forward(
        self,
        x: Float[Array, "rows embed"],
        norm: RowFunction,
        gate_up: Stored,
        down: Stored,
        down_method: "QuantizationMethod",
        num_gates: int,
    ) -> Float[Array, "rows embed"] | None:
        """``x + gate(norm(x) @ gate_up) @ down`` in one call, in float32.

        Args:
            x: the rows.
            norm: applied to them first.
            gate_up: the parameters of a matrix of this method: the gates, then ``up``.
            down: the parameters of the other matrix.
            down_method: its method.
            num_gates: the number of gates.

        Returns:
            None if there is no such call for the two methods; the caller then takes two products.
        """
        return None


class Numbers(NamedTuple):
    """Numbers of 8 bits.

    Attributes:
        name: what they are called.
        dtype: theirs.
        largest: the largest of them.
        whole: whether they are integers.
        sums: the dtype in which products are added.
    """

    name: str
    dtype: jnp.dtype
    largest: float
    whole: bool
    sums: jnp.dtype


INT8 = Numbers("int8", jnp.dtype("int8"), 127, True, jnp.dtype("int32"))
FP8 = Numbers("fp8", jnp.dtype("float8_e4m3fn"), 448, False, jnp.dtype("float32"))

_LEAST = 1e-30
"""A row of zeros would have the scale 0."""


@dataclass(frozen=True)
class Unquantized(QuantizationMethod):
    """Stores numbers of ``dtype``, multiplies in ``dtype`` and accumulates in float32."""

    def parameters(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[ParameterSpec, ...]:
        """The matrix itself."""
        return (ParameterSpec(shape, self.dtype, axes),)

    def encode(self, shard: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """Cast the shard to ``dtype``."""
        return (shard.astype(self.dtype, copy=False),)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        (matrix,) = stored
        return _dot(x.astype(matrix.dtype), matrix, jnp.dtype("float32"), table=table)

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        return jnp.take(stored[0], ids, axis=0, mode="clip")


@dataclass(frozen=True)
class EightBit(QuantizationMethod):
    """Symmetric numbers of 8 bits with a float32 scale for each output.

    The rows of ``x`` are quantized too, each with its own scale, so that products are of 8 bits:
    LLM.int8() (arXiv:2208.07339) without its outliers, or W8A8 with dynamic per-token scales in the
    terms of SmoothQuant (arXiv:2211.10438). Devices without such products convert the weights to
    ``dtype`` on the fly and multiply in that.

    Where the inputs are split over devices, each shard has its own scales, so that no device needs
    to see the values of another.

    Matrices are stored like tables, ``[outputs, inputs]``: the tensor cores of GPUs take 8-bit
    numbers in this order only, and XLA transposes others, whole. TPUs take either.

    Attributes:
        shards: the number of shards of a matrix whose inputs are split.
        products: ``native``, or ``float`` to multiply in ``dtype``.
    """

    shards: int = 1
    products: Literal["native", "float"] = "native"
    numbers: ClassVar[Numbers]

    @property
    def name(self) -> str:
        """The name of the numbers."""
        return self.numbers.name

    def parameters(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[ParameterSpec, ...]:
        """The numbers, ``[outputs, inputs]``, and their outputs' scales, ``[shards, outputs]``."""
        (outputs, inputs), (axis, inputs_axis) = (
            (shape, axes) if table else (shape[::-1], axes[::-1])
        )
        shards = self.shards if inputs_axis in mesh.RULES else 1
        return (
            ParameterSpec((outputs, inputs), self.numbers.dtype, (axis, inputs_axis)),
            ParameterSpec((shards, outputs), jnp.dtype("float32"), (inputs_axis, axis)),
        )

    def encode(self, shard: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """Divide each output by its scale, and round it."""
        shard = shard.astype(np.float32, copy=False)
        rows = shard if table else shard.T
        largest = np.abs(rows).max(axis=1, keepdims=True)
        scales = np.maximum(largest, _LEAST) / np.float32(self.numbers.largest)
        scaled = rows / scales
        if self.numbers.whole:
            scaled = np.rint(scaled, out=scaled)
        values = np.ascontiguousarray(scaled.astype(self.numbers.dtype))
        return values, scales.reshape(1, -1)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        values, scales = stored
        if self.products == "float":
            wide = values.astype(self.dtype)
            return _dot(x.astype(self.dtype), wide, jnp.dtype("float32"), table=True) * scales
        rows, row_scales = quantize(x, self.numbers)
        sums = _dot(rows, values, self.numbers.sums, table=True)
        return sums.astype(jnp.float32) * row_scales[:, None] * scales

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        values, scales = stored
        rows = jnp.take(values, ids, axis=0, mode="clip").astype(jnp.float32)
        return (rows * jnp.take(scales[0], ids, mode="clip")[..., None]).astype(self.dtype)


@dataclass(frozen=True)
class Int8(EightBit):
    """Whole numbers of 8 bits. Sums of their products are exact."""

    numbers: ClassVar[Numbers] = INT8


@dataclass(frozen=True)
class Fp8(EightBit):
    """Floats of 8 bits, E4M3 (arXiv:2209.05433). Small weights keep more of their digits."""

    numbers: ClassVar[Numbers] = FP8


@dataclass(frozen=True)
class QuantizationConfig:
    """The quantization methods of the matrices of a model, or of a part of it.

    Attributes:
        linear: for the matrices of its layers.
        head: for the matrix that computes logits, including a tied table of embeddings.
        exceptions: matrices that have a method of their own, by the dotted name of the weight and
            in the order of these names.
    """

    linear: QuantizationMethod
    head: QuantizationMethod
    exceptions: tuple[tuple[str, QuantizationMethod], ...] = ()

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of what is not quantized."""
        return self.linear.dtype

    def excepting(self, methods: Mapping[str, QuantizationMethod]) -> "QuantizationConfig":
        """The same, but for the weights with these dotted names."""
        exceptions = dict(self.exceptions) | dict(methods)
        return replace(
            self, exceptions=tuple((name, exceptions[name]) for name in sorted(exceptions))
        )

    def within(self, part: str) -> "QuantizationConfig":
        """The quantization of a part of the model, such as ``layers.0``, by the names in it."""
        prefix = f"{part}."
        own = [each for each in self.exceptions if each[0].startswith(prefix)]
        return replace(
            self, exceptions=tuple((name.removeprefix(prefix), method) for name, method in own)
        )

    def of(self, name: str, default: QuantizationMethod | None = None) -> QuantizationMethod:
        """The method of the weight ``name``: its own, else ``default``, else that of layers."""
        return dict(self.exceptions).get(name, default or self.linear)

    @classmethod
    def unquantized(cls, dtype: Any) -> "QuantizationConfig":
        """Stores every matrix in ``dtype``."""
        return cls(Unquantized(jnp.dtype(dtype)), Unquantized(jnp.dtype(dtype)))

    @classmethod
    def eight_bit(
        cls,
        name: Literal["int8", "fp8"],
        dtype: Any,
        shards: int,
        products: Literal["native", "float"],
    ) -> "QuantizationConfig":
        """Stores every matrix of the layers and the head in 8 bits; see ``EightBit``."""
        kind = Int8 if name == "int8" else Fp8
        method = kind(jnp.dtype(dtype), shards, products)
        return cls(method, method)


def quantize(
    x: Float[Array, "*batch n"], numbers: Numbers = INT8
) -> tuple[Num[Array, "*batch n"], Float[Array, "*batch"]]:
    """Round ``x`` to multiples of a scale per row, such that its largest is theirs; return both."""
    x = x.astype(jnp.float32)
    largest = jnp.abs(x).max(axis=-1, keepdims=True)
    scales = jnp.maximum(largest, _LEAST) / numbers.largest
    scaled = x / scales
    rounded = jnp.round(scaled) if numbers.whole else scaled
    return rounded.astype(numbers.dtype), scales.squeeze(-1)


def _dot(
    x: Num[Array, "rows inputs"], matrix: Num[Array, "_ _"], sums: jnp.dtype, *, table: bool
) -> Num[Array, "rows outputs"]:
    num_rows = x.shape[0]
    if num_rows < MIN_ROWS:
        x = jnp.pad(x, ((0, MIN_ROWS - num_rows), (0, 0)))
    product = lax.dot_general(
        x,
        matrix,
        (((1,), (int(table),)), ((), ())),
        # GPUs and TPUs would round float32 to 11 or 8 bits; this concerns no other dtype.
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=sums,
    )
    return product[:num_rows]

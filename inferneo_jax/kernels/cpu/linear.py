"""Block-quantized matrices in the layouts of ``native/quantized_tiles.h``."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from inferneo_jax.kernels.cpu.build import Variant, chosen
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.layers.quantization import (
    NO_EPILOGUE,
    EncodingError,
    Epilogue,
    HostArray,
    ParameterSpec,
    QuantizationMethod,
    RowFunction,
    Stored,
)

_BLOCK = 32
"""Outputs that are stored side by side, and inputs that share a scale."""

_SPAN = 64
"""Inputs of a row that share a scale."""

_ENCODED_AT_ONCE = 2048
"""Outputs. Encoding takes several times the memory of their weights in float32."""

_GROUP_BYTES = {8: 2 * 32 + 32 * 32, 4: 2 * 32 + 2 * 32 + 32 * 16}
_NONE, _RMS_NORM, _SWIGLU = range(3)


@dataclass(frozen=True)
class BlockQuantized(QuantizationMethod):
    """Integers in groups of 32 inputs for the native kernels of a CPU, on one device.

    Each group of an output has a scale, and with 4 bits also a minimum. These are the blocks of
    ggml's Q8_0 and Q4_1, so weights from files in these formats are not rounded again. Rows of
    ``x`` are rounded to int8 with a scale for each 64 values, so an outlier affects only these.

    Attributes:
        bits: 8; or 4, which represents only matrices with at most 16 evenly spaced values in each
            group. Tables always have 8.
        variant: of the kernels.
    """

    padding_cost: ClassVar[float] = 0.125

    bits: Literal[4, 8] = 8
    variant: Variant = "native"

    @property
    def name(self) -> str:
        """The name of these blocks in ggml."""
        return {8: "q8_0", 4: "q4_1"}[self.bits]

    def parameters(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[ParameterSpec, ...]:
        """Groups as bytes, ``[blocks of outputs, groups of inputs, bytes]``, with padding."""
        inputs, outputs = reversed(shape) if table else shape
        groups = -(-inputs // _SPAN) * (_SPAN // _BLOCK)
        whole = -(-outputs // _BLOCK), groups, _GROUP_BYTES[self.bits]
        return (ParameterSpec(whole, jnp.dtype("uint8"), (None,) * 3),)

    def encode(self, shard: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """Round to 8 bits, or convert to 4 bits without any rounding.

        Raises:
            EncodingError: the matrix does not consist of groups of 4 bits.
        """
        # NumPy is fast along the last axis only, so outputs are the last axis here.
        columns = shard.T if table else shard
        (parameter,) = self.parameters(shard.shape, (None, None), table=table)
        blocks, groups, _ = parameter.shape
        encoded = np.zeros(parameter.shape, np.uint8)
        for first in range(0, columns.shape[1], _ENCODED_AT_ONCE):
            some = columns[:, first : first + _ENCODED_AT_ONCE].astype(np.float32)
            padding = (0, groups * _BLOCK - len(some)), (0, -some.shape[1] % _BLOCK)
            whole = np.pad(some, padding) if np.any(padding) else some
            encode = _eight_bits if self.bits == 8 else _four_bits
            packed = _packed(encode(np.ascontiguousarray(whole).reshape(groups, _BLOCK, -1)))
            encoded[first // _BLOCK :][: len(packed)] = packed
        assert len(encoded) == blocks
        return (encoded,)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        """``x @ matrix`` in float32, with padding after the outputs."""
        return self.multiply(x, stored, stored[0].shape[0] * _BLOCK)

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
        """``epilogue(prologue(x) @ matrix)``, in one call if the kernel has them."""
        del live  # The kernel detects rows of zeros.
        known = epilogue.bias is None and epilogue.transform is None and epilogue.dtype is None
        residual = epilogue.residual if known else None
        (weights,) = stored
        norm, eps, kind = jnp.zeros(0), 0.0, _NONE
        if isinstance(prologue, RMSNorm):
            norm, eps, kind = prologue.scale[...], prologue.eps, _RMS_NORM
        elif prologue is gate:
            kind = _SWIGLU
        elif prologue:
            x = prologue(x)
        product = self._call(
            f"linear_{self.bits}",
            (x.shape[0], outputs),
            x.astype(jnp.float32),
            weights,
            norm,
            jnp.zeros((0, 0)) if residual is None else residual,
            prologue=np.int64(kind),
            eps=np.float32(eps),
        )
        return epilogue(product) if residual is None else product

    def feed_forward(
        self,
        x: Float[Array, "rows embed"],
        norm: RowFunction,
        gate_up: Stored,
        down: Stored,
        down_method: QuantizationMethod,
        num_gates: int,
    ) -> Float[Array, "rows embed"] | None:
        """One call with the bits of two products, if the gates are whole spans of 64."""
        if num_gates % _SPAN or not isinstance(norm, RMSNorm) or down_method != self:
            return None
        return self._call(
            f"feed_forward_{self.bits}",
            x.shape,
            x.astype(jnp.float32),
            *gate_up,
            *down,
            norm.scale[...],
            eps=np.float32(norm.eps),
        )

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Rows of a table in float32, with padding after their inputs."""
        (weights,) = stored
        shape = ids.size, weights.shape[1] * _BLOCK
        rows = self._call("take_8", shape, ids.astype(jnp.int32).reshape(-1), weights)
        return rows.reshape(*ids.shape, -1)

    def _call(self, kernel: str, shape: tuple[int, ...], *arguments: Array, **more: Any) -> Array:
        result: Array = chosen(self.variant).call(
            kernel, jax.ShapeDtypeStruct(shape, jnp.float32), *arguments, **more
        )
        return result


Groups = Float32[np.ndarray, "groups inputs outputs"]


class _Encoded(NamedTuple):
    """The fields of the groups of a matrix.

    Attributes:
        numbers: float16 numbers of each output (scales, minima), each ``[groups, outputs]``.
        values: a byte for each weight, ``[groups, inputs, outputs]``; with 4 bits, a byte has one
            weight of each half of a block of outputs.
    """

    numbers: tuple[np.ndarray, ...]
    values: np.ndarray


def _packed(encoded: _Encoded) -> np.ndarray:
    """The bytes of each group: its numbers, then its values, with 4 inputs side by side."""
    groups, inputs, _ = encoded.values.shape
    shape = groups, inputs // 4, 4, encoded.numbers[0].shape[1] // _BLOCK, -1
    values = encoded.values.reshape(shape).transpose(3, 0, 1, 4, 2)
    numbers = (
        np.ascontiguousarray(each.reshape(groups, -1, _BLOCK).swapaxes(0, 1)).view(np.uint8)
        for each in encoded.numbers
    )
    return np.concatenate([*numbers, values.reshape(len(values), groups, -1)], axis=2)


def _eight_bits(weights: Groups) -> _Encoded:
    scales = (np.abs(weights).max(axis=1) / np.float32(127)).astype(np.float16)
    safe = np.maximum(scales.astype(np.float32), np.float32(1e-30))[:, None]
    # If the scale was rounded down, the largest value is above 127, by less than a half unless the
    # scale is too small for float16.
    values = np.clip(np.rint(weights / safe), -127, 127)
    return _Encoded((scales,), (values + 128).astype(np.uint8))


def _four_bits(weights: Groups) -> _Encoded:
    low, high = weights.min(axis=1), weights.max(axis=1)
    minima = low.astype(np.float16)
    # The smallest value of a group is 0, and the largest is nearly always 15: nearly all groups
    # of a matrix that was in 4 bits are found at once.
    scales, values, exact = _in_steps(weights, low, high, 15)
    if exact.mean() < 0.5:
        raise EncodingError(f"{1 - exact.mean():.0%} of the matrix is not in groups of 4 bits")
    for largest in range(14, 0, -1):
        if exact.all():
            break
        places = np.nonzero(~exact)
        some = weights.swapaxes(1, 2)[places].T[None]
        found = _in_steps(some, low[places][None], high[places][None], largest)
        (scales[places],), exact[places] = found[0], found[2][0]
        values.swapaxes(1, 2)[places] = found[1][0].T
    if not exact.all():
        raise EncodingError(f"{1 - exact.mean():.2%} of the matrix is not in groups of 4 bits")
    halves = values.reshape(*values.shape[:2], -1, 2, _BLOCK // 2)
    both = halves[..., 0, :] | halves[..., 1, :] << 4
    return _Encoded((scales, minima), both.reshape(*values.shape[:2], -1))


def _in_steps(
    weights: Groups, low: np.ndarray, high: np.ndarray, largest: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Express groups as multiples of a scale above their minimum; the maximum becomes ``largest``.

    Returns:
        The scales, the multiples, and which groups they represent up to float32 rounding.
    """
    scale = ((high - low) / np.float32(largest)).astype(np.float16)
    wide = scale.astype(np.float32)[:, None]
    start = low.astype(np.float16).astype(np.float32)[:, None]
    found = weights - start
    found /= np.maximum(wide, np.float32(1e-30))
    np.clip(np.rint(found, out=found), 0, 15, out=found)
    values = found.astype(np.uint8)
    found *= wide
    found += start
    found -= weights
    error = np.abs(found, out=found).max(axis=1)
    close = np.maximum(np.abs(low), np.abs(high)) * np.float32(1e-6)
    return scale, values, error <= close

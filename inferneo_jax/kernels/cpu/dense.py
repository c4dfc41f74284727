"""Unquantized matrices in the layout of ``native/dense_tiles.h``, and segment attention."""

from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Num

from inferneo_jax.kernels.cpu.build import Variant, chosen
from inferneo_jax.layers.mlp import gelu
from inferneo_jax.layers.norm import LayerNorm
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
from inferneo_jax.layers.segments import SegmentAttention, Segments

_BLOCK = 32
"""Outputs that are stored side by side."""

_NONE: Any = np.zeros(0, np.float32)
_NO_TABLE: Any = np.zeros((0, 0), np.float32)


@dataclass(frozen=True)
class Packed(QuantizationMethod):
    """Unquantized float32 or bfloat16 for the native kernels of a CPU, on one device.

    Products are computed in ``dtype``, or in float32 on CPUs without an instruction for it, and
    accumulated in float32. A bias, a residual, GELU and layer normalisation are part of the call.
    A row's result does not depend on the other rows.

    Attributes:
        variant: of the kernels.
    """

    padding_cost: ClassVar[float] = 0.0

    variant: Variant = "native"

    @property
    def _pack(self) -> int:
        """Inputs that are stored side by side: 4 bytes of them."""
        return 4 // self.dtype.itemsize

    def parameters(
        self, shape: tuple[int, int], axes: tuple[str | None, str | None], *, table: bool
    ) -> tuple[ParameterSpec, ...]:
        """``[blocks of outputs, packs of inputs, outputs, inputs]``, padded to whole ones."""
        if table:
            raise EncodingError("tables are not read in blocks of outputs")
        inputs, outputs = shape
        whole = -(-outputs // _BLOCK), -(-inputs // self._pack), _BLOCK, self._pack
        return (ParameterSpec(whole, self.dtype, (None,) * 4),)

    def encode(self, shard: HostArray, *, table: bool) -> tuple[HostArray, ...]:
        """Cast the shard and rearrange it into blocks."""
        (parameter,) = self.parameters((shard.shape[0], shard.shape[1]), (None, None), table=table)
        blocks, packs, outputs, inputs = parameter.shape
        missing = packs * inputs - shard.shape[0], blocks * outputs - shard.shape[1]
        whole = np.pad(shard, [(0, each) for each in missing]).astype(self.dtype)
        whole = whole.reshape(packs, inputs, blocks, outputs).transpose(2, 0, 3, 1)
        return (np.ascontiguousarray(whole),)

    def product(
        self, x: Float[Array, "rows inputs"], stored: Stored, *, table: bool
    ) -> Float[Array, "rows outputs"]:
        """``x @ matrix`` in float32, with padding after the outputs."""
        return self.multiply(x, stored, stored[0].shape[0] * _BLOCK)

    def take(self, stored: Stored, ids: Int[Array, "*ids"]) -> Float[Array, "*ids inputs"]:
        """Not supported: ``parameters`` refuses tables."""
        raise NotImplementedError

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
        """``epilogue(prologue(x) @ matrix)``, in one call if the kernel has the transform."""
        (weights,) = stored
        x = prologue(x) if prologue else x
        norm = epilogue.transform if isinstance(epilogue.transform, LayerNorm) else None
        known = epilogue.transform in (None, gelu) or norm
        live = jnp.int32(x.shape[0]) if live is None else live
        dtype = epilogue.dtype if epilogue.dtype and known and not norm else jnp.dtype("float32")
        product: Array = chosen(self.variant).call(
            "dense_linear",
            jax.ShapeDtypeStruct((x.shape[0], outputs), dtype),
            x if x.dtype == self.dtype else x.astype(jnp.float32),
            weights,
            _NONE if epilogue.bias is None else epilogue.bias,
            _NO_TABLE if epilogue.residual is None else epilogue.residual.astype(jnp.float32),
            norm.scale[...] if norm else _NONE,
            norm.bias[...] if norm else _NONE,
            live.reshape(1),
            gelu=np.int64(epilogue.transform is gelu),
            eps=np.float32(norm.eps if norm else 0),
        )
        return (
            product
            if known
            else Epilogue(transform=epilogue.transform, dtype=epilogue.dtype)(product)
        )


@dataclass(frozen=True)
class CpuSegmentAttention(SegmentAttention):
    """The reference's results from one call a layer, which computes nothing for padding.

    Products are of the numbers it gets, float32 or bfloat16, and summed in float32; scores and
    softmax are float32. What a segment gives does not depend on the others.

    Attributes:
        variant: of the kernels.
    """

    variant: Variant = "native"

    def attend(
        self, fused: Num[Array, "tokens 3 heads head_dim"], segments: Segments
    ) -> Num[Array, "tokens heads head_dim"]:
        """Each query's softmax over the keys of its segment, times their values."""
        tokens, _, heads, head_dim = fused.shape
        mixed: Array = chosen(self.variant).call(
            "segment_attention",
            jax.ShapeDtypeStruct((tokens, heads, head_dim), fused.dtype),
            fused,
            segments.cu_seqlens,
        )
        return mixed

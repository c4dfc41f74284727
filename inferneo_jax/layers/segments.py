"""Segments packed one after the other into a row of tokens, and attention within each of them."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num

_BLOCK = 128
"""Queries, and keys, that the reference takes at once."""

_NOTHING = -1e30
"""The score of a key that a query does not see."""


class Segments(NamedTuple):
    """Which tokens of a packed row belong to which segment.

    Attributes:
        cu_seqlens: cumulative lengths: the first token of each segment, then the end of the last
            one. Unused segments are empty. Tokens after the last segment are padding, whose
            results are never read.
        segment_ids: the segment of each token; the number of segments for padding.
        positions: the position of each token within its segment.
    """

    cu_seqlens: Int[Array, " segments_and_one"]
    segment_ids: Int[Array, " tokens"]
    positions: Int[Array, " tokens"]

    @classmethod
    def of(cls, cu_seqlens: Int[Array, " segments_and_one"], num_tokens: int) -> "Segments":
        """Segments with these cumulative lengths in a row of ``num_tokens``."""
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        segment_ids = (tokens[:, None] >= cu_seqlens[None, 1:]).sum(axis=1, dtype=jnp.int32)
        return cls(cu_seqlens, segment_ids, tokens - cu_seqlens[segment_ids])

    @property
    def live(self) -> Int[Array, ""]:
        """How many tokens are not padding."""
        return self.cu_seqlens[-1]

    def mean(self, x: Float[Array, "tokens embed"]) -> Float[Array, "segments embed"]:
        """The mean of each segment's vectors; zeros for an empty segment."""
        names = jnp.arange(self.cu_seqlens.shape[0] - 1, dtype=jnp.int32)
        own = (names[:, None] == self.segment_ids[None, :]).astype(jnp.float32)
        # Padding may hold NaN, and NaN times zero is NaN.
        x = jnp.where(self.segment_ids[:, None] < names.shape[0], x, 0.0)
        sums = jnp.matmul(own, x, precision=lax.Precision.HIGHEST)
        lengths = jnp.maximum(jnp.diff(self.cu_seqlens), 1).astype(jnp.float32)
        return sums / lengths[:, None]


@dataclass(frozen=True)
class SegmentAttention:
    """Attention within segments in plain XLA operations: the reference on any device.

    Each block of queries runs over the keys from the start of its first segment to the end of its
    last one, all blocks in parallel. The cost follows the segments' lengths; the shapes do not.
    """

    def attend(
        self, fused: Num[Array, "tokens 3 heads head_dim"], segments: Segments
    ) -> Num[Array, "tokens heads head_dim"]:
        """Softmax attention of each query over the keys and values of its segment.

        Args:
            fused: queries, keys and values of at most 128 tokens, or of a multiple of 128.
            segments: of the same tokens.
        """
        queries, keys, values = jnp.moveaxis(fused.astype(jnp.float32), 1, 0)
        # GPUs and TPUs would round float32 to 11 or 8 bits, as a bfloat16 encoder does anyway.
        precision = lax.Precision.HIGHEST if fused.dtype == jnp.float32 else None
        num_tokens, heads, head_dim = queries.shape
        block = min(_BLOCK, num_tokens)
        queries = queries.reshape(-1, block, heads, head_dim) * head_dim**-0.5
        segment_ids = segments.segment_ids.reshape(-1, block)
        cu_seqlens = jnp.append(
            segments.cu_seqlens, jnp.int32(num_tokens)
        )  # padding as a last segment
        first, last = cu_seqlens[segment_ids[:, 0]], cu_seqlens[segment_ids[:, -1] + 1]
        places = jnp.arange(block, dtype=jnp.int32)

        def step(i: Int[Array, ""], sums: _Sums) -> _Sums:
            begin = first + i * block
            starts = jnp.minimum(begin, num_tokens - block)
            tokens = starts[:, None] + places[None, :]
            seen = segment_ids[:, :, None] == segments.segment_ids[tokens][:, None, :]
            seen &= (tokens >= begin[:, None])[:, None, :]  # others were there before
            scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys[tokens], precision=precision)
            scores = jnp.where(seen[:, None], scores, _NOTHING)
            most = jnp.maximum(sums.most, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - most)
            old = jnp.exp(sums.most - most)
            found = jnp.einsum("bhqk,bkhd->bhqd", weights, values[tokens], precision=precision)
            return _Sums(
                most,
                sums.weights * old + weights.sum(axis=-1, keepdims=True),
                sums.values * old + found,
            )

        shape = segment_ids.shape[0], heads, block
        nothing = _Sums(
            jnp.full((*shape, 1), _NOTHING), jnp.zeros((*shape, 1)), jnp.zeros((*shape, head_dim))
        )
        trips = (last - first + block - 1).max() // block
        sums = lax.fori_loop(jnp.zeros_like(trips), trips, step, nothing)
        mixed = jnp.moveaxis(sums.values / sums.weights, 1, 2)
        return mixed.reshape(num_tokens, heads, head_dim).astype(fused.dtype)


class _Sums(NamedTuple):
    """Of a softmax that has seen some keys: the largest score, which is taken off the others."""

    most: Float[jax.Array, "blocks heads queries 1"]
    weights: Float[jax.Array, "blocks heads queries 1"]
    values: Float[jax.Array, "blocks heads queries head_dim"]

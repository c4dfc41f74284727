"""Texts that lie one behind the other in a row of tokens, and attention within each of them."""

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


class Texts(NamedTuple):
    """Where texts lie in a row of tokens.

    Attributes:
        bounds: where each begins; behind them, where the last one ends. Those that there are not
            are empty. What lies behind the last is padding: what is made of it is never read.
        owners: the text of each token; for padding, the number of texts.
        places: of each token in its text.
    """

    bounds: Int[Array, " texts_and_one"]
    owners: Int[Array, " tokens"]
    places: Int[Array, " tokens"]

    @classmethod
    def of(cls, bounds: Int[Array, " texts_and_one"], num_tokens: int) -> "Texts":
        """Texts with these bounds in a row of so many tokens."""
        tokens = jnp.arange(num_tokens, dtype=jnp.int32)
        owners = (tokens[:, None] >= bounds[None, 1:]).sum(axis=1, dtype=jnp.int32)
        return cls(bounds, owners, tokens - bounds[owners])

    @property
    def live(self) -> Int[Array, ""]:
        """Tokens that are no padding."""
        return self.bounds[-1]

    def mean(self, x: Float[Array, "tokens embed"]) -> Float[Array, "texts embed"]:
        """The mean of each text's vectors; zeros where there is no text."""
        names = jnp.arange(self.bounds.shape[0] - 1, dtype=jnp.int32)
        own = (names[:, None] == self.owners[None, :]).astype(jnp.float32)
        # Padding may be anything, and no number times zero is no number.
        x = jnp.where(self.owners[:, None] < names.shape[0], x, 0.0)
        sums = jnp.matmul(own, x, precision=lax.Precision.HIGHEST)
        lengths = jnp.maximum(jnp.diff(self.bounds), 1).astype(jnp.float32)
        return sums / lengths[:, None]


@dataclass(frozen=True)
class TextAttention:
    """Attention within texts, in plain XLA operations: the reference, which runs on any device.

    Blocks of queries each run over the keys from their first text's beginning to their last one's
    end, all blocks side by side: cost follows the lengths of texts, and shapes do not.
    """

    def attend(
        self, fused: Num[Array, "tokens 3 heads head_dim"], texts: Texts
    ) -> Num[Array, "tokens heads head_dim"]:
        """Softmax of scaled products of each query with the keys of its text, times their values.

        Args:
            fused: queries, keys and values. Tokens are at most 128, or a multiple of that.
            texts: where they lie.
        """
        queries, keys, values = jnp.moveaxis(fused.astype(jnp.float32), 1, 0)
        num_tokens, heads, head_dim = queries.shape
        block = min(_BLOCK, num_tokens)
        queries = queries.reshape(-1, block, heads, head_dim) * head_dim**-0.5
        owners = texts.owners.reshape(-1, block)
        bounds = jnp.append(texts.bounds, jnp.int32(num_tokens))  # padding as a last text
        first, last = bounds[owners[:, 0]], bounds[owners[:, -1] + 1]
        places = jnp.arange(block, dtype=jnp.int32)

        def step(i: Int[Array, ""], sums: _Sums) -> _Sums:
            begin = first + i * block
            starts = jnp.minimum(begin, num_tokens - block)
            tokens = starts[:, None] + places[None, :]
            seen = owners[:, :, None] == texts.owners[tokens][:, None, :]
            seen &= (tokens >= begin[:, None])[:, None, :]  # others were there before
            scores = jnp.einsum("bqhd,bkhd->bhqk", queries, keys[tokens])
            scores = jnp.where(seen[:, None], scores, _NOTHING)
            most = jnp.maximum(sums.most, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - most)
            old = jnp.exp(sums.most - most)
            found = jnp.einsum("bhqk,bkhd->bhqd", weights, values[tokens])
            return _Sums(
                most,
                sums.weights * old + weights.sum(axis=-1, keepdims=True),
                sums.values * old + found,
            )

        shape = owners.shape[0], heads, block
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

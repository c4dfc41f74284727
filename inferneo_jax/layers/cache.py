"""The KV cache: pages of keys and values, how a step writes them and attends to them.

Every layer has one pair of arrays ``[pages, kv_heads, page_len, head_dim]``, allocated once,
donated to each step and returned by it. A request's block table lists the pages that hold its
positions, in order. The host decides which page belongs to which request
(``scheduler/block_pool.py``). Page 0 belongs to none: padding writes there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Num, Shaped

from inferneo_jax.config import DecoderConfig
from inferneo_jax.layers.quantization import quantize
from inferneo_jax.layers.rope import rotate

_MASKED = -1e30
"""Finite, so that a row whose keys are all masked gives numbers and not NaN."""

_E4M3_MAX = 448.0


class LayerCache(NamedTuple):
    """Keys and values of one layer.

    int8 caches carry float32 scales, one for each token and KV head: 4 bytes beside ``head_dim``.
    They lie along the last axis because scores do too, and pages and KV heads come first so that
    they are sharded as the keys are. A TPU pads that axis to 128: nothing is lost at ``page_len``
    128, and at 16 a scale costs 32 bytes.
    """

    keys: Num[Array, "pages kv_heads page_len head_dim"]
    values: Num[Array, "pages kv_heads page_len head_dim"]
    key_scales: Float[Array, "pages kv_heads 1 page_len"] | None = None
    value_scales: Float[Array, "pages kv_heads 1 page_len"] | None = None


KVCache = list[LayerCache]


def read_pages(cache: KVCache, pages: Int[Array, " count"]) -> KVCache:
    """Copies of some pages: as many as there are numbers, in their order."""
    return jax.tree.map(lambda array: jnp.take(array, pages, axis=0, mode="clip"), cache)


def write_pages(cache: KVCache, pages: Int[Array, " count"], contents: KVCache) -> KVCache:
    """Replace the contents of some pages; numbers beyond the last page are left out."""
    return jax.tree.map(lambda old, new: old.at[pages].set(new, mode="drop"), cache, contents)


class AttentionVariant(NamedTuple):
    """How the attention of one layer differs from plain causal softmax attention.

    Attributes:
        window: a token attends to its own position and to the ``window - 1`` before it
            (arXiv:2004.05150); None: to all of them.
        softcap: scores are bounded by it, ``softcap * tanh(scores / softcap)``
            (arXiv:2408.00118); None: they are not.
        sinks: a logit of each query head that takes part in its softmax without a value
            (arXiv:2309.17453); None: there are none.
    """

    window: int | None = None
    softcap: float | None = None
    sinks: Float[Array, "kv_heads group"] | None = None

    @property
    def plain(self) -> bool:
        """Whether it differs in nothing."""
        return self.window is None and self.softcap is None and self.sinks is None


PLAIN = AttentionVariant()


class AttentionMetadata(NamedTuple):
    """Where the tokens of a step lie in the cache: all that attention knows of a batch.

    A token attends to the keys at its own position and before.

    Attributes:
        block_tables: the pages of each row in order of position, 0 where it holds none.
        positions: of each token in its sequence.
        lengths: how many tokens of each row are not padding; None if none is. Results of padding
            are never read.
    """

    block_tables: Int[Array, "rows max_pages"]
    positions: Int[Array, "rows tokens"]
    lengths: Int[Array, " rows"] | None = None

    def live(self) -> Bool[Array, "rows tokens"]:
        """Which tokens are not padding."""
        tokens = self.positions.shape[1]
        if self.lengths is None:
            return jnp.ones(self.positions.shape, bool)
        return jnp.arange(tokens, dtype=jnp.int32)[None, :] < self.lengths[:, None]


class MixedMetadata(NamedTuple):
    """The rows of several batches in one step: their tokens lie one after the other, in one row.

    Attributes:
        batches: each with its own numbers of rows and tokens.
    """

    batches: tuple[AttentionMetadata, ...]

    @property
    def positions(self) -> Int[Array, "1 tokens"]:
        """Of each token in its sequence."""
        return _in_one_row([batch.positions for batch in self.batches])

    def live(self) -> Bool[Array, "1 tokens"]:
        """Which tokens are not padding."""
        return _in_one_row([batch.live() for batch in self.batches])


def _in_one_row(each: Sequence[Shaped[Array, "_ _ ..."]]) -> Shaped[Array, "1 tokens ..."]:
    return jnp.concatenate([x.reshape(1, -1, *x.shape[2:]) for x in each], axis=1)


@dataclass(frozen=True)
class PagedAttention:
    """Attention over paged keys and values in plain XLA operations: the reference on any platform.

    Pages are gathered ``block_len`` positions at a time inside a loop that ends with the longest
    live row, under an online softmax (arXiv:1805.02867, arXiv:2205.14135). So the work follows the
    live lengths, one program serves all of them, and only a block's worth of pages is ever copied.
    """

    kv_heads: int
    head_dim: int
    page_len: int
    dtype: jnp.dtype
    block_len: int = 128

    def init(self, config: DecoderConfig, num_pages: int) -> KVCache:
        """Zeroed arrays for ``num_pages`` pages in every layer."""
        shape = (num_pages, self.kv_heads, self.page_len, self.head_dim)
        scales = (num_pages, self.kv_heads, 1, self.page_len)
        return [self._init_layer(shape, shape, scales) for _ in range(config.num_layers)]

    def _init_layer(
        self, keys: tuple[int, ...], values: tuple[int, ...], scales: tuple[int, ...]
    ) -> LayerCache:
        layer = LayerCache(jnp.zeros(keys, self.dtype), jnp.zeros(values, self.dtype))
        if self.dtype != jnp.int8:
            return layer
        return layer._replace(
            key_scales=jnp.zeros(scales, jnp.float32), value_scales=jnp.zeros(scales, jnp.float32)
        )

    def run(
        self,
        fused: Float[Array, "rows tokens kv_heads entries head_dim"],
        rope: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
        cache: LayerCache,
        metadata: AttentionMetadata | MixedMetadata,
    ) -> tuple[Float[Array, "rows tokens kv_heads group head_dim"], LayerCache]:
        """As ``step``; one batch after the other, where there are several."""
        if isinstance(metadata, AttentionMetadata):
            return self.step(fused, rope, cache, metadata)
        mixed, start = [], 0
        for batch in metadata.batches:
            end = start + batch.positions.size
            own = [
                x[:, start:end].reshape(batch.positions.shape + x.shape[2:]) for x in (fused, *rope)
            ]
            each, cache = self.step(own[0], (own[1], own[2]), cache, batch)
            mixed.append(each)
            start = end
        return _in_one_row(mixed), cache

    def step(
        self,
        fused: Float[Array, "rows tokens kv_heads entries head_dim"],
        rope: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
        cache: LayerCache,
        metadata: AttentionMetadata,
        variant: AttentionVariant = PLAIN,
    ) -> tuple[Float[Array, "rows tokens kv_heads group head_dim"], LayerCache]:
        """Rotate queries and keys, write keys and values, and attend.

        The entries of a KV head are its group's queries, its key and its value.
        """
        queries, keys = rotate(fused[..., :-2, :], *rope), rotate(fused[..., -2, :], *rope)
        cache = self.write(cache, keys, fused[..., -1, :], metadata)
        return self.attend(queries, cache, metadata, variant), cache

    def write(
        self,
        cache: LayerCache,
        keys: Float[Array, "rows tokens kv_heads head_dim"],
        values: Float[Array, "rows tokens kv_heads head_dim"],
        metadata: AttentionMetadata,
    ) -> LayerCache:
        """Put each token's key and value at its position; in place when the cache is donated."""
        index = metadata.positions // self.page_len
        pages = jnp.take_along_axis(metadata.block_tables, index, axis=1, mode="fill", fill_value=0)
        offsets = metadata.positions % self.page_len
        key_scales, value_scales = cache.key_scales, cache.value_scales
        if key_scales is not None and value_scales is not None:
            keys, new_key_scales = quantize(keys)
            values, new_value_scales = quantize(values)
            key_scales = key_scales.at[pages, :, 0, offsets].set(new_key_scales)
            value_scales = value_scales.at[pages, :, 0, offsets].set(new_value_scales)
        return LayerCache(
            cache.keys.at[pages, :, offsets].set(narrow(keys, self.dtype)),
            cache.values.at[pages, :, offsets].set(narrow(values, self.dtype)),
            key_scales,
            value_scales,
        )

    def attend(
        self,
        queries: Float[Array, "rows tokens kv_heads group head_dim"],
        cache: LayerCache,
        metadata: AttentionMetadata,
        variant: AttentionVariant = PLAIN,
    ) -> Float[Array, "rows tokens kv_heads group head_dim"]:
        """Softmax of scaled products over the keys at or before each token's position.

        ``variant`` says which of these keys, and how their scores are changed.
        """
        rows, tokens, kv_heads, group, head_dim = queries.shape
        heads_first = queries.transpose(0, 2, 3, 1, 4) * head_dim**-0.5
        queries = heads_first.reshape(rows, kv_heads, group * tokens, head_dim)
        last_seen = jnp.tile(metadata.positions, (1, group))[:, None, :, None]

        pages_per_block = min(
            max(self.block_len // self.page_len, 1), metadata.block_tables.shape[1]
        )
        block_len = pages_per_block * self.page_len
        block_tables = _pad_to_multiple(metadata.block_tables, pages_per_block)
        num_blocks = jnp.max(metadata.positions) // block_len + 1
        first_block = jnp.zeros_like(num_blocks)
        if variant.window is not None:
            first_seen = jnp.min(metadata.positions) - (variant.window - 1)
            first_block = jnp.maximum(first_seen, 0) // block_len

        def block(
            i: Int[Array, ""], carry: tuple[Array, Array, Array]
        ) -> tuple[Array, Array, Array]:
            peak, total, mixed = carry
            ids = lax.dynamic_slice_in_dim(
                block_tables, i * pages_per_block, pages_per_block, axis=1
            )
            keys = _gather(cache.keys, cache.key_scales, ids)
            values = _gather(cache.values, cache.value_scales, ids)
            scores = _product("rkqd,rkpd->rkqp", queries, keys)
            if variant.softcap is not None:
                scores = variant.softcap * jnp.tanh(scores / variant.softcap)
            position = (i * block_len + jnp.arange(block_len))[None, None, None, :]
            seen = position <= last_seen
            if variant.window is not None:
                seen &= position > last_seen - variant.window
            scores = jnp.where(seen, scores, _MASKED)
            new_peak = jnp.maximum(peak, scores.max(axis=-1, keepdims=True))
            weights = jnp.exp(scores - new_peak)
            decay = jnp.exp(peak - new_peak)
            total = total * decay + weights.sum(axis=-1, keepdims=True)
            mixed = mixed * decay + _product("rkqp,rkpd->rkqd", weights, values)
            return new_peak, total, mixed

        column = jnp.zeros((rows, kv_heads, group * tokens, 1), jnp.float32)
        peak, total = column + _MASKED, column
        if variant.sinks is not None:
            sinks = jnp.repeat(variant.sinks.astype(jnp.float32), tokens, axis=1)
            peak, total = column + sinks[None, :, :, None], column + 1
        start = (peak, total, jnp.zeros(queries.shape, jnp.float32))
        _, total, mixed = lax.fori_loop(first_block, num_blocks, block, start)
        mixed = (mixed / total).reshape(rows, kv_heads, group, tokens, head_dim)
        return mixed.transpose(0, 3, 1, 2, 4)


_product = partial(jnp.einsum, precision=lax.Precision.HIGHEST)
"""GPUs and TPUs would round float32 to 11 or 8 bits otherwise."""


def narrow(x: Num[Array, "*shape"], dtype: jnp.dtype) -> Num[Array, "*shape"]:
    """``x`` in the type of a cache; what exceeds the range of E4M3 becomes its largest number.

    Conversion alone would make NaN of it (arXiv:2209.05433).
    """
    if dtype == jnp.float8_e4m3fn:
        x = jnp.clip(x, -_E4M3_MAX, _E4M3_MAX)
    return x.astype(dtype)


def _gather(
    pages: Num[Array, "pages kv_heads page_len head_dim"],
    scales: Float[Array, "pages kv_heads 1 page_len"] | None,
    ids: Int[Array, "rows block_pages"],
) -> Float[Array, "rows kv_heads positions head_dim"]:
    rows, _ = ids.shape
    _, kv_heads, _, head_dim = pages.shape
    gathered = jnp.take(pages, ids, axis=0, mode="clip").swapaxes(1, 2)
    gathered = gathered.reshape(rows, kv_heads, -1, head_dim).astype(jnp.float32)
    if scales is None:
        return gathered
    of_tokens = jnp.take(scales, ids, axis=0, mode="clip").swapaxes(1, 2)
    return gathered * of_tokens.reshape(rows, kv_heads, -1, 1)


def _pad_to_multiple(block_tables: Int[Array, "rows pages"], of: int) -> Int[Array, "rows padded"]:
    return jnp.pad(block_tables, ((0, 0), (0, -block_tables.shape[1] % of)))

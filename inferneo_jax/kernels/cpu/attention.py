"""Paged attention on CPUs: ``native/paged_attention.cc`` reads and writes pages in place.

The arrays have the shapes of the reference; within a page, keys and values lie as
``native/paged_call.h`` says.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from inferneo_jax.config import DecoderConfig
from inferneo_jax.kernels.cpu.build import Variant, chosen
from inferneo_jax.layers.cache import (
    PLAIN,
    AttentionMetadata,
    AttentionVariant,
    KVCache,
    LayerCache,
    PagedAttention,
)

BLOCK = 16
"""Positions, and numbers of a head, that the kernels take together."""

_MOST_DIMS = 1024


@dataclass(frozen=True)
class CpuPagedAttention(PagedAttention):
    """The reference's results, from one call a layer that rotates, writes and attends.

    Products are of float32, or of bfloat16 factors where the cache and the CPU have these, summed
    in float32. A query's result depends neither on the others nor on the number of threads.
    Positions without a page, as padding has them, are not written, and give zeros.

    Attributes:
        variant: of the kernels.
    """

    variant: Variant = "native"

    @staticmethod
    def fits(head_dim: int, page_len: int) -> bool:
        """Whether the kernels can be used with such heads and pages."""
        return head_dim % BLOCK == 0 and page_len % BLOCK == 0 and head_dim <= _MOST_DIMS

    def init(self, config: DecoderConfig, num_pages: int) -> KVCache:
        """Arrays for ``num_pages`` pages in every layer, whose memory is taken as it is written.

        What they hold before is arbitrary, and never read.
        """
        pages = (num_pages, self.kv_heads, self.page_len, self.head_dim)
        scales = (num_pages, self.kv_heads, 1, self.page_len)
        shapes = [jax.ShapeDtypeStruct(pages, self.dtype)] * 2
        if self.dtype == jnp.int8:
            shapes += [jax.ShapeDtypeStruct(scales, jnp.float32)] * 2
        return [
            # The number keeps XLA from taking the layers' for one and the same.
            LayerCache(*chosen(self.variant).call("attention_pages", shapes, layer=np.int64(layer)))
            for layer in range(config.num_layers)
        ]

    def step(
        self,
        fused: Float[Array, "rows tokens kv_heads entries head_dim"],
        rope: tuple[Float[Array, "rows tokens half"], Float[Array, "rows tokens half"]],
        cache: LayerCache,
        metadata: AttentionMetadata,
        variant: AttentionVariant = PLAIN,
    ) -> tuple[Float[Array, "rows tokens kv_heads group head_dim"], LayerCache]:
        """Rotate queries and keys, write keys and values, and attend.

        Raises:
            ValueError: ``variant`` is not plain.
        """
        _check(variant)
        return self._step(fused, rope, cache, metadata)

    def write(
        self,
        cache: LayerCache,
        keys: Float[Array, "rows tokens kv_heads head_dim"],
        values: Float[Array, "rows tokens kv_heads head_dim"],
        metadata: AttentionMetadata,
    ) -> LayerCache:
        """Put each token's key and value at its position; in place when the cache is donated."""
        _, cache = self._step(jnp.stack([keys, values], axis=3), _NO_ANGLES, cache, metadata)
        return cache

    def attend(
        self,
        queries: Float[Array, "rows tokens kv_heads group head_dim"],
        cache: LayerCache,
        metadata: AttentionMetadata,
        variant: AttentionVariant = PLAIN,
    ) -> Float[Array, "rows tokens kv_heads group head_dim"]:
        """Softmax of scaled products over all keys at or before each token's position.

        Raises:
            ValueError: ``variant`` is not plain.
        """
        _check(variant)
        return chosen(self.variant).call(
            "attention_attend",
            jax.ShapeDtypeStruct(queries.shape, jnp.float32),
            queries.astype(jnp.float32),
            *_places(metadata),
            _NO_ANGLES[0],
            *_arrays(cache),
        )

    def _step(
        self, fused: Any, rope: Any, cache: LayerCache, metadata: AttentionMetadata
    ) -> tuple[Array, LayerCache]:
        arrays = _arrays(cache)
        group = fused.shape[3] - 2
        mixed = (*fused.shape[:3], group, fused.shape[4])
        places = _places(metadata)
        first = 1 + len(rope) + len(places)
        mixed, *written = chosen(self.variant).call(
            "attention_step",
            [
                jax.ShapeDtypeStruct(mixed, jnp.float32),
                *(jax.ShapeDtypeStruct(each.shape, each.dtype) for each in arrays),
            ],
            fused.astype(jnp.float32),
            *rope,
            *places,
            *arrays,
            aliases={first + i: 1 + i for i in range(len(arrays))},
            group=np.int64(group),
        )
        keys, values, *scales = written
        return mixed, LayerCache(keys, values, *(scales if self.dtype == jnp.int8 else ()))


_NO_ANGLES: Any = (np.zeros((0, 0, 0), np.float32),) * 2
_NO_SCALES: Any = np.zeros(0, np.float32)


def _check(variant: AttentionVariant) -> None:
    if not variant.plain:
        raise ValueError(
            "the CPU kernels know no attention with a window, a soft cap or sinks; "
            "set kernels to xla"
        )


def _places(metadata: AttentionMetadata) -> tuple[Array, Array]:
    """Page block_tables, and positions with -1 for padding: neither written nor attended with."""
    return metadata.block_tables, jnp.where(metadata.live(), metadata.positions, -1)


def _arrays(cache: LayerCache) -> list[Array]:
    return [_NO_SCALES if each is None else each for each in cache]

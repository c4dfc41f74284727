"""Paged attention on TPUs, in Pallas: only live pages are read, and in place.

The arrays are shaped so that a TPU keeps them row by row, 128 lanes wide, and wastes as little as
it can. A last axis below 128 would let XLA choose another order of the axes, in which a page is
no longer one piece.
"""

from dataclasses import dataclass

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from inferneo_jax.config import DecoderConfig
from inferneo_jax.kernels.tpu.attend import Plan, attend_pages
from inferneo_jax.kernels.tpu.write import write_pages
from inferneo_jax.layers.cache import (
    PLAIN,
    AttentionMetadata,
    AttentionVariant,
    KVCache,
    LayerCache,
    PagedAttention,
    narrow,
)
from inferneo_jax.layers.quantization import quantize

_LANES = 128


@dataclass(frozen=True)
class TpuPagedAttention(PagedAttention):
    """The reference's results, from kernels that read and write pages where they lie.

    Heads of up to 64 share their 128 lanes: ``keys`` holds key and value side by side, and
    ``values`` is empty. Longer heads are padded to the next multiple of 128.

    Up to ``block_len`` positions are copied at once. ``interpret`` runs the kernels on any
    platform, slowly, which is for tests.
    """

    block_len: int = 4096
    interpret: bool = False

    @property
    def packed(self) -> bool:
        """Whether keys and values share one array."""
        return 2 * self.head_dim <= _LANES

    def init(self, config: DecoderConfig, num_pages: int) -> KVCache:
        """Zeroed arrays for ``num_pages`` pages in every layer; their bytes include all padding."""
        heads, lanes = (num_pages, self.kv_heads), _whole_lanes(self.head_dim)
        keys = (*heads, self.page_len, lanes)
        values = (*heads, self.page_len, 0 if self.packed else lanes)
        scales = (*heads, 1, _whole_lanes(self.page_len))
        return [self._init_layer(keys, values, scales) for _ in range(config.num_layers)]

    def write(
        self,
        cache: LayerCache,
        keys: Float[Array, "rows tokens kv_heads head_dim"],
        values: Float[Array, "rows tokens kv_heads head_dim"],
        metadata: AttentionMetadata,
    ) -> LayerCache:
        """Put each token's key and value at its position; in place when the cache is donated.

        A row's positions must be consecutive.
        """
        scales: list[Array] = []
        if cache.key_scales is not None:
            (keys, key_scales), (values, value_scales) = quantize(keys), quantize(values)
            scales = [key_scales, value_scales]
        keys, values = narrow(keys, self.dtype), narrow(values, self.dtype)
        both = [jnp.concatenate([keys, values], axis=-1)] if self.packed else [keys, values]
        data, old_scales = self._arrays(cache)
        data, scales = write_pages(
            (data, old_scales),
            ([_pad_lanes(new) for new in both], scales),
            metadata,
            interpret=self.interpret,
        )
        keys, values = (data[0], cache.values) if self.packed else data
        return LayerCache(keys, values, *scales)

    def attend(
        self,
        queries: Float[Array, "rows tokens kv_heads group head_dim"],
        cache: LayerCache,
        metadata: AttentionMetadata,
        variant: AttentionVariant = PLAIN,
    ) -> Float[Array, "rows tokens kv_heads group head_dim"]:
        """Softmax of scaled products over the keys that each token sees.

        A row's positions must be consecutive. Products are in float32 for a float32 cache, else
        of bfloat16 factors, summed in float32.
        """
        rows, tokens, kv_heads, group, head_dim = queries.shape
        dtype = jnp.float32 if self.dtype == jnp.float32 else jnp.bfloat16
        scaled = (queries.astype(jnp.float32) * head_dim**-0.5).astype(dtype)
        flat = scaled.transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, tokens * group, head_dim)
        data, scales = self._arrays(cache)
        plan = Plan.make(flat.shape, group, data, metadata, variant, self.block_len)
        mixed = attend_pages(
            plan,
            _pad_lanes(flat),
            (data, scales),
            metadata,
            variant.sinks,
            interpret=self.interpret,
        )
        first = head_dim if self.packed else 0
        mixed = mixed[..., first : first + head_dim]
        return mixed.reshape(rows, kv_heads, tokens, group, head_dim).transpose(0, 2, 1, 3, 4)

    def _arrays(self, cache: LayerCache) -> tuple[list[Array], list[Array]]:
        """The arrays of pages and those of scales, which stay in the TPU's main memory.

        Left to itself XLA brings whole ones of a small cache to VMEM, and back, around a kernel
        that touches a few of their pages.
        """
        data = [cache.keys] if self.packed else [cache.keys, cache.values]
        scales = [a for a in (cache.key_scales, cache.value_scales) if a is not None]
        return [self._in_hbm(a) for a in data], [self._in_hbm(a) for a in scales]

    def _in_hbm(self, array: Array) -> Array:
        return array if self.interpret else pltpu.with_memory_space_constraint(array, pltpu.HBM)


def _whole_lanes(length: int) -> int:
    return -(-length // _LANES) * _LANES


def _pad_lanes(x: Array) -> Array:
    return jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % _LANES)])

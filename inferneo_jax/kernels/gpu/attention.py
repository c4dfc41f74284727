"""Paged attention on NVIDIA GPUs: only live pages are read, and in place."""

from collections.abc import Callable
from dataclasses import dataclass

from jaxtyping import Array, Float

from inferneo_jax.kernels.gpu import mosaic, triton
from inferneo_jax.layers.cache import (
    PLAIN,
    AttentionMetadata,
    AttentionVariant,
    LayerCache,
    PagedAttention,
)


@dataclass(frozen=True)
class GpuPagedAttention(PagedAttention):
    """Attention over paged keys and values that reads only live pages, where they lie.

    Products are taken in bfloat16 unless the cache is float32, sums and the softmax always in
    float32. With ``interpret`` the kernels run on any platform, slowly; inside ``jax.shard_map``
    that needs ``check_vma=False``.
    """

    interpret: bool = False

    def attend(
        self,
        queries: Float[Array, "rows tokens kv_heads group head_dim"],
        cache: LayerCache,
        metadata: AttentionMetadata,
        variant: AttentionVariant = PLAIN,
    ) -> Float[Array, "rows tokens kv_heads group head_dim"]:
        """Softmax of scaled products over the keys that each token sees."""
        if kernel := self._kernel(queries.shape[1] * queries.shape[3], cache):
            return kernel(queries, cache, metadata, variant, interpret=self.interpret)
        return super().attend(queries, cache, metadata, variant)

    def _kernel(self, query_rows: int, cache: LayerCache) -> Callable[..., Array] | None:
        """The kernel for so many query rows of a KV head; None: there is none."""
        # Up to 4 GiB an array is indexed by signed 32-bit integers, which such a one overflows.
        overflows = cache.keys.dtype.itemsize == 1 and cache.keys.size >= 2**31
        return None if overflows else triton.attend


@dataclass(frozen=True)
class HopperPagedAttention(GpuPagedAttention):
    """The same, from a kernel of warpgroup products where the cache is bfloat16.

    A row's positions must be consecutive.
    """

    def _kernel(self, query_rows: int, cache: LayerCache) -> Callable[..., Array] | None:
        if mosaic.fits(self.head_dim, self.page_len, cache.keys.dtype, query_rows):
            return mosaic.attend
        return super()._kernel(query_rows, cache)

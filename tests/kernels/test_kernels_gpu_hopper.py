"""The attention kernel for Hopper GPUs, interpreted on CPU, against the reference.

Interpreted, copies, barriers and masks are those of the GPU; products of a warpgroup are not.
"""

from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.kernels import attention_for
from inferneo_jax.kernels.gpu import mosaic
from inferneo_jax.kernels.gpu.attention import GpuPagedAttention, HopperPagedAttention
from inferneo_jax.layers.cache import (
    PLAIN,
    AttentionMetadata,
    AttentionVariant,
    LayerCache,
    PagedAttention,
)

F32, BF16, INT8 = map(jnp.dtype, ("float32", "bfloat16", "int8"))
ALL = AttentionVariant(window=100, softcap=3.0, sinks=jnp.asarray([[0.5, -1.0, 2.0]], F32))
# Interpreted kernels are long programs for small arrays.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SINKS = AttentionVariant(sinks=ALL.sinks)


@pytest.mark.parametrize(
    ("head_dim", "page_len", "tokens", "variant"),
    [(64, 16, 1, SINKS), (64, 64, 24, PLAIN), (128, 16, 1, ALL), (256, 16, 24, ALL)],
)
def test_equals_the_reference_and_reads_live_pages_only(
    head_dim: int, page_len: int, tokens: int, variant: AttentionVariant
) -> None:
    rng = np.random.default_rng(head_dim)
    max_pages = 320 // page_len
    block_tables = rng.permutation(np.arange(1, 2 * max_pages + 1)).reshape(2, -1).astype(np.int32)
    positions = np.asarray([[310 - tokens], [3]], np.int32) + np.arange(tokens, dtype=np.int32)
    live = np.zeros(2 * max_pages + 1, bool)
    for table, last in zip(block_tables, positions[:, -1], strict=True):
        live[table[: last // page_len + 1]] = True
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), F32)  # noqa: E731
    keys, values = (draw(len(live), 1, page_len, head_dim).astype(BF16) for _ in range(2))
    queries = draw(2, tokens, 1, 3, head_dim)
    metadata = AttentionMetadata(jnp.asarray(block_tables), jnp.asarray(positions))
    reference = PagedAttention(1, head_dim, page_len, BF16)
    expected = reference.attend(queries, LayerCache(keys, values), metadata, variant)

    dead = jnp.asarray(~live)[:, None, None, None]
    cache = LayerCache(*(jnp.where(dead, jnp.nan, each) for each in (keys, values)))
    hopper = HopperPagedAttention(1, head_dim, page_len, BF16, interpret=True)
    attend = jax.jit(partial(hopper.attend, variant=variant), compiler_options=QUICKLY)
    got = attend(queries, cache, metadata)
    assert got.dtype == F32
    np.testing.assert_allclose(got, expected, atol=1e-2, rtol=1e-2)


@pytest.mark.parametrize(("dtype", "tokens", "used"), [(BF16, 1, 0), (BF16, 99, 1), (INT8, 99, 0)])
def test_heads_of_256_are_for_it_where_queries_are_many(
    dtype: np.dtype, tokens: int, used: int
) -> None:
    assert mosaic.fits(256, 16, dtype, tokens * 3) == used
    assert mosaic.fits(128, 16, dtype, tokens * 3) == (dtype == BF16)


def test_only_hopper_has_it() -> None:
    kinds = {"8.0": GpuPagedAttention, "9.0": HopperPagedAttention, "10.0": GpuPagedAttention}
    for capability, kind in kinds.items():
        device: Any = SimpleNamespace(
            platform="cuda", compute_capability=capability, device_kind="one"
        )
        assert attention_for(device, "auto", head_dim=128, page_len=16) is kind


@pytest.mark.parametrize(("head_dim", "tokens"), [(64, 1), (128, 1), (128, 256), (256, 256)])
def test_lowers_without_a_gpu(head_dim: int, tokens: int) -> None:
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct(sizes, dtype)  # noqa: E731
    pages = shape(BF16, 65, 1, 16, head_dim)
    metadata = AttentionMetadata(shape(jnp.int32, 2, 16), shape(jnp.int32, 2, tokens))
    attend = partial(mosaic.attend, variant=ALL, interpret=False)
    queries = shape(F32, 2, tokens, 1, 3, head_dim)
    traced = jax.jit(attend).trace(queries, LayerCache(pages, pages), metadata)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()

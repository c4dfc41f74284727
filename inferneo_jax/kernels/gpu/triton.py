"""Paged attention by Pallas kernels that Triton compiles: for GPUs since Ampere.

One program of the grid takes a block of queries that share a KV head and walks a segment of their
row's live positions, some at a time, under an online softmax (arXiv:1805.02867, arXiv:2307.08691),
looking up each position's page in the row's table: nothing is gathered beforehand, no dead page is
read. A second kernel joins the segments of a row.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from inferneo_jax.kernels.gpu.work import MULTIPROCESSORS, Shares, Work, list_work, share_out
from inferneo_jax.layers.cache import AttentionMetadata, AttentionVariant, LayerCache

MASKED = -1e30
"""Finite, so that a program whose keys are all masked gives numbers and not NaN."""

TINY = 1e-30
LOG2_E = math.log2(math.e)


class Blocks(NamedTuple):
    """How a program cuts its work: static, so that one program serves all live lengths."""

    queries: int
    positions: int
    dims: int
    warps: int
    stages: int


def cut(shape: tuple[int, ...], dtype: jnp.dtype) -> Blocks:
    """Blocks for queries ``[rows, tokens, kv_heads, group, head_dim]``.

    Tensor cores take no fewer than 16 queries, and Triton only powers of two.
    """
    rows, tokens, kv_heads, group, head_dim = shape
    dims = max(pl.next_power_of_2(head_dim), 16)
    programs = rows * kv_heads * pl.cdiv(tokens * group, 64)
    if dtype == jnp.float32:  # on plain cores: more would spill their registers
        most, positions, stages = 16, min(64, 4096 // dims), 2
    else:
        most = 128 if dims <= 128 and programs >= 2 * MULTIPROCESSORS else 64
        positions = min(64, 8192 // dims)
        stages = 3 if dims <= 128 else 2  # within 99 KiB of shared memory, for all since Ampere
    queries = min(max(pl.next_power_of_2(tokens * group), 16), most)
    warps = 8 if queries * dims > 8192 else 4
    return Blocks(queries, positions, dims, warps, stages)


def attend(
    queries: Float[Array, "rows tokens kv_heads group head_dim"],
    cache: LayerCache,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
    *,
    interpret: bool,
) -> Float[Array, "rows tokens kv_heads group head_dim"]:
    """Softmax of scaled products over the keys that each token sees, reading live pages only."""
    _, tokens, kv_heads, group, _ = queries.shape
    max_len = metadata.block_tables.shape[1] * cache.keys.shape[2]
    blocks = cut(queries.shape, cache.keys.dtype)
    shares = share_out(queries.shape, blocks.queries, max_len, variant.window)
    work = list_work(shares, metadata, max_len, variant.window, blocks.positions)
    partials = (shares.items, *queries.shape[1:])
    varies = jax.typeof(queries).mat
    sinks = [] if variant.sinks is None else [variant.sinks.astype(jnp.float32)]
    outputs, log_totals = pl.pallas_call(
        partial(_attend, blocks, variant._replace(sinks=None), bool(sinks)),
        grid=(pl.cdiv(tokens * group, blocks.queries), kv_heads, shares.items),
        out_shape=[
            jax.ShapeDtypeStruct(partials, jnp.float32, manual_axis_type=varies),
            jax.ShapeDtypeStruct(partials[:-1], jnp.float32, manual_axis_type=varies),
        ],
        compiler_params=plt.CompilerParams(num_warps=blocks.warps, num_stages=blocks.stages),
        interpret=interpret,
        name="paged_attention",
    )(
        *work[:3],
        metadata.block_tables,
        metadata.positions,
        *sinks,
        queries,
        cache.keys,
        cache.values,
        *_scales(cache),
    )
    if not shares.split:
        return outputs
    return join(shares, work, outputs, log_totals, interpret=interpret)


def join(
    shares: Shares,
    work: Work,
    outputs: Float[Array, "items tokens kv_heads group head_dim"],
    log_totals: Float[Array, "items tokens kv_heads group"],
    *,
    interpret: bool,
) -> Float[Array, "rows tokens kv_heads group head_dim"]:
    """The mean of the outputs of each row's segments, weighed by their parts of the softmax's sum.

    ``log_totals`` are base-2 logarithms of these parts.
    """
    _, tokens, kv_heads, group, head_dim = outputs.shape
    shape = (shares.rows, *outputs.shape[1:])
    dims = max(pl.next_power_of_2(head_dim), 16)
    queries = min(pl.next_power_of_2(tokens * group), max(2048 // dims, 1))
    return pl.pallas_call(
        partial(_join, queries, dims),
        grid=(pl.cdiv(tokens * group, queries), kv_heads, shares.rows),
        out_shape=jax.ShapeDtypeStruct(
            shape, jnp.float32, manual_axis_type=jax.typeof(outputs).mat
        ),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=2),
        interpret=interpret,
        name="join_segments",
    )(work.offsets, outputs, log_totals)


def _scales(cache: LayerCache) -> tuple[Float[Array, "pages kv_heads page_len"], ...]:
    """The scales of int8 keys and values, or nothing."""
    scales = (cache.key_scales, cache.value_scales)
    return tuple(array.squeeze(2) for array in scales if array is not None)


def _attend(
    blocks: Blocks,
    variant: AttentionVariant,
    sinking: bool,
    rows: Any,
    starts: Any,
    stops: Any,
    block_tables: Any,
    positions: Any,
    *rest: Any,
) -> None:
    """The kernel: one block of one row's queries over one segment of its positions.

    All are references to whole arrays. Writes the block's ``outputs``, each normalized over its
    segment, and the base-2 logarithms of what they were divided by.
    """
    sinks, (queries, keys, values, *scales, outputs, log_totals) = (
        rest[:sinking],
        rest[sinking:],
    )
    _, tokens, _, group, head_dim = queries.shape
    page_len = keys.shape[2]
    product_dtype = jnp.float32 if keys.dtype == jnp.float32 else jnp.bfloat16
    head, item = pl.program_id(1), pl.program_id(2)
    given = plt.load(rows.at[item])
    row, start = jnp.maximum(given, 0), plt.load(starts.at[item])

    index = pl.program_id(0) * blocks.queries + jnp.arange(blocks.queries, dtype=jnp.int32)
    token, member = lax.div(index, group), lax.rem(index, group)
    real = (index < tokens * group) & (given >= 0)
    dim = jnp.arange(blocks.dims, dtype=jnp.int32)[None, :]
    inside = dim < head_dim

    place = (row, token[:, None], head, member[:, None], dim)
    query = plt.load(queries.at[place], mask=real[:, None] & inside, other=0.0)
    query = query.astype(product_dtype)
    last_seen = plt.load(positions.at[row, token], mask=real, other=-1)
    length = jnp.minimum(jnp.max(last_seen) + 1, block_tables.shape[1] * page_len)
    stop = jnp.minimum(plt.load(stops.at[item]), length)
    begin = start
    if variant.window is not None:
        first_seen = plt.load(positions.at[row, token], mask=real, other=2**30)
        skipped = jnp.maximum(jnp.min(first_seen) - (variant.window - 1) - start, 0)
        begin = start + lax.div(skipped, blocks.positions) * blocks.positions

    def positions_of(i: Array) -> Array:
        return begin + i * blocks.positions + jnp.arange(blocks.positions, dtype=jnp.int32)

    def pages_of(i: Array) -> Array:
        position = positions_of(i)
        at = block_tables.at[row, lax.div(position, page_len)]
        return plt.load(at, mask=position < stop, other=0)

    # Pages are looked up a turn ahead, so that Triton can copy keys and values ahead of their use.
    def block(i: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        page, peak, total, mixed = carry
        position = positions_of(i)
        live, offset = position < stop, lax.rem(position, page_len)

        def read(pages: Any) -> Array:
            at = pages.at[page[:, None], head, offset[:, None], dim]
            other = 0.0 if jnp.issubdtype(pages.dtype, jnp.floating) else 0
            return plt.load(at, mask=live[:, None] & inside, other=other).astype(product_dtype)

        def read_scales(pages: Any) -> Array:
            return plt.load(pages.at[page, head, offset], mask=live, other=0)[None, :]

        scores = _dot(query, read(keys).T) * (head_dim**-0.5)
        if scales:
            scores *= read_scales(scales[0])
        if variant.softcap is not None:
            scores = variant.softcap * _tanh(scores / variant.softcap)
        seen = live[None, :] & (position[None, :] <= last_seen[:, None])
        if variant.window is not None:
            seen &= position[None, :] > last_seen[:, None] - variant.window
        scores = jnp.where(seen, scores * LOG2_E, MASKED)
        new_peak = jnp.maximum(peak, scores.max(axis=1))
        weights = jnp.exp2(scores - new_peak[:, None])
        decay = jnp.exp2(peak - new_peak)
        total = total * decay + weights.sum(axis=1)
        if scales:
            weights *= read_scales(scales[1])
        mixed = mixed * decay[:, None] + _dot(weights.astype(product_dtype), read(values))
        return pages_of(i + 1), new_peak, total, mixed

    column = jnp.zeros((blocks.queries,), jnp.float32)
    peak, total = column + MASKED, column
    if sinks:  # part of a row's first segment
        sink = plt.load(sinks[0].at[head, member], mask=real, other=0.0) * LOG2_E
        first = (item == 0) | (plt.load(rows.at[jnp.maximum(item - 1, 0)]) != given)
        peak = jnp.where(first, sink, peak)
        total = total + first.astype(jnp.float32)
    empty = (peak, total, jnp.zeros((blocks.queries, blocks.dims), jnp.float32))
    num_blocks = pl.cdiv(jnp.maximum(stop - begin, 0), blocks.positions)
    zero = jnp.int32(0)
    _, peak, total, mixed = lax.fori_loop(zero, num_blocks, block, (pages_of(zero), *empty))

    total = jnp.maximum(total, TINY)
    mask = real[:, None] & inside
    plt.store(outputs.at[(item, *place[1:])], mixed / total[:, None], mask=mask)
    log_total = peak + jnp.log(total) * LOG2_E
    plt.store(log_totals.at[item, token, head, member], log_total, mask=real)


def _join(block: int, dims: int, offsets: Any, outputs: Any, log_totals: Any, joined: Any) -> None:
    """The kernel: a block of one row's queries, over the row's segments."""
    _, tokens, _, group, head_dim = outputs.shape
    head, row = pl.program_id(1), pl.program_id(2)
    index = pl.program_id(0) * block + jnp.arange(block, dtype=jnp.int32)
    token, member = lax.div(index, group), lax.rem(index, group)
    real = index < tokens * group
    dim = jnp.arange(dims, dtype=jnp.int32)[None, :]
    mask = real[:, None] & (dim < head_dim)
    place = (token[:, None], head, member[:, None], dim)

    def segment(item: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        peak, total, mixed = carry
        part = plt.load(log_totals.at[item, token, head, member], mask=real, other=MASKED)
        output = plt.load(outputs.at[(item, *place)], mask=mask, other=0.0)
        new_peak = jnp.maximum(peak, part)
        weight, decay = jnp.exp2(part - new_peak), jnp.exp2(peak - new_peak)
        mixed = mixed * decay[:, None] + output * weight[:, None]
        return new_peak, total * decay + weight, mixed

    column = jnp.zeros((block,), jnp.float32)
    empty = (column + MASKED, column, jnp.zeros((block, dims), jnp.float32))
    first, end = plt.load(offsets.at[row]), plt.load(offsets.at[row + 1])
    _, total, mixed = lax.fori_loop(first, end, segment, empty)
    plt.store(joined.at[(row, *place)], mixed / total[:, None], mask=mask)


def _tanh(x: Array) -> Array:
    """From the exponential, which every GPU has; within rounding of 1 beyond its range."""
    return 1 - 2 / (jnp.exp2(x * (2 * LOG2_E)) + 1)


def _dot(a: Float[Array, "m k"], b: Float[Array, "k n"]) -> Float[Array, "m n"]:
    # The highest precision concerns float32 alone, which would be rounded to 11 bits without it.
    return plt.dot(a, b, precision=lax.Precision.HIGHEST)

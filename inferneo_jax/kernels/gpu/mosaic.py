"""Paged attention by a Pallas kernel that Mosaic compiles: for Hopper GPUs, over bfloat16.

In each program one warpgroup copies pages to shared memory, by the tensor memory accelerator, and
the others multiply what has arrived by asynchronous warpgroup products, 64 queries each, under an
online softmax (arXiv:2407.08608). Copies run ahead by a few blocks. The work is shared out, and
segments joined, as in ``triton.py``.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from inferneo_jax.kernels.gpu.triton import LOG2_E, MASKED, TINY, join
from inferneo_jax.kernels.gpu.work import list_work, share_out
from inferneo_jax.layers.cache import AttentionMetadata, AttentionVariant, LayerCache

_WGMMA_ROWS = 64
_SWIZZLE = 128
"""Bytes of shared memory whose banks a tile spreads over."""


class Blocks(NamedTuple):
    """How a program cuts its work: static, so that one program serves all live lengths."""

    warpgroups: int
    """Those that multiply, each for 64 queries; one more copies."""
    positions: int
    stages: int
    """Blocks of positions in shared memory at once."""

    @property
    def queries(self) -> int:
        """Query rows of a program."""
        return self.warpgroups * _WGMMA_ROWS


def fits(head_dim: int, page_len: int, dtype: jnp.dtype, query_rows: int) -> bool:
    """Whether the kernel can be used with such heads and pages, for so many query rows of a head.

    Few queries of heads of 256 are not for it: their outputs do not fit beside what is copied.
    """
    sizes = (64, 128) if query_rows <= _WGMMA_ROWS else (64, 128, 256)
    return dtype == jnp.bfloat16 and head_dim in sizes and page_len in (8, 16, 32, 64)


def cut(query_rows: int, head_dim: int) -> Blocks:
    """Blocks for so many query rows of a KV head.

    They take at most 196 KiB of the 227 KiB of shared memory, and no register is spilled.
    """
    if query_rows <= _WGMMA_ROWS:
        return Blocks(1, 64, 4)
    return Blocks(2, 128 if head_dim <= 128 else 64, 4 if head_dim < 128 else 2)


def attend(
    queries: Float[Array, "rows tokens kv_heads group head_dim"],
    cache: LayerCache,
    metadata: AttentionMetadata,
    variant: AttentionVariant,
    *,
    interpret: bool,
) -> Float[Array, "rows tokens kv_heads group head_dim"]:
    """Softmax of scaled products over the keys that each token sees, reading live pages only.

    A row's positions must be consecutive.
    """
    rows, tokens, kv_heads, group, head_dim = queries.shape
    page_len = cache.keys.shape[2]
    max_len = metadata.block_tables.shape[1] * page_len
    query_rows = tokens * group
    blocks = cut(query_rows, head_dim)
    # Whole programs of queries, or of a single one the rows that there are, in tiles of 8.
    unit = blocks.queries if query_rows > _WGMMA_ROWS else 8
    padded = pl.cdiv(query_rows, unit) * unit
    sizes = (rows, 1, kv_heads, padded, head_dim)
    shares = share_out(sizes, blocks.queries, max_len, variant.window)
    work = list_work(shares, metadata, max_len, variant.window, blocks.positions)
    flat = queries.transpose(0, 2, 1, 3, 4).reshape(rows, kv_heads, query_rows, head_dim)
    flat = jnp.pad(flat, ((0, 0), (0, 0), (0, padded - query_rows), (0, 0)))
    partials = (shares.items, kv_heads, padded, head_dim)
    varies = jax.typeof(queries).mat
    tiles = (plgpu.TilingTransform((8, _SWIZZLE // 2)), plgpu.SwizzleTransform(_SWIZZLE))

    def tiled(*shape: int) -> Any:
        return plgpu.SMEM(shape, jnp.bfloat16, transforms=tiles)

    copies = partial(plgpu.Barrier, num_barriers=blocks.stages)
    call = plgpu.kernel(
        partial(_attend, blocks, variant._replace(sinks=None), tokens, group, interpret),
        out_type=[
            jax.ShapeDtypeStruct(partials, jnp.float32, manual_axis_type=varies),
            jax.ShapeDtypeStruct(partials[:-1], jnp.float32, manual_axis_type=varies),
        ],
        scratch_types=[
            tiled(blocks.warpgroups, _WGMMA_ROWS, head_dim),
            tiled(blocks.stages, blocks.positions, head_dim),
            tiled(blocks.stages, blocks.positions, head_dim),
            plgpu.SMEM((blocks.warpgroups, _WGMMA_ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=blocks.warpgroups),
            copies(num_arrivals=blocks.positions // page_len),
            copies(num_arrivals=blocks.positions // page_len),
            copies(num_arrivals=blocks.warpgroups),
            copies(num_arrivals=blocks.warpgroups),
            *([plgpu.SMEM((_WGMMA_ROWS, head_dim), jnp.float32)] if unit == 8 else []),
        ],
        grid=(pl.cdiv(padded, blocks.queries), kv_heads, shares.items),
        grid_names=("block", "head", "item"),
        num_threads=blocks.warpgroups + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=_interpreter() if interpret else None,
    )
    outputs, log_totals = call(
        *work[:3],
        metadata.block_tables,
        metadata.positions[:, 0],
        flat.astype(jnp.bfloat16),
        cache.keys,
        cache.values,
    )
    if variant.sinks is not None:
        sinks = jnp.tile(variant.sinks.astype(jnp.float32) * LOG2_E, (1, tokens))
        first = work.rows != jnp.concatenate([jnp.full(1, -1, jnp.int32), work.rows[:-1]])
        sinks = jnp.where(first[:, None, None], sinks, MASKED)
        sinks = jnp.pad(sinks, ((0, 0), (0, 0), (0, padded - query_rows)))
        with_sinks = jnp.logaddexp2(log_totals, sinks)
        outputs *= jnp.exp2(log_totals - with_sinks)[..., None]
        log_totals = with_sinks

    def by_token(x: Array) -> Array:
        x = x[:, :, :query_rows].reshape(*x.shape[:2], tokens, group, *x.shape[3:])
        return jnp.moveaxis(x, 1, 2)

    outputs = by_token(outputs)
    if not shares.split:
        return outputs
    return join(shares, work, outputs, by_token(log_totals), interpret=interpret)


def _attend(
    blocks: Blocks,
    variant: AttentionVariant,
    tokens: int,
    group: int,
    interpret: bool,
    rows: Any,
    starts: Any,
    stops: Any,
    block_tables: Any,
    firsts: Any,
    queries: Any,
    keys: Any,
    values: Any,
    outputs: Any,
    log_totals: Any,
    query_buffer: Any,
    key_buffer: Any,
    value_buffer: Any,
    log_buffer: Any,
    queries_here: Any,
    keys_here: Any,
    values_here: Any,
    keys_used: Any,
    values_used: Any,
    *output_buffer: Any,
) -> None:
    """The kernel: one block of one row's queries over one segment of its positions."""

    def iota(shape: tuple[int, int], axis: int) -> Array:
        if interpret:  # the interpreter of jax 0.10 knows no layouts
            return lax.broadcasted_iota(jnp.int32, shape, axis)
        return plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA)

    max_pages, page_len = block_tables.shape[1], keys.shape[2]
    head_dim = keys.shape[3]
    block, head, item = (lax.axis_index(name) for name in ("block", "head", "item"))
    # The last queries see most, so they begin first.
    block = pl.cdiv(queries.shape[2], blocks.queries) - 1 - block
    warpgroup = lax.axis_index("warpgroup")
    given = rows[item]
    row = jnp.maximum(given, 0)
    first_query = firsts[row]
    base = block * blocks.queries

    last_token = jnp.minimum(lax.div(base + (blocks.queries - 1), group), tokens - 1)
    length = jnp.minimum(first_query + last_token + 1, max_pages * page_len)
    stop = jnp.minimum(stops[item], length)
    begin = starts[item]
    if variant.window is not None:
        first_seen = first_query + lax.div(base, group) - (variant.window - 1)
        skipped = lax.div(jnp.maximum(first_seen - begin, 0), blocks.positions)
        begin = begin + skipped * blocks.positions
    num_blocks = lax.div(jnp.maximum(stop - begin, 0) + (blocks.positions - 1), blocks.positions)
    num_blocks = jnp.where(given >= 0, num_blocks, 0)

    @pl.when(warpgroup == blocks.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, num_blocks)
        def _(i: Array) -> None:
            slot = lax.rem(i, blocks.stages)
            # What lies behind the last page is masked: that page once more keeps it finite.
            last_page = lax.div(stop - 1, page_len)
            first_page = lax.div(begin + i * blocks.positions, page_len)
            near = range(blocks.positions // page_len)
            pages = [block_tables[row, jnp.minimum(first_page + j, last_page)] for j in near]
            for pages_of, buffer, here, used in (
                (keys, key_buffer, keys_here, keys_used),
                (values, value_buffer, values_here, values_used),
            ):

                @pl.when(i >= blocks.stages)
                def _(used: Any = used) -> None:
                    plgpu.barrier_wait(used.at[slot])

                for j in near:
                    target = buffer.at[slot, pl.ds(j * page_len, page_len)]
                    plgpu.copy_gmem_to_smem(pages_of.at[pages[j], head], target, here.at[slot])

        # Barriers are left as they were found: with every arrival waited for.
        @pl.loop(jnp.maximum(num_blocks - blocks.stages, 0), num_blocks)
        def _(i: Array) -> None:
            slot = lax.rem(i, blocks.stages)
            plgpu.barrier_wait(keys_used.at[slot])
            plgpu.barrier_wait(values_used.at[slot])

    @pl.when(warpgroup < blocks.warpgroups)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")
        mine = base + warpgroup * _WGMMA_ROWS
        # Those of a single program may be fewer: what its other rows hold is never written.
        num_rows = min(_WGMMA_ROWS, queries.shape[2])
        query_rows, written = pl.ds(mine, num_rows), pl.ds(0, num_rows)
        query = query_buffer.at[warpgroup]
        plgpu.copy_gmem_to_smem(
            queries.at[row, head, query_rows],
            query_buffer.at[warpgroup, written],
            queries_here.at[warpgroup],
        )
        plgpu.barrier_wait(queries_here.at[warpgroup])

        def step(i: Array, carry: tuple[Array, ...], *, masked: bool) -> tuple[Array, ...]:
            mixed, peak, total = carry
            slot = lax.rem(i, blocks.stages)
            plgpu.barrier_wait(keys_here.at[slot])

            def score(sums: Any) -> Array:
                plgpu.wgmma(sums, query, key_buffer.at[slot].transpose((1, 0)))
                return sums[...]

            shape = (_WGMMA_ROWS, blocks.positions)
            if interpret:  # the interpreter has neither transposed products nor those of registers
                scores = _dot(query[...], key_buffer[slot].T)
            else:
                scores = pl.run_scoped(score, plgpu.WGMMAAccumulatorRef(shape, jnp.float32))
            plgpu.barrier_arrive(keys_used.at[slot])
            if variant.softcap is None:
                scores *= head_dim**-0.5 * LOG2_E
            else:
                scores = jnp.tanh(scores * (head_dim**-0.5 / variant.softcap))
                scores *= variant.softcap * LOG2_E
            if masked:
                index, position = (iota(shape, axis) for axis in (0, 1))
                position = position + (begin + i * blocks.positions)
                # The token of an index is a quotient; multiplied out, it takes no division.
                behind = (index + mine) - (position - first_query) * group
                seen = (behind >= 0) & (position < stop)
                if variant.window is not None:
                    seen &= behind < variant.window * group
                scores = jnp.where(seen, scores, MASKED)
            new_peak = jnp.maximum(peak, scores.max(axis=1))
            decay = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores - lax.broadcast_in_dim(new_peak, shape, [0]))
            mixed *= lax.broadcast_in_dim(decay, mixed.shape, [0])
            total = total * decay + weights.sum(axis=1)
            factors = weights.astype(jnp.bfloat16)
            plgpu.barrier_wait(values_here.at[slot])

            def mix(sums: Any) -> None:
                plgpu.wgmma(sums, factors, value_buffer.at[slot])

            if interpret:
                mixed += _dot(factors, value_buffer[slot])
            else:
                mixed = pl.run_state(mix)(plgpu.WGMMAAccumulatorRef.init(mixed))
            plgpu.barrier_arrive(values_used.at[slot])
            return mixed, new_peak, total

        def filled(value: float, *shape: int) -> Array:
            layout = plgpu.Layout.WGMMA if len(shape) == 2 else plgpu.Layout.WGMMA.reduce(1)
            full = jnp.full(shape, value, jnp.float32)
            return full if interpret else plgpu.layout_cast(full, layout)

        carry = (
            filled(0, _WGMMA_ROWS, head_dim),
            filled(MASKED, _WGMMA_ROWS),
            filled(0, _WGMMA_ROWS),
        )
        whole = jnp.int32(0)  # blocks that all of these queries see whole
        if variant.window is None:
            seen_by_all = jnp.minimum(first_query + lax.div(mine, group) + 1, stop)
            whole = lax.div(jnp.maximum(seen_by_all - begin, 0), blocks.positions)
            whole = jnp.minimum(whole, num_blocks)
            carry = lax.fori_loop(0, whole, partial(step, masked=False), carry)
        mixed, peak, total = lax.fori_loop(whole, num_blocks, partial(step, masked=True), carry)

        @pl.when(given >= 0)
        def _() -> None:
            sums = jnp.maximum(total, TINY)
            output = mixed / lax.broadcast_in_dim(sums, mixed.shape, [0])
            log_buffer[warpgroup] = peak + jnp.log(sums) * LOG2_E
            if output_buffer:
                output_buffer[0][...] = output
            else:
                outputs[item, head, query_rows] = output
            plgpu.commit_smem()
            for buffer in output_buffer:
                plgpu.copy_smem_to_gmem(buffer.at[written], outputs.at[item, head, query_rows])
            plgpu.copy_smem_to_gmem(
                log_buffer.at[warpgroup, written], log_totals.at[item, head, query_rows]
            )
            plgpu.wait_smem_to_gmem(0)


def _dot(a: Array, b: Array) -> Array:
    return lax.dot(a, b, preferred_element_type=jnp.float32)


def _interpreter() -> Any:
    # Exported by jax 0.11 and newer.
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams()

"""The kernel that attends to pages in place, for one token a row as for a chunk of a prompt."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from inferneo_jax.layers.cache import AttentionMetadata, AttentionVariant

_MASKED = -1e30
_MAX_ROWS = 1024
"""Query rows of all heads in one step: with 256 positions, scores take 1 MiB of VMEM."""
_PART_LEN = 256
"""Positions that are multiplied at once."""
_BLOCK_BYTES = 6 << 20
"""Most bytes of one block of keys and values in VMEM, where there are two. What is in flight while
one is worked on covers the latency of the fastest memory, about 2 us at 2.8 TB/s."""
_VMEM_BYTES = 48 << 20
"""Of VMEM that the kernel may take: each of its TPUs, v5e and later, has 64 MiB or more."""

Ref = Any  # Pallas gives its references no public type.


@dataclass(frozen=True)
class Plan:
    """How the work is cut: a step of the grid is one row, some KV heads and some of its tokens.

    Query rows of a KV head are token by token, each token's group together.
    """

    rows: int
    tokens: int
    group: int
    page_len: int
    max_pages: int
    heads: int
    """KV heads of a step."""
    head_parts: int
    block_tokens: int
    """Query tokens of a step."""
    token_parts: int
    pages_per_block: int
    """Pages that are copied at once."""
    pages_per_part: int
    """Pages that are multiplied at once."""
    window: int | None
    softcap: float | None

    @classmethod
    def make(
        cls,
        queries: tuple[int, ...],
        group: int,
        data: list[Array],
        metadata: AttentionMetadata,
        variant: AttentionVariant,
        block_len: int,
    ) -> Self:
        """Fit steps over ``queries`` [rows, kv_heads, tokens * group, head_dim] into VMEM.

        ``data`` are the arrays of pages, [pages, kv_heads, page_len, lanes].
        """
        rows, kv_heads, query_rows, _ = queries
        page_len = data[0].shape[2]
        max_pages = metadata.block_tables.shape[1]
        tokens = block_tokens = query_rows // group
        if query_rows > _MAX_ROWS:
            block_tokens = max(_MAX_ROWS // group // 16 * 16, 16)  # whole tiles of bfloat16
        page_bytes = sum(page_len * array.shape[3] * array.dtype.itemsize for array in data)
        part_pages = min(max(min(_PART_LEN, block_len) // page_len, 1), max_pages)
        fit = min(
            _MAX_ROWS // max(block_tokens * group, 8), _BLOCK_BYTES // (part_pages * page_bytes)
        )
        heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= max(fit, 1))
        most = min(block_len // page_len, _BLOCK_BYTES // (heads * page_bytes))
        parts = max(min(most, max_pages + part_pages - 1) // part_pages, 1)
        return cls(
            rows=rows,
            tokens=tokens,
            group=group,
            page_len=page_len,
            max_pages=max_pages,
            heads=heads,
            head_parts=kv_heads // heads,
            block_tokens=block_tokens,
            token_parts=pl.cdiv(tokens, block_tokens),
            pages_per_block=parts * part_pages,
            pages_per_part=part_pages,
            window=variant.window,
            softcap=variant.softcap,
        )

    @property
    def block_len(self) -> int:
        """Positions of a block."""
        return self.pages_per_block * self.page_len

    @property
    def part_len(self) -> int:
        """Positions that are multiplied at once."""
        return self.pages_per_part * self.page_len

    @property
    def query_rows(self) -> int:
        """Query rows of a step and KV head."""
        return self.block_tokens * self.group


def attend_pages(
    plan: Plan,
    queries: Float[Array, "rows kv_heads query_rows lanes"],
    cache: tuple[list[Array], list[Array]],
    metadata: AttentionMetadata,
    sinks: Float[Array, "kv_heads group"] | None,
    *,
    interpret: bool,
) -> Float[Array, "rows kv_heads query_rows lanes"]:
    """Mix the values of each row's live pages; ``queries`` are scaled already.

    ``cache`` is keys and values, or one array of both side by side; and the scales of keys and of
    values, or nothing. A page is live up to the row's last position, while the row holds it.
    """
    data, scales = cache
    lanes = queries.shape[-1]
    heads, query_rows = plan.heads, plan.query_rows
    block = pl.BlockSpec(
        (1, heads, query_rows, lanes),
        lambda row, part, *_: (row, part // plan.token_parts, part % plan.token_parts, 0),
    )
    buffers = [pltpu.VMEM((2, heads, plan.block_len, lanes), array.dtype) for array in data] + [
        pltpu.VMEM((2, plan.pages_per_block, heads, *array.shape[2:]), array.dtype)
        for array in scales
    ]
    column = pltpu.VMEM((heads, query_rows, 1), jnp.float32)
    held = jnp.maximum((metadata.block_tables != 0).sum(axis=1, dtype=jnp.int32), 1)
    # Rows of a table are brought to the scalars' memory as they are needed: it has 1 MiB.
    tables = jnp.pad(metadata.block_tables, ((0, 0), (0, -plan.max_pages % 128)))[:, None]
    logits = [] if sinks is None else [jnp.tile(sinks, (1, plan.block_tokens))[..., None]]
    per_head = pl.BlockSpec(
        (heads, query_rows, 1), lambda _, part, *__: (part // plan.token_parts, 0, 0)
    )
    call = pl.pallas_call(
        partial(_kernel, plan, len(buffers), bool(logits)),
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(plan.rows, plan.head_parts * plan.token_parts),
            in_specs=[
                *[per_head] * len(logits),
                block,
                *[pl.BlockSpec(memory_space=pl.ANY)] * (1 + len(buffers)),
            ],
            out_specs=block,
            scratch_shapes=[
                *buffers,
                column,
                column,
                pltpu.VMEM((heads, query_rows, lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
                pltpu.SMEM((2, *tables.shape[1:]), jnp.int32),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("arbitrary", "arbitrary"), vmem_limit_bytes=_VMEM_BYTES
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="attend_pages",
    )
    return call(metadata.positions[:, 0], held, *logits, queries, tables, *data, *scales)


def _kernel(plan: Plan, num_arrays: int, sinking: bool, starts: Ref, held: Ref, *refs: Ref) -> None:
    """One step of the grid. While a block is worked on, the next one comes in.

    The next one may be the first of the next step: so copies cross from step to step, and
    ``slot_ref`` remembers which half of the buffers this step's first block is in. The block table
    of the next row comes in while this row is worked on.
    """
    sinks, (queries, tables, *rest) = refs[:sinking], refs[sinking:]
    arrays, out, buffers = rest[:num_arrays], rest[num_arrays], rest[num_arrays + 1 : -7]
    peak, total, mixed, arrived, slot_ref, near_tables, tables_arrived = rest[-7:]
    row, part = pl.program_id(0), pl.program_id(1)
    last_part = part + 1 == pl.num_programs(1)
    next_row, next_part = row + last_part.astype(jnp.int32), jnp.where(last_part, 0, part + 1)

    def table_copy(row: Array) -> Ref:
        slot = row % 2
        return pltpu.make_async_copy(tables.at[row], near_tables.at[slot], tables_arrived.at[slot])

    def first_query(row: Array, part: Array) -> Array:
        return starts[row] + part % plan.token_parts * plan.block_tokens

    def live_pages(row: Array, part: Array) -> Array:
        done = jnp.minimum((part % plan.token_parts + 1) * plan.block_tokens, plan.tokens)
        return jnp.clip((starts[row] + done - 1) // plan.page_len + 1, 1, held[row])

    def first_page(row: Array, part: Array) -> Array:
        if plan.window is None:
            return jnp.int32(0)
        first_seen = jnp.maximum(first_query(row, part) - (plan.window - 1), 0)
        return jnp.minimum(first_seen // plan.page_len, live_pages(row, part) - 1)

    def first_block(row: Array, part: Array) -> Array:
        return first_page(row, part) // plan.pages_per_block

    def pages_of(row: Array, part: Array, block: Array) -> tuple[Array, Array]:
        """The block's first live page and the one after its last, counted within the block."""
        before = block * plan.pages_per_block
        end = jnp.minimum(live_pages(row, part) - before, plan.pages_per_block)
        return jnp.maximum(first_page(row, part) - before, 0), end

    def each_copy(
        row: Array, part: Array, block: Array, slot: Array, act: Callable[[Ref], None]
    ) -> None:
        begin, end = pages_of(row, part, block)
        head = part // plan.token_parts * plan.heads

        @pl.loop(begin, end)
        def _(i: Array) -> None:
            page = near_tables[row % 2, 0, block * plan.pages_per_block + i]
            for array, buffer in zip(arrays, buffers, strict=True):
                if buffer.ndim == 4:
                    offset = pl.multiple_of(i * plan.page_len, plan.page_len)
                    target = buffer.at[slot, :, pl.ds(offset, plan.page_len)]
                else:
                    target = buffer.at[slot, i]
                source = array.at[page, pl.ds(head, plan.heads)]
                act(pltpu.make_async_copy(source, target, arrived.at[slot]))

    @pl.when((row == 0) & (part == 0))
    def _() -> None:
        # What no page ever filled is masked, but its weight of 0 must not meet a NaN.
        for buffer in buffers:
            buffer[...] = jnp.zeros_like(buffer)
        slot_ref[0] = 0
        table_copy(row).start()
        table_copy(row).wait()
        each_copy(row, part, first_block(row, part), jnp.int32(0), lambda copy: copy.start())

    @pl.when((part == 0) & (row + 1 < plan.rows))
    def _() -> None:
        table_copy(row + 1).start()

    peak[...] = sinks[0][...] if sinks else jnp.full_like(peak, _MASKED)
    total[...] = jnp.full_like(total, float(bool(sinks)))
    mixed[...] = jnp.zeros_like(mixed)
    num_blocks = pl.cdiv(live_pages(row, part), plan.pages_per_block)

    def step(block: Array, slot: Array) -> Array:
        @pl.when(block + 1 < num_blocks)
        def _() -> None:
            each_copy(row, part, block + 1, 1 - slot, lambda copy: copy.start())

        @pl.when((block + 1 == num_blocks) & (next_row < plan.rows))
        def _() -> None:
            @pl.when(last_part)
            def _() -> None:
                table_copy(next_row).wait()

            first = first_block(next_row, next_part)
            each_copy(next_row, next_part, first, 1 - slot, lambda copy: copy.start())

        each_copy(row, part, block, slot, lambda copy: copy.wait())
        begin, end = pages_of(row, part, block)

        @pl.loop(begin // plan.pages_per_part, pl.cdiv(end, plan.pages_per_part))
        def _(i: Array) -> None:
            first = pl.multiple_of(i * plan.part_len, plan.part_len)
            parts = [
                buffer.at[slot, :, pl.ds(first, plan.part_len)]
                if buffer.ndim == 4
                else buffer.at[slot, pl.ds(i * plan.pages_per_part, plan.pages_per_part)]
                for buffer in buffers
            ]
            offset = first_query(row, part) - block * plan.block_len - first
            _mix(plan, queries, parts, offset, peak, total, mixed)

        return 1 - slot

    slot_ref[0] = lax.fori_loop(first_block(row, part), num_blocks, step, slot_ref[0])
    out[0] = mixed[...] / total[...]


def _mix(
    plan: Plan,
    queries: Ref,
    buffers: list[Ref],
    offset: Int[Array, ""],
    peak: Ref,
    total: Ref,
    mixed: Ref,
) -> None:
    """Add positions to the online softmax; ``offset`` is from the first one to that of row 0."""
    scaled = buffers[-1].ndim == 4
    keys, values = buffers[0], buffers[len(buffers) - 1 - 2 * scaled]
    factors = queries[0]
    scores = _product(factors, keys[...], contract=2)
    if scaled:
        scores *= _lay_out(plan, buffers[-2])
    if plan.softcap is not None:
        scores = plan.softcap * jnp.tanh(scores / plan.softcap)
    token = lax.broadcasted_iota(jnp.int32, scores.shape, 1) // plan.group
    position = lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    behind = token - position + offset
    seen = behind >= 0
    if plan.window is not None:
        seen &= behind < plan.window
    scores = jnp.where(seen, scores, _MASKED)

    old_peak = peak[...]
    new_peak = jnp.maximum(old_peak, scores.max(axis=-1, keepdims=True))
    weights = jnp.exp(scores - new_peak)
    decay = jnp.exp(old_peak - new_peak)
    peak[...] = new_peak
    total[...] = total[...] * decay + weights.sum(axis=-1, keepdims=True)
    if scaled:
        weights *= _lay_out(plan, buffers[-1])
    mixed[...] = mixed[...] * decay + _product(
        weights.astype(factors.dtype), values[...], contract=1
    )


def _product(
    a: Float[Array, "heads queries inner"], b: Array, contract: int
) -> Float[Array, "heads queries other"]:
    """Products of each head, contracting ``inner`` with an axis of ``b``, summed in float32."""
    return lax.dot_general(
        a,
        b.astype(a.dtype),
        (((2,), (contract,)), ((0,), (0,))),
        precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )


def _lay_out(plan: Plan, scales: Ref) -> Float[Array, "heads 1 positions"]:
    pages = [scales[i, :, :, : plan.page_len] for i in range(plan.pages_per_part)]
    return jnp.concatenate(pages, axis=-1)

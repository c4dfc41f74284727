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
from jaxtyping import Array, Float, Int, Num

from inferneo_jax.layers.cache import AttentionMetadata

_MASKED = -1e30
_MAX_ROWS = 1024
"""Query rows of all heads in one step: with 256 positions, scores take 1 MiB of VMEM."""
_BLOCK_BYTES = 1 << 20
"""Most bytes of one block of keys in VMEM; there are two, and as many of values."""
_TABLE_BYTES = 1_000_000
"""Most bytes of all block tables, which lie in the 1 MiB of memory for scalars."""

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

    @classmethod
    def make(
        cls,
        queries: tuple[int, ...],
        group: int,
        pages: Num[Array, "pages kv_heads page_len lanes"],
        metadata: AttentionMetadata,
        block_len: int,
    ) -> Self:
        """Fit steps over ``queries`` [rows, kv_heads, tokens * group, head_dim] into VMEM.

        Raises:
            ValueError: the block tables do not fit.
        """
        rows, kv_heads, query_rows, _ = queries
        page_len, lanes = pages.shape[2:]
        max_pages = metadata.block_tables.shape[1]
        if 4 * rows * max_pages > _TABLE_BYTES:
            raise ValueError(
                f"block tables of {rows} rows x {max_pages} pages take {4 * rows * max_pages} "
                f"bytes but a TPU kernel has room for {_TABLE_BYTES}: raise page_len "
                f"({page_len}) or lower slots or max_len"
            )
        pages_per_block = min(max(block_len // page_len, 1), max_pages)
        tokens = block_tokens = query_rows // group
        if query_rows > _MAX_ROWS:
            block_tokens = max(_MAX_ROWS // group // 16 * 16, 16)  # whole tiles of bfloat16
        head_bytes = pages_per_block * page_len * lanes * pages.dtype.itemsize
        fit = min(_MAX_ROWS // max(block_tokens * group, 8), _BLOCK_BYTES // head_bytes)
        heads = max(n for n in range(1, kv_heads + 1) if kv_heads % n == 0 and n <= max(fit, 1))
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
            pages_per_block=pages_per_block,
        )

    @property
    def block_len(self) -> int:
        """Positions of a block."""
        return self.pages_per_block * self.page_len

    @property
    def query_rows(self) -> int:
        """Query rows of a step and KV head."""
        return self.block_tokens * self.group


def attend_pages(
    plan: Plan,
    queries: Float[Array, "rows kv_heads query_rows lanes"],
    cache: tuple[list[Array], list[Array]],
    metadata: AttentionMetadata,
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
    call = pl.pallas_call(
        partial(_kernel, plan, len(buffers)),
        out_shape=jax.ShapeDtypeStruct(queries.shape, jnp.float32),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(plan.rows, plan.head_parts * plan.token_parts),
            in_specs=[block] + [pl.BlockSpec(memory_space=pl.ANY)] * len(buffers),
            out_specs=block,
            scratch_shapes=[
                *buffers,
                column,
                column,
                pltpu.VMEM((heads, query_rows, lanes), jnp.float32),
                pltpu.SemaphoreType.DMA((2,)),
                pltpu.SMEM((1,), jnp.int32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary", "arbitrary")),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="attend_pages",
    )
    return call(
        metadata.block_tables.reshape(-1), metadata.positions[:, 0], held, queries, *data, *scales
    )


def _kernel(
    plan: Plan,
    num_arrays: int,
    block_tables: Ref,
    starts: Ref,
    held: Ref,
    queries: Ref,
    *refs: Ref,
) -> None:
    """One step of the grid. While a block is worked on, the next one comes in.

    The next one may be the first of the next step: so copies cross from step to step, and
    ``slot_ref`` remembers which half of the buffers this step's first block is in.
    """
    arrays, out, buffers = refs[:num_arrays], refs[num_arrays], refs[num_arrays + 1 : -5]
    peak, total, mixed, arrived, slot_ref = refs[-5:]
    row, part = pl.program_id(0), pl.program_id(1)
    last_part = part + 1 == pl.num_programs(1)
    next_row, next_part = row + last_part.astype(jnp.int32), jnp.where(last_part, 0, part + 1)

    def first_query(part: Array) -> Array:
        return starts[row] + part % plan.token_parts * plan.block_tokens

    def live_pages(row: Array, part: Array) -> Array:
        done = jnp.minimum((part % plan.token_parts + 1) * plan.block_tokens, plan.tokens)
        return jnp.clip((starts[row] + done - 1) // plan.page_len + 1, 1, held[row])

    def each_copy(
        row: Array, part: Array, block: Array, slot: Array, act: Callable[[Ref], None]
    ) -> None:
        first = block * plan.pages_per_block
        count = jnp.minimum(live_pages(row, part) - first, plan.pages_per_block)
        head = part // plan.token_parts * plan.heads

        @pl.loop(0, count)
        def _(i: Array) -> None:
            page = block_tables[row * plan.max_pages + first + i]
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
        each_copy(row, part, jnp.int32(0), jnp.int32(0), lambda copy: copy.start())

    peak[...] = jnp.full_like(peak, _MASKED)
    total[...] = jnp.zeros_like(total)
    mixed[...] = jnp.zeros_like(mixed)
    num_blocks = pl.cdiv(live_pages(row, part), plan.pages_per_block)

    def step(block: Array, slot: Array) -> Array:
        @pl.when(block + 1 < num_blocks)
        def _() -> None:
            each_copy(row, part, block + 1, 1 - slot, lambda copy: copy.start())

        @pl.when((block + 1 == num_blocks) & (next_row < plan.rows))
        def _() -> None:
            each_copy(next_row, next_part, jnp.int32(0), 1 - slot, lambda copy: copy.start())

        each_copy(row, part, block, slot, lambda copy: copy.wait())
        offset = first_query(part) - block * plan.block_len
        _mix(plan, queries, [buffer.at[slot] for buffer in buffers], offset, peak, total, mixed)
        return 1 - slot

    slot_ref[0] = lax.fori_loop(0, num_blocks, step, slot_ref[0])
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
    """Add a block to the online softmax; ``offset`` is from its first position to that of row 0."""
    scaled = buffers[-1].ndim == 4
    keys, values = buffers[0], buffers[len(buffers) - 1 - 2 * scaled]
    factors = queries[0]
    scores = _product(factors, keys[...], contract=2)
    if scaled:
        scores *= _lay_out(plan, buffers[-2])
    token = lax.broadcasted_iota(jnp.int32, scores.shape, 1) // plan.group
    position = lax.broadcasted_iota(jnp.int32, scores.shape, 2)
    scores = jnp.where(position - token <= offset, scores, _MASKED)

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
    pages = [scales[i, :, :, : plan.page_len] for i in range(plan.pages_per_block)]
    return jnp.concatenate(pages, axis=-1)

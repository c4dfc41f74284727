"""How attention over long sequences is shared out between the programs of a GPU's grid.

A row's live positions are cut into segments of one length. Each segment is an item of work; rows
have as many items as their lengths need, so a long row costs what its bytes cost, and short ones
beside it no more than their own (arXiv:2501.01005, https://pytorch.org/blog/flash-decoding). The
number of items is static, and so is the program; items that nobody needs end at once.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Int

from inferneo_jax.layers.cache import AttentionMetadata

MULTIPROCESSORS = 132
"""Of an H100. Only how the work is shared out depends on it."""

_LONG, _SHORT = 1024, 256
"""Positions of a segment; the latter where few rows that decode leave multiprocessors idle."""
_SPARE_ITEMS = 512
"""Items beyond one for each row: segments of 1,024 then hold half a million positions."""
_PARTIAL_BYTES = 64 << 20
"""Most bytes of the outputs of all segments before they are joined."""


class Shares(NamedTuple):
    """The static part: how many items there are and how long their segments are, at least.

    With one item for each row there is one segment, and nothing to join.
    """

    items: int
    segment: int
    rows: int

    @property
    def split(self) -> bool:
        """Whether a row may have several segments."""
        return self.items > self.rows


class Work(NamedTuple):
    """The items of a step.

    Attributes:
        rows: the row of each item; -1 for items that are not needed.
        starts: the first position of each item's segment.
        stops: the position after its last, live or not.
        offsets: the first item of each row, then the number of items that are needed.
    """

    rows: Int[Array, " items"]
    starts: Int[Array, " items"]
    stops: Int[Array, " items"]
    offsets: Int[Array, " ends"]


def share_out(
    queries: tuple[int, ...], block_queries: int, max_len: int, window: int | None
) -> Shares:
    """Shares for queries ``[rows, tokens, kv_heads, group, head_dim]``.

    Args:
        queries: their shape.
        block_queries: the query rows of a program.
        max_len: positions that a block table has room for.
        window: of the layer.
    """
    rows, tokens, kv_heads, group, head_dim = queries
    span = max_len if window is None else min(max_len, window + tokens + _LONG)
    blocks = -(-tokens * group // block_queries)
    busy = rows * kv_heads * blocks >= MULTIPROCESSORS
    if blocks > 1 and busy:
        # Programs enough that compute: a segment's outputs would only be more to write.
        return Shares(rows, span, rows)
    segment = _LONG if blocks > 1 or busy else _SHORT
    item_bytes = 4 * tokens * kv_heads * group * head_dim
    items = min(rows * -(-span // segment), rows + _SPARE_ITEMS, _PARTIAL_BYTES // item_bytes)
    if items <= rows:
        return Shares(rows, span, rows)
    return Shares(items, segment, rows)


def list_work(
    shares: Shares, metadata: AttentionMetadata, max_len: int, window: int | None, align: int
) -> Work:
    """The items of rows with these positions.

    Where they would be too many, segments are as many times twice as long as are needed: a
    sequence's result otherwise does not depend on those beside it.
    """
    stops = jnp.minimum(metadata.positions.max(axis=1) + 1, max_len)
    starts = jnp.zeros_like(stops)
    if window is not None:
        first_seen = jnp.maximum(metadata.positions.min(axis=1) - (window - 1), 0)
        starts = first_seen // align * align
    spans = jnp.maximum(stops - starts, 1)
    doublings = max((max_len - 1) // shares.segment, 0).bit_length()
    lengths = shares.segment << jnp.arange(doublings + 1, dtype=jnp.int32)
    counts = (spans[None, :] + lengths[:, None] - 1) // lengths[:, None]
    fitting = counts.sum(axis=1) <= shares.items
    choice = jnp.argmax(fitting)
    segment, counts = lengths[choice], counts[choice]

    ends = jnp.cumsum(counts)
    item = jnp.arange(shares.items, dtype=jnp.int32)
    row = (item[:, None] >= ends[None, :]).sum(axis=1, dtype=jnp.int32)
    needed = row < shares.rows
    inside = jnp.minimum(row, shares.rows - 1)
    offsets = jnp.concatenate([jnp.zeros(1, jnp.int32), ends.astype(jnp.int32)])
    first = starts[inside] + (item - offsets[inside]) * segment
    return Work(jnp.where(needed, row, -1), first, first + segment, offsets)

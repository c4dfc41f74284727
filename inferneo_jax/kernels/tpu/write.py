"""The kernel that writes tokens into pages in place.

XLA's own scatter copies the whole cache where a token's KV heads lie apart, to bring them together.
A TPU moves whole tiles of memory, so what is around a token is read, merged with it and written
back: some positions of its page, or whole pages where there are tokens enough to fill them.
"""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int, Num

from inferneo_jax.layers.cache import AttentionMetadata

_TILE_BYTES = 32
"""Bytes of one lane of a tile: 8 positions of float32, 16 of bfloat16, 32 of int8."""
_BLOCK_BYTES = 1 << 18
"""Most bytes of one array's block; its old, new and written form are in VMEM twice each."""

Ref = Any  # Pallas gives its references no public type.


def write_pages(
    cache: tuple[list[Array], list[Array]],
    new: tuple[list[Array], list[Array]],
    metadata: AttentionMetadata,
    *,
    interpret: bool,
) -> tuple[list[Array], list[Array]]:
    """Write at each row's consecutive positions; those outside its table go to page 0.

    ``cache`` is arrays ``[pages, kv_heads, page_len, lanes]`` and their scales
    ``[pages, kv_heads, 1, lanes]``, ``new`` is what to write there: ``[rows, tokens, kv_heads,
    lanes]`` and ``[rows, tokens, kv_heads]``.
    """
    (data, scales), (new_data, new_scales) = cache, new
    rows, tokens = metadata.positions.shape
    _, kv_heads, page_len, lanes = data[0].shape
    tile = math.gcd(_TILE_BYTES // data[0].dtype.itemsize, page_len)
    unit = page_len if tokens >= page_len else tile
    per_page = page_len // unit
    units = _num_units(tokens, unit)
    starts = metadata.positions[:, 0]
    index = starts[:, None] // unit + jnp.arange(units, dtype=jnp.int32)[None, :]
    pages = jnp.take_along_axis(
        metadata.block_tables, index // per_page, axis=1, mode="fill", fill_value=0
    )
    head_bytes = unit * lanes * data[0].dtype.itemsize
    heads = max(
        n
        for n in range(1, kv_heads + 1)
        if kv_heads % n == 0 and (n == 1 or n * head_bytes <= _BLOCK_BYTES)
    )

    def of_unit(row: Array, part: Array, i: Array, pages: Ref, starts: Ref) -> tuple[Any, ...]:
        return pages[row * units + i], part, (starts[row] // unit + i) % per_page, 0

    def of_page(row: Array, part: Array, i: Array, pages: Ref, starts: Ref) -> tuple[Any, ...]:
        return pages[row * units + i], part, 0, 0

    def new_of_unit(row: Array, part: Array, i: Array, *_: Ref) -> tuple[Any, ...]:
        return row, i, part, 0, 0

    def new_of_page(row: Array, part: Array, i: Array, _: Ref, starts: Ref) -> tuple[Any, ...]:
        page = (starts[row] // unit + i) // per_page - starts[row] // page_len
        return row, page if tokens > 1 else 0, part, 0, 0

    new_data = [_align(array, starts, unit) for array in new_data]
    new_scales = [_align_scales(array, starts, page_len) for array in new_scales]
    new_specs = [pl.BlockSpec((1, 1, heads, *a.shape[3:]), new_of_unit) for a in new_data]
    new_specs += [pl.BlockSpec((1, 1, heads, *a.shape[3:]), new_of_page) for a in new_scales]
    page_specs = [pl.BlockSpec((1, heads, unit, lanes), of_unit) for _ in data]
    page_specs += [pl.BlockSpec((1, heads, *a.shape[2:]), of_page) for a in scales]
    arrays = data + scales
    read = sum(math.prod(a.shape[3:]) * a.dtype.itemsize for a in new_data + new_scales)
    merged = len(data) * unit * lanes * data[0].dtype.itemsize
    merged += sum(math.prod(a.shape[2:]) * a.dtype.itemsize for a in scales)
    call = pl.pallas_call(
        partial(_kernel, unit, page_len, tokens, len(data), len(arrays)),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, kv_heads // heads, units),
            in_specs=new_specs + page_specs,
            out_specs=page_specs,
        ),
        input_output_aliases={2 + len(arrays) + i: i for i in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        cost_estimate=pl.CostEstimate(
            flops=0, transcendentals=0, bytes_accessed=rows * units * kv_heads * (read + 2 * merged)
        ),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="write_pages",
    )
    written = call(pages.reshape(-1), starts, *new_data, *new_scales, *arrays)
    return list(written[: len(data)]), list(written[len(data) :])


def _align(
    new: Num[Array, "rows tokens kv_heads n"], starts: Int[Array, " rows"], unit: int
) -> Num[Array, "rows units kv_heads unit n"]:
    """Put each token at its place in the units that its row touches.

    A single token is left as it is, [rows, 1, kv_heads, 1, n], to be spread over its unit.
    """
    rows, tokens, kv_heads, n = new.shape
    if tokens == 1:
        return new[:, :, :, None]
    moved = _shift(new, starts, unit, axis=1)
    return moved.reshape(rows, -1, unit, kv_heads, n).swapaxes(2, 3)


def _align_scales(
    new: Float[Array, "rows tokens kv_heads"], starts: Int[Array, " rows"], page_len: int
) -> Float[Array, "rows pages kv_heads 1 lanes"]:
    """The same for the scales of whole pages, along lanes."""
    rows, tokens, kv_heads = new.shape
    if tokens == 1:
        return new[..., None, None]
    moved = _shift(new.swapaxes(1, 2), starts, page_len, axis=2)
    moved = moved.reshape(rows, kv_heads, -1, 1, page_len).swapaxes(1, 2)
    return jnp.pad(moved, [(0, 0)] * 4 + [(0, -page_len % 128)])


def _shift(new: Array, starts: Int[Array, " rows"], unit: int, axis: int) -> Array:
    """Move tokens to where they are in whole units, between numbers that nobody will see."""
    tokens = new.shape[axis]
    length = _num_units(tokens, unit) * unit
    padding = [(0, 0)] * new.ndim
    padding[axis] = (unit, length - tokens)
    slice_row = partial(lax.dynamic_slice_in_dim, slice_size=length, axis=axis - 1)
    return jax.vmap(slice_row)(jnp.pad(new, padding), unit - starts % unit)


def _num_units(tokens: int, unit: int) -> int:
    """Most units that consecutive tokens can touch."""
    return -(-(tokens - 1) // unit) + 1


def _kernel(
    unit: int,
    page_len: int,
    tokens: int,
    num_data: int,
    num_arrays: int,
    pages: Ref,
    starts: Ref,
    *refs: Ref,
) -> None:
    """Merge one unit of each array. A page's scales are merged whole, with each of its units."""
    new, old, out = refs[:num_arrays], refs[num_arrays : 2 * num_arrays], refs[2 * num_arrays :]
    start = starts[pl.program_id(0)]
    first = (start // unit + pl.program_id(2)) * unit
    for i, (new_ref, old_ref, out_ref) in enumerate(zip(new, old, out, strict=True)):
        length, axis = (unit, 1) if i < num_data else (page_len, 2)
        offset = lax.broadcasted_iota(jnp.int32, old_ref.shape[1:], axis)
        position = first // length * length + offset
        mine = (position >= start) & (position < start + tokens) & (offset < length)
        out_ref[0] = jnp.where(mine, new_ref[0, 0], old_ref[0])

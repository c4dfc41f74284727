"""The kernel that writes tokens into pages in place.

XLA's own scatter copies the whole cache where a token's KV heads lie apart, to bring them together.
A TPU moves whole tiles of memory, so what is around a token is read, merged with it and written
back: for one token a row some positions of its page, for more tokens whole pages.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Int

from inferneo_jax.cache import PageView

_TILE = 32
"""Positions in the largest tile, that of int8."""
_BLOCK_BYTES = 1 << 18
"""Most bytes of one array's block; its old, new and written form are in VMEM twice each."""

Ref = Any  # Pallas gives its references no public type.


def write_pages(
    cache: tuple[list[Array], list[Array]],
    new: tuple[list[Array], list[Array]],
    view: PageView,
    *,
    interpret: bool,
) -> tuple[list[Array], list[Array]]:
    """Write at each row's consecutive positions; those outside its table go to page 0.

    ``cache`` is arrays ``[pages, kv_heads, page_len, lanes]`` and their scales
    ``[pages, kv_heads, 1, lanes]``, ``new`` is what to write there: ``[rows, tokens, kv_heads,
    lanes]`` and ``[rows, tokens, kv_heads]``.
    """
    (data, scales), (new_data, new_scales) = cache, new
    rows, tokens = view.positions.shape
    _, kv_heads, page_len, lanes = data[0].shape
    unit = min(_TILE, page_len) if tokens == 1 else page_len
    units = pl.cdiv(tokens - 1, unit) + 1
    starts = view.positions[:, 0]
    index = starts[:, None] // unit + jnp.arange(units, dtype=jnp.int32)[None, :]
    pages = jnp.take_along_axis(
        view.tables, index // (page_len // unit), axis=1, mode="fill", fill_value=0
    )
    head_bytes = unit * lanes * data[0].dtype.itemsize
    heads = max(
        n
        for n in range(1, kv_heads + 1)
        if kv_heads % n == 0 and (n == 1 or n * head_bytes <= _BLOCK_BYTES)
    )

    def of_unit(row: Array, part: Array, i: Array, pages: Ref, starts: Ref) -> tuple[Any, ...]:
        return pages[row * units + i], part, (starts[row] // unit + i) % (page_len // unit), 0

    def of_page(row: Array, part: Array, i: Array, pages: Ref, starts: Ref) -> tuple[Any, ...]:
        return pages[row * units + i], part, 0, 0

    aligned = [_align(array, starts % unit, units, unit) for array in new_data]
    for array in new_scales:
        along_lanes = _align(array[..., None], starts % unit, units, unit).swapaxes(-1, -2)
        missing = 0 if tokens == 1 else scales[0].shape[-1] - page_len
        aligned.append(jnp.pad(along_lanes, [(0, 0)] * 4 + [(0, missing)]))
    new_specs = [
        pl.BlockSpec((1, 1, heads, *array.shape[3:]), lambda row, part, i, *_: (row, i, part, 0, 0))
        for array in aligned
    ]
    page_specs = [pl.BlockSpec((1, heads, unit, lanes), of_unit) for _ in data]
    page_specs += [pl.BlockSpec((1, heads, *array.shape[2:]), of_page) for array in scales]
    arrays = data + scales
    call = pl.pallas_call(
        partial(_kernel, page_len, tokens, len(data), len(arrays)),
        out_shape=[jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays],
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(rows, kv_heads // heads, units),
            in_specs=new_specs + page_specs,
            out_specs=page_specs,
        ),
        input_output_aliases={2 + len(arrays) + i: i for i in range(len(arrays))},
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",) * 3),
        interpret=pltpu.InterpretParams() if interpret else False,
        name="write_pages",
    )
    written = call(pages.reshape(-1), starts, *aligned, *arrays)
    return list(written[: len(data)]), list(written[len(data) :])


def _align(new: Array, shift: Int[Array, " rows"], units: int, unit: int) -> Array:
    """[rows, units, kv_heads, unit, n] where each token is at its place in its unit.

    A single token is left as it is, [rows, 1, kv_heads, 1, n], to be spread over its unit.
    """
    rows, tokens, kv_heads, n = new.shape
    if tokens == 1:
        return new[:, :, :, None]
    padded = jnp.pad(new, ((0, 0), (unit, units * unit - tokens), (0, 0), (0, 0)))
    moved = jax.vmap(lambda x, by: lax.dynamic_slice_in_dim(x, unit - by, units * unit))(
        padded, shift
    )
    return moved.reshape(rows, units, unit, kv_heads, n).swapaxes(2, 3)


def _kernel(
    page_len: int, tokens: int, num_data: int, num_arrays: int, pages: Ref, starts: Ref, *refs: Ref
) -> None:
    new, old, out = refs[:num_arrays], refs[num_arrays : 2 * num_arrays], refs[2 * num_arrays :]
    start = starts[pl.program_id(0)]
    for i, (new_ref, old_ref, out_ref) in enumerate(zip(new, old, out, strict=True)):
        length = old_ref.shape[2] if i < num_data else page_len
        offset = lax.broadcasted_iota(jnp.int32, old_ref.shape[1:], 1 if i < num_data else 2)
        position = (start // length + pl.program_id(2)) * length + offset
        mine = (position >= start) & (position < start + tokens) & (offset < length)
        out_ref[0] = jnp.where(mine, new_ref[0, 0], old_ref[0])

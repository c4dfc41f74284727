"""The CPU attention kernels against attention in plain XLA operations."""

import dataclasses
import itertools
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.errors import ConfigError
from inferneo_jax.kernels import attention_for
from inferneo_jax.kernels.cpu import build
from inferneo_jax.kernels.cpu.attention import CpuPagedAttention
from inferneo_jax.kernels.cpu.build import Variant
from inferneo_jax.layers import rope
from inferneo_jax.layers.cache import AttentionMetadata, LayerCache, PagedAttention
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.runner.capacity import make_programs
from inferneo_jax.runner.programs import Decode
from inferneo_jax.sharding.mesh import make_mesh
from tests.kernels.variants import VARIANTS
from tests.support.tiny_model import NATIVE, NATIVE_ENGINE, ONE_DEVICE, TINY, tiny_backend

ONE_LAYER = DecoderConfig.from_dict(TINY.to_dict() | {"num_layers": 1})
TOLERANCE = {"float32": 3e-6, "bfloat16": 1e-2, "int8": 3e-6}
MAX_LEN = 608


class Sizes(NamedTuple):
    head_dim: int
    kv_heads: int
    group: int
    page_len: int
    tokens: int
    dtype: str


CASES = [
    Sizes(64, 3, 3, 16, 1, "float32"),
    Sizes(64, 3, 3, 16, 1, "bfloat16"),
    Sizes(64, 3, 3, 16, 70, "bfloat16"),
    Sizes(64, 1, 7, 32, 1, "int8"),
    Sizes(16, 2, 1, 16, 33, "float32"),
    Sizes(80, 1, 4, 16, 1, "bfloat16"),
    Sizes(96, 2, 8, 48, 19, "int8"),
    Sizes(128, 2, 8, 16, 1, "float32"),
    Sizes(128, 1, 4, 16, 64, "float32"),
    Sizes(256, 1, 30, 64, 1, "bfloat16"),
]
IN_EVERY_VARIANT = [
    Sizes(16, 2, 1, 16, 33, "float32"),
    Sizes(80, 1, 4, 16, 1, "bfloat16"),
    Sizes(96, 2, 8, 48, 19, "int8"),
]
"""One of each type of cache."""


class Inputs(NamedTuple):
    """What four rows have seen, and what a step brings: one at a page border, one long, padding."""

    context: tuple[jax.Array, jax.Array, AttentionMetadata]
    fused: jax.Array
    angles: tuple[jax.Array, jax.Array]
    metadata: AttentionMetadata


def _metadata(block_tables: np.ndarray, starts: list[int], tokens: int) -> AttentionMetadata:
    positions = np.asarray(starts)[:, None] + np.arange(tokens)
    return AttentionMetadata(
        jnp.asarray(block_tables, jnp.int32), jnp.asarray(positions, jnp.int32)
    )


def _inputs(sizes: Sizes, starts: tuple[int, ...] = (0, 47, 480, 0)) -> Inputs:
    rng = np.random.default_rng(sizes.head_dim + sizes.tokens)
    max_pages = -(-MAX_LEN // sizes.page_len)
    block_tables = rng.permutation(np.arange(1, 3 * max_pages + 1)).reshape(3, max_pages)
    for table, start in zip(block_tables, starts, strict=False):
        table[(start + sizes.tokens - 1) // sizes.page_len + 1 :] = 0
    block_tables = np.concatenate([block_tables, np.zeros((1, max_pages), int)])

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    shape = (4, max(starts), sizes.kv_heads, sizes.head_dim)
    metadata = _metadata(block_tables, list(starts), sizes.tokens)
    freqs = jnp.asarray(rope.frequencies(sizes.head_dim, 1e4, None))
    return Inputs(
        (draw(*shape), draw(*shape), _metadata(block_tables, [0] * 4, max(starts))),
        draw(4, sizes.tokens, sizes.kv_heads, sizes.group + 2, sizes.head_dim),
        rope.angles(metadata.positions, freqs),
        metadata,
    )


def _attention(kind: type[Any], sizes: Sizes, **more: Any) -> Any:
    dtype = jnp.dtype(sizes.dtype)
    return kind(sizes.kv_heads, sizes.head_dim, sizes.page_len, dtype, **more)


def _empty(attention: PagedAttention, fill: float = 0.0) -> LayerCache:
    layer = attention.init(ONE_LAYER, 3 * -(-MAX_LEN // attention.page_len) + 1)[0]
    return jax.tree.map(lambda x: jnp.full_like(x, fill if x.dtype != jnp.int8 else 77), layer)


@partial(jax.jit, static_argnums=0)
def _run(attention: PagedAttention, layer: LayerCache, inputs: Inputs) -> Any:
    layer = attention.write(layer, *inputs.context)
    return attention.step(inputs.fused, inputs.angles, layer, inputs.metadata)


@cache
def _expected(sizes: Sizes) -> np.ndarray:
    attention = _attention(PagedAttention, sizes)
    return np.asarray(_run(attention, _empty(attention), _inputs(sizes))[0])


@pytest.mark.parametrize(
    ("sizes", "variant"),
    [
        *itertools.product(CASES, ["native"]),
        *itertools.product(IN_EVERY_VARIANT, [v for v in VARIANTS if v != "native"]),
    ],
    ids=str,
)
def test_kernels_equal_the_reference(sizes: Sizes, variant: Variant) -> None:
    attention = _attention(CpuPagedAttention, sizes, variant=variant)
    # What nobody wrote is no number: it may be in no result.
    mixed, _ = _run(attention, _empty(attention, np.nan), _inputs(sizes))
    assert (mixed.dtype, mixed.shape) == (jnp.float32, _expected(sizes).shape)
    np.testing.assert_allclose(mixed[:3], _expected(sizes)[:3], atol=TOLERANCE[sizes.dtype])
    assert not np.asarray(mixed[3]).any(), "padding gives zeros"


@pytest.mark.parametrize("sizes", [*CASES[1::2], CASES[6]], ids=str)
def test_a_row_alone_is_the_row_in_any_batch(sizes: Sizes) -> None:
    attention = _attention(CpuPagedAttention, sizes)
    inputs = _inputs(sizes)
    together, _ = _run(attention, _empty(attention), inputs)
    for row in range(3):
        alone, _ = _run(
            attention, _empty(attention), jax.tree.map(lambda x, r=row: x[r : r + 1], inputs)
        )
        np.testing.assert_array_equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_chunks_of_a_prompt_find_what_the_whole_finds(dtype: str) -> None:
    sizes = Sizes(64, 3, 3, 16, 1, dtype)
    attention = _attention(CpuPagedAttention, sizes)
    rng = np.random.default_rng(0)
    fused = jnp.asarray(rng.normal(size=(1, 300, 3, 5, 64)), jnp.float32)
    block_tables = rng.permutation(np.arange(1, 39))[None]
    freqs = jnp.asarray(rope.frequencies(64, 1e4, None))
    step = jax.jit(attention.step)

    def outputs(cuts: list[int]) -> np.ndarray:
        layer, found = _empty(attention), []
        for begin, end in zip(cuts, [*cuts[1:], 300], strict=True):
            metadata = _metadata(block_tables, [begin], end - begin)
            angles = rope.angles(metadata.positions, freqs)
            mixed, layer = step(fused[:, begin:end], angles, layer, metadata)
            found.append(mixed)
        return np.concatenate(found, axis=1)

    whole = outputs([0])
    np.testing.assert_array_equal(outputs([0, 64, 161, 200]), whole)
    by_token = outputs([0, 64, 161, 200, 298, 299])  # whose positions are cut into pieces
    np.testing.assert_allclose(by_token, whole, atol=2e-3 if dtype == "bfloat16" else 1e-6)


def test_what_is_written_and_attended_to_apart_is_a_step() -> None:
    sizes = Sizes(64, 3, 3, 16, 5, "bfloat16")
    attention, inputs = _attention(CpuPagedAttention, sizes), _inputs(sizes)
    mixed, layer = _run(attention, _empty(attention), inputs)
    apart = attention.write(_empty(attention), *inputs.context)
    again, other = PagedAttention.step(
        attention, inputs.fused, inputs.angles, apart, inputs.metadata
    )
    np.testing.assert_allclose(again, mixed, atol=1e-2)
    for a, b in zip(jax.tree.leaves(layer), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b.astype(jnp.float32), atol=0.04)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_each_device_attends_with_its_own_heads(dtype: str) -> None:
    sizes = Sizes(64, 2, 3, 16, 1, dtype)
    attention, inputs = _attention(CpuPagedAttention, sizes), _inputs(sizes)
    one = dataclasses.replace(attention, kv_heads=1)
    heads, tokens = PartitionSpec(None, "model"), PartitionSpec(None, None, "model")
    every = PartitionSpec()
    sharded = jax.shard_map(
        partial(_run, one),
        mesh=jax.make_mesh((2,), ("model",), axis_types=(AxisType.Auto,)),
        in_specs=(heads, Inputs((tokens, tokens, every), tokens, (every, every), every)),
        out_specs=(tokens, heads),
        check_vma=False,
    )
    wanted, _ = _run(attention, _empty(attention), inputs)
    got, _ = jax.jit(sharded)(_empty(attention), inputs)
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("mesh", [ONE_DEVICE, MeshShape(2, 4)], ids=str)
def test_a_step_writes_in_place(mesh: MeshShape) -> None:
    config = dataclasses.replace(
        NATIVE_ENGINE,
        mesh=mesh,
        slots=8,
        row_buckets=(8,),
        kv_dtype="bfloat16",
        kv_tokens=16 * 1024,
    )
    programs = make_programs(tiny_backend(config, NATIVE), config, lambda: 0)
    assert isinstance(programs.attention, CpuPagedAttention)
    compiled = programs.lower(Decode(8)).compile()
    layer = programs.cache()[0].keys
    shape = ",".join(map(str, layer.sharding.shard_shape(layer.shape)))
    made = [line for line in compiled.as_text().splitlines() if f"= bf16[{shape}]" in line]
    assert made
    assert not [line for line in made if " copy(" in line or "fusion(" in line]
    stats = compiled.memory_analysis()
    assert stats.alias_size_in_bytes >= programs.cache_bytes > stats.temp_size_in_bytes


def test_auto_is_native_where_it_fits_and_keeps_bfloat16() -> None:
    device = jax.devices()[0]
    assert attention_for(device, "auto", head_dim=64, page_len=16) is CpuPagedAttention
    assert attention_for(device, "xla", head_dim=64, page_len=16) is PagedAttention
    assert attention_for(device, "auto", head_dim=64, page_len=4) is PagedAttention
    assert attention_for(device, "auto", head_dim=64, page_len=16, fp8=True) is PagedAttention
    with pytest.raises(ConfigError, match="kv_dtype is fp8, which those for CPUs do not read"):
        attention_for(device, "native", head_dim=64, page_len=16, fp8=True)
    with pytest.raises(ConfigError, match=r"head_dim \(8\) and page_len \(16\) .* set auto or xla"):
        attention_for(device, "native", head_dim=8, page_len=16)
    dtypes = {"auto": "bfloat16", "float32": "float32"}
    for dtype, kept in dtypes.items():
        config: Any = EngineConfig(dtype=dtype)
        backend = resolve_decoder(NATIVE, config, make_mesh(ONE_DEVICE), {})
        assert (backend.native, backend.kv_dtype) == (True, kept)


def test_without_a_compiler_xla_attends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "library", lambda: None)
    device = jax.devices()[0]
    assert attention_for(device, "auto", head_dim=64, page_len=16) is PagedAttention
    with pytest.raises(ConfigError, match="could not be compiled"):
        attention_for(device, "native", head_dim=64, page_len=16)


def test_pages_that_do_not_belong_to_the_queries_are_refused() -> None:
    sizes = Sizes(64, 3, 3, 16, 1, "float32")
    attention, inputs = _attention(CpuPagedAttention, sizes), _inputs(sizes)
    with pytest.raises(jax.errors.JaxRuntimeError, match="attention: pages must be"):
        attention.attend(inputs.fused[:, :, :2], _empty(attention), inputs.metadata)

"""The CPU's products against exact integers, and the library that holds them."""

import dataclasses
import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.config import EngineConfig, MeshShape
from inferneo_jax.engine import Engine
from inferneo_jax.kernels.cpu import build
from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.kernels.cpu.linear import Grouped
from inferneo_jax.layers.matrix import Int8, Plain
from inferneo_jax.layers.mlp import gate
from inferneo_jax.layers.norm import RMSNorm
from inferneo_jax.mesh import make_mesh
from inferneo_jax.numerics import formats_for
from inferneo_jax.runner import Runner
from tests.support import MIXED, ONE_DEVICE, TINY, TINY_ENGINE, close, prompt, submit, tiny_weights

VARIANTS: tuple[Variant, ...] = ("native", "avx2", "portable")
F32 = jnp.dtype("float32")

pytestmark = pytest.mark.skipif(library() is None, reason="needs a C++ compiler")


def _supported(variant: Variant) -> bool:
    flags = Path("/proc/cpuinfo")
    has_avx2 = flags.exists() and "avx2" in flags.read_text(encoding="utf-8", errors="replace")
    return variant != "avx2" or has_avx2


@pytest.fixture(params=[v for v in VARIANTS if _supported(v)])
def variant(request: pytest.FixtureRequest) -> Variant:
    assert library(request.param) is not None
    return request.param


def _product(form: Grouped, x: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    stored = tuple(map(jnp.asarray, form.encode(matrix, table=False)))
    product = jax.jit(lambda x, stored: form.product(x, stored, table=False))
    return np.asarray(product(jnp.asarray(x), stored))[:, : matrix.shape[1]]


def _integers(rng: np.random.Generator, rows: int, columns: int, group: int) -> np.ndarray:
    """Integers that are their own quantized values: each group's largest is 127."""
    values = rng.integers(-127, 128, (rows, columns))
    values[:, ::group] = 127
    return values.astype(np.float32)


@pytest.mark.parametrize(("inputs", "outputs"), [(64, 5), (192, 32), (128, 100)])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 13, 40])
def test_a_product_of_integers_is_exact(
    variant: Variant, rows: int, inputs: int, outputs: int
) -> None:
    rng = np.random.default_rng(rows)
    x = _integers(rng, rows, inputs, 64)
    matrix = _integers(rng, outputs, inputs, 64).T
    wanted = x.astype(np.int64) @ matrix.astype(np.int64)
    assert np.abs(wanted).max() < 2**24  # float32 holds it exactly
    np.testing.assert_array_equal(_product(Grouped(F32, variant=variant), x, matrix), wanted)


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def _dequantized(x: np.ndarray, group: int) -> np.ndarray:
    """What a row stands for once each group is rounded to multiples of its absmax / 127."""
    rows, columns = x.shape
    groups = np.pad(x, ((0, 0), (0, -columns % group))).reshape(rows, -1, group)
    most = np.abs(groups).max(axis=2, keepdims=True)
    values = np.rint(groups * (np.float32(127) / most)) * (most / np.float32(127))
    return values.reshape(rows, -1)[:, :columns]


def test_a_product_is_that_of_what_both_sides_are_rounded_to(variant: Variant) -> None:
    form = Grouped(F32, variant=variant)
    x, table = _random(9, 200), _random(50, 200)
    stored = tuple(map(jnp.asarray, form.encode(table, table=True)))
    rounded = np.asarray(form.take(stored, jnp.arange(50)))[:, :200]
    step = np.abs(np.pad(table, ((0, 0), (0, 56))).reshape(50, 4, 64)).max(2).repeat(64, 1) / 127
    assert (np.abs(rounded - table) <= 0.51 * step[:, :200]).all()
    wanted = _dequantized(x, 64) @ rounded.T
    np.testing.assert_allclose(_product(form, x, table.T), wanted, rtol=1e-4, atol=1e-4)


def _around(norm: RMSNorm | None, x: jax.Array, residual: jax.Array | None) -> list[jax.Array]:
    """A product with all that is done before and after it, fused and not."""
    form = Grouped(F32)
    inputs = x.shape[1] // (1 if norm else 2)
    stored = tuple(map(jnp.asarray, form.encode(_random(inputs, 40), table=False)))
    prologue = norm or gate
    fused = form.multiply(x, stored, prologue=prologue, residual=residual)
    apart = form.multiply(prologue(x), stored)
    apart = apart if residual is None else apart[:, : residual.shape[1]] + residual
    return [fused, apart]


@pytest.mark.parametrize("rows", [1, 5, 70])
def test_what_is_fused_gives_what_it_gives_apart(rows: int) -> None:
    norm = RMSNorm(200, 1e-5)
    norm.scale.set_value(jnp.asarray(_random(200)))
    x, residual = jnp.asarray(_random(rows, 200)), jnp.asarray(_random(rows, 40))
    for way in ((norm, x, None), (norm, x, residual), (None, x, None), (None, x, residual)):
        fused, apart = _around(*way)
        # A sum in another order may round a value of a row to its neighbour.
        np.testing.assert_allclose(fused, apart, rtol=0, atol=0.02)
        assert np.abs(np.asarray(fused - apart)).mean() < 1e-4


def test_a_row_gives_the_same_bits_whatever_rows_are_beside_it(variant: Variant) -> None:
    form = Grouped(F32, variant=variant)
    x, matrix = _random(70, 200), _random(200, 96)
    norm = RMSNorm(200, 1e-5)
    stored = tuple(map(jnp.asarray, form.encode(matrix, table=False)))
    multiply = jax.jit(lambda x: form.multiply(x, stored, prologue=norm))
    whole = np.asarray(multiply(jnp.asarray(x)))
    for first, end in ((0, 1), (3, 5), (10, 21), (33, 70)):
        np.testing.assert_array_equal(multiply(jnp.asarray(x[first:end])), whole[first:end])


def test_values_that_are_no_numbers_stay_in_their_rows() -> None:
    x = _random(4, 64)
    clean = _product(Grouped(F32), x, _random(64, 32))
    x[1, 3], x[2, 5] = np.nan, np.inf
    dirty = _product(Grouped(F32), x, _random(64, 32))
    np.testing.assert_array_equal(dirty[[0, 3]], clean[[0, 3]])
    assert not np.isfinite(dirty[[1, 2]]).any()


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Grouped),
        ({"kernels": "native"}, Grouped),
        ({"kernels": "xla"}, Plain),
        ({"dtype": "float32"}, Plain),
        ({"quantization": "none"}, Plain),
        ({"quantization": "int8"}, Int8),
        ({"mesh": MeshShape(1, 2)}, Plain),
    ],
)
def test_a_cpu_keeps_matrices_for_its_kernels(changes: dict[str, Any], expected: type) -> None:
    config = EngineConfig(**({"mesh": ONE_DEVICE} | changes))
    formats = formats_for(config, make_mesh(config.mesh))
    assert type(formats.linear) is type(formats.head) is expected


def test_without_a_library_nothing_is_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_MADE", {"native": None})
    assert type(formats_for(EngineConfig(), make_mesh(ONE_DEVICE)).linear) is Plain


def test_alone_is_batched_with_kernels() -> None:
    config = dataclasses.replace(TINY_ENGINE, slots=8, kv_tokens=640, row_buckets=(1, 8))
    formats = formats_for(config, make_mesh(ONE_DEVICE))
    assert isinstance(formats.linear, Grouped)
    runner = Runner(TINY, tiny_weights(TINY, ONE_DEVICE, formats), config, formats)
    runner.compile()
    engine = Engine(runner)
    try:
        sent = [submit(engine, prompt(9 + i, seed=i), **f).wait() for i, f in enumerate(MIXED)]
        together = [submit(engine, prompt(9 + i, seed=i), **f) for i, f in enumerate(MIXED)]
        for got, wanted in zip(together, sent, strict=True):
            close(got.wait(), wanted)
        assert engine.stats().compiles_after_ready == 0
    finally:
        engine.stop()


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A cache folder with nothing in it, and a process that has loaded nothing."""
    monkeypatch.setattr(build, "_MADE", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "inferneo" / "kernels"


def test_without_a_compiler_there_is_no_library_and_one_warning(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with caplog.at_level(logging.WARNING, build.__name__):
        assert library() is None
        assert library() is None
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "no C++ compiler was found"
    ]
    assert "apt-get install g++" in caplog.text
    assert not fresh.exists()


def test_a_compiler_that_fails_is_told_of(
    fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "false")
    assert library() is None
    assert "false cannot compile the kernels" in caplog.text


def test_a_library_that_was_cut_short_is_made_again(fresh: Path) -> None:
    made = library("portable")
    assert made is not None
    whole = made.path.read_bytes()
    made.path.unlink()  # not truncated in place: this process has it mapped
    made.path.write_bytes(whole[:1000])
    build._MADE.clear()
    again = library("portable")
    assert again is not None
    assert again.path.read_bytes() == whole
    assert list(fresh.iterdir()) == [again.path]


def test_processes_may_build_at_once(fresh: Path) -> None:
    code = (
        "from inferneo_jax.kernels.cpu.build import library; made = library('portable'); "
        "assert made; print(made.path)"
    )

    def start(_: int) -> str:
        ran = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
        )
        return ran.stdout.strip()

    with ThreadPoolExecutor(2) as pool:
        paths = set(pool.map(start, range(2)))
    assert {Path(each).parent for each in paths} == {fresh}
    assert paths >= {str(each) for each in fresh.iterdir()}

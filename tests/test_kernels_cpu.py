"""The CPU's products against exact integers, and the library that holds them."""

import logging
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax.kernels.cpu import build
from inferneo_jax.kernels.cpu.build import Variant, library
from inferneo_jax.kernels.cpu.linear import Grouped

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

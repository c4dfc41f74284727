"""Encoded weights kept on disk: the next start has the very same, and never damaged ones."""

import dataclasses
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, EngineConfig, MeshShape
from inferneo_jax.layers.quantization import EncodingError, Int8, QuantizationConfig, Unquantized
from inferneo_jax.model import load_weights
from inferneo_jax.runner.backends import resolve_decoder
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.weights import cache
from inferneo_jax.weights.checkpoint import read_info
from tests.support.tiny_model import ONE_DEVICE, TINY
from tests.support.weights import write_arrays_checkpoint

F32 = np.dtype("float32")
INT8 = QuantizationConfig.int8(F32, 1, "int8")


def write(path: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    declared = models.weight_specs(TINY)
    weights = {n: rng.normal(size=s.shape).astype(np.float32) for n, s in declared.items()}
    return write_arrays_checkpoint(path, TINY, weights)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Each time that a checkpoint's own weights are read."""
    made: list[Path] = []
    plain = sys.modules["inferneo_jax.model"].open_weights

    def noted(path: Path, wanted: dict[str, tuple[int, ...]]) -> object:
        made.append(path)
        return plain(path, wanted)

    monkeypatch.setattr("inferneo_jax.model.open_weights", noted)
    return made


def load(
    checkpoint: Path,
    folder: Path | None,
    *choices: QuantizationConfig,
    shape: MeshShape = ONE_DEVICE,
) -> list[np.ndarray]:
    config = EngineConfig(mesh=shape, compilation_cache=str(folder) if folder else None)
    mesh = make_mesh(shape, jax.devices()[: shape.data * shape.model])
    choices = choices or (QuantizationConfig.int8(F32, shape.model, "int8"),)
    info = read_info(checkpoint)
    assert isinstance(info.config, DecoderConfig)
    backend = dataclasses.replace(
        resolve_decoder(info.config, config, mesh),
        quantization=choices[-1],
        compact_quantization=choices[0],
    )
    weights, chosen = load_weights(info, backend, config.compilation_cache)
    assert chosen == choices[-1]
    return [np.asarray(each) for each in weights]


def same(some: list[np.ndarray], others: list[np.ndarray]) -> bool:
    return all(
        a.dtype == b.dtype and np.array_equal(a, b) for a, b in zip(some, others, strict=True)
    )


@pytest.mark.parametrize("shape", [ONE_DEVICE, MeshShape(2, 2)], ids=str)
def test_the_next_start_reads_no_checkpoint_and_has_the_same(
    tmp_path: Path, checkpoint: Path, reads: list[Path], shape: MeshShape
) -> None:
    wanted = load(checkpoint, None, shape=shape)
    assert same(load(checkpoint, tmp_path, shape=shape), wanted)
    assert len(reads) == 2
    assert same(load(checkpoint, tmp_path, shape=shape), wanted)
    assert len(reads) == 2
    assert len([*tmp_path.iterdir()]) == 1


def test_numbers_that_numpy_does_not_know_are_kept_too(tmp_path: Path, checkpoint: Path) -> None:
    quantization = QuantizationConfig(Unquantized(jnp.dtype("bfloat16")), INT8.head)
    wanted = load(checkpoint, None, quantization)
    assert {"bfloat16", "int8", "float32"} == {each.dtype.name for each in wanted}
    assert same(load(checkpoint, tmp_path, quantization), wanted)
    assert same(load(checkpoint, tmp_path, quantization), wanted)


class _Refuses(Int8):
    def encode(self, shard: np.ndarray, *, table: bool) -> tuple[np.ndarray, ...]:
        raise EncodingError("not a matrix of mine")


def test_a_format_that_cannot_hold_them_leaves_nothing_and_is_not_tried_again(
    tmp_path: Path, checkpoint: Path, reads: list[Path]
) -> None:
    refuses = _Refuses(F32, 1)
    choices = QuantizationConfig(refuses, refuses), INT8
    wanted = load(checkpoint, tmp_path, *choices)
    assert len(reads) == len([*tmp_path.iterdir()]) == 1
    assert same(load(checkpoint, tmp_path, *choices), wanted)
    assert len(reads) == 1


def test_what_they_are_made_of_tells_them_apart(
    tmp_path: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = write(tmp_path / "a"), write(tmp_path / "b", seed=1)
    folder = tmp_path / "kept"

    def made_again(*arguments: object, **more: object) -> bool:
        before = len(reads)
        load(*arguments, **more)
        return len(reads) > before

    assert made_again(first, folder)
    assert made_again(other, folder)
    assert made_again(first, folder, QuantizationConfig.int8(F32, 1, "float"))
    assert made_again(first, folder, shape=MeshShape(1, 2))
    assert not made_again(first, folder)

    # Another model in the place of the first; its file replaces the other one's.
    kept_files = len([*folder.iterdir()])
    first.rename(tmp_path / "old")
    other.rename(first)
    assert made_again(first, folder)
    assert len([*folder.iterdir()]) == kept_files
    assert same(load(first, folder), load(first, None))

    monkeypatch.setattr(cache, "source_hash", lambda *_: "changed")
    assert made_again(first, folder)
    assert not made_again(first, folder)


def test_what_is_only_cast_is_not_kept(tmp_path: Path, checkpoint: Path) -> None:
    load(checkpoint, tmp_path, QuantizationConfig(Unquantized(F32), Unquantized(F32)))
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: content[:20], id="stub"),
        pytest.param(lambda content: content[: len(content) // 2], id="cut"),
        pytest.param(lambda content: b"\1" + content[1:], id="a byte of a weight"),
        pytest.param(lambda content: content[:-60] + b"\0" + content[-59:], id="the index"),
        pytest.param(lambda content: content[:-40] + bytes(8) + content[-32:], id="its length"),
        pytest.param(lambda content: content[:-40] + b"\xff" * 40, id="a length beyond all"),
        pytest.param(lambda content: content + content, id="twice"),
    ],
)
def test_a_damaged_file_is_as_if_not_there(
    tmp_path: Path,
    checkpoint: Path,
    reads: list[Path],
    caplog: pytest.LogCaptureFixture,
    damage: Callable[[bytes], bytes],
) -> None:
    wanted = load(checkpoint, tmp_path)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    damaged = damage(whole)
    assert damaged != whole
    file.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert same(load(checkpoint, tmp_path), wanted)
    assert len(reads) == 2
    assert same(load(checkpoint, tmp_path), wanted)
    assert [file] == list(tmp_path.iterdir())


def test_files_of_somebody_else_are_read_and_memory_is_asked_for_once(
    tmp_path: Path, checkpoint: Path, reads: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load(checkpoint, tmp_path)

    def refuse(*_: object) -> None:
        raise PermissionError

    asked: list[int] = []
    read = cache.WeightCache.read

    def noted(store: cache.WeightCache) -> cache.EncodedShards | None:
        assert len(asked) == 1
        return read(store)

    monkeypatch.setattr(os, "utime", refuse)
    monkeypatch.setattr(cache.WeightCache, "read", noted)
    monkeypatch.setattr("inferneo_jax.model.require", lambda size, _: asked.append(size))
    assert same(load(checkpoint, tmp_path), wanted)
    assert len(reads) == len(asked) == 1


def test_a_full_or_unwritable_disk_keeps_nothing_and_harms_nothing(
    tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = load(checkpoint, None)
    assert same(load(checkpoint, Path("/dev/null/nowhere")), wanted)
    monkeypatch.setattr(cache, "_SPARE_BYTES", 2**70)
    assert same(load(checkpoint, tmp_path), wanted)
    assert not [*tmp_path.iterdir()]


def test_a_process_that_is_killed_leaves_no_weights_and_others_may_keep_at_once(
    tmp_path: Path, checkpoint: Path, reads: list[Path]
) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.weights.test_kept import load, same;"
        "p, f = map(Path, sys.argv[1:]); assert same(load(p, f), load(p, None))"
    )
    killing = (
        "import os, inferneo_jax.weights.cache as k; k._Writer.finish = lambda _: os._exit(9);"
    )

    def start(code: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", code, str(checkpoint), str(tmp_path)]
        return subprocess.Popen(command, env=os.environ | {"JAX_PLATFORMS": "cpu"})

    assert start(killing + code).wait(timeout=120) == 9
    assert [file.suffix for file in tmp_path.iterdir()] == [".partial"]
    at_once = [start(code) for _ in range(2)]
    assert [process.wait(timeout=120) for process in at_once] == [0, 0]
    assert len([*tmp_path.glob("*.weights")]) == 1
    assert same(load(checkpoint, tmp_path), load(checkpoint, None))
    assert len(reads) == 1

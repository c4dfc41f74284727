"""From weights on disk to arrays on devices: what is read, when, and in how much memory."""

import dataclasses
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from inferneo_jax import models
from inferneo_jax.config import DecoderConfig, MeshShape
from inferneo_jax.errors import CheckpointError
from inferneo_jax.layers.blocks import BlockPart, BlockRows
from inferneo_jax.layers.quantization import HostArray, QuantizationConfig, Unquantized
from inferneo_jax.sharding.mesh import make_mesh
from inferneo_jax.sharding.padding import pad_for_mesh
from inferneo_jax.weights.convert import read_model
from inferneo_jax.weights.placement import place_weights
from tests.support.tiny_model import ONE_DEVICE, TINY

F32 = jnp.dtype("float32")
SPECS = models.weight_specs(TINY)
MATRICES = {name: spec for name, spec in SPECS.items() if spec.inputs}
READERS = 4


class Disk:
    """Notes which weights are read, and the largest number of bytes that are being read at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.reading = self.most = 0
        self.read: list[str] = []

    def take(self, name: str, size: int) -> None:
        with self.lock:
            self.read.append(name)
            self.reading += size
            self.most = max(self.most, self.reading)
        time.sleep(0.002)  # as long as a disk takes, so that readers meet
        with self.lock:
            self.reading -= size


@dataclasses.dataclass(frozen=True)
class OnDisk:
    """A weight whose numbers are one for each row of a file."""

    disk: Disk
    name: str
    shape: tuple[int, ...]
    parts: tuple[BlockPart, ...] | None = None

    def __getitem__(self, index: Any, /) -> np.ndarray:
        found = np.ones(self.shape, np.float32)[index]
        self.disk.take(self.name, found.nbytes)
        return found

    def blocks(self) -> tuple[BlockRows, ...]:
        assert self.parts
        self.disk.take(f"blocks of {self.name}", 0)
        return tuple(BlockRows(part, (np.full((1, 1), 7, np.uint8),)) for part in self.parts)


@dataclasses.dataclass(frozen=True)
class Stored(Unquantized):
    """Takes blocks of one format, each of which says what number the whole matrix is made of."""

    parts: tuple[BlockPart, ...] = ()
    shape: tuple[int, ...] = ()

    def stores(self, parts: tuple[BlockPart, ...] | None) -> bool:
        return parts == self.parts

    def encode_blocks(self, blocks: tuple[BlockRows, ...]) -> tuple[HostArray, ...]:
        ((_, ((number,),)),) = blocks
        return (np.full(self.shape, number, np.float32),)


def place(
    weights: dict[str, OnDisk],
    quantization: QuantizationConfig = models.REFERENCE,
    **more: Callable[..., None],
) -> dict[str, np.ndarray]:
    placed = place_weights(weights, TINY, TINY, make_mesh(ONE_DEVICE), quantization, **more)
    return dict(zip(SPECS, map(np.asarray, placed), strict=True))


def test_reading_takes_the_memory_of_the_largest_weight() -> None:
    disk = Disk()
    place({name: OnDisk(disk, name, spec.shape) for name, spec in SPECS.items()})
    sizes = [4 * int(np.prod(spec.shape)) for spec in SPECS.values()]
    assert sorted(disk.read) == sorted(SPECS)
    assert disk.most <= max(sizes) < sum(sorted(sizes)[-READERS:])


def test_blocks_are_taken_where_the_method_stores_them(tmp_path: object) -> None:
    disk = Disk()
    part = (BlockPart("q4_k", ((0, 24),)),)
    other = (BlockPart("q6_k", ((0, 24),)),)
    stored = "layers.0.mlp.down.kernel", "layers.1.mlp.down.kernel", "embed.table"
    formats = dict(zip(stored, (part, other, part), strict=True))
    weights = {n: OnDisk(disk, n, s.shape, formats.get(n)) for n, s in SPECS.items()}
    kept = {name: Stored(F32, part, SPECS[name].flat_shape) for name in stored[:2]}
    placed = place(weights, models.REFERENCE.excepting(kept))
    read = {name.removeprefix("blocks of "): name for name in disk.read}
    assert [name for name in SPECS if read[name] != name] == ["layers.0.mlp.down.kernel"]
    assert {name: array.mean() for name, array in placed.items() if name in MATRICES} == {
        name: 7.0 if name == stored[0] else 1.0 for name in MATRICES
    }


def test_progress_counts_the_bytes_that_are_placed() -> None:
    calls: list[tuple[str, int, int]] = []
    weights = {name: OnDisk(Disk(), name, spec.shape) for name, spec in SPECS.items()}
    placed = place(weights, progress=lambda *call: calls.append(call))
    total = sum(array.nbytes for array in placed.values())
    assert calls[0] == ("loading", 0, total)
    assert calls[-1] == ("loading", total, total)
    assert len(calls) == 1 + len(SPECS)
    assert calls == sorted(calls)


def test_a_weight_that_cannot_be_read_ends_loading() -> None:
    class Broken(OnDisk):
        def __getitem__(self, index: Any, /) -> np.ndarray:
            raise CheckpointError("a disk failed")

    disk = Disk()
    weights = {name: OnDisk(disk, name, spec.shape) for name, spec in SPECS.items()}
    weights["layers.0.mlp.down.kernel"] = Broken(disk, "broken", (32, 24))
    with pytest.raises(CheckpointError, match="a disk failed"):
        place(weights)


def test_every_row_is_read_once_however_many_devices_share_it(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = read_model(made.folder(tmp_path / "hf", made.LLAMA))
    model, shape = opened.config, MeshShape(data=1, model=8)
    assert isinstance(model, DecoderConfig)
    mesh, size = make_mesh(shape), sum(tensor.size for tensor in opened.tensors.values())
    weights = {
        name: replace(
            weight, tensors=tuple(replace(each, span_bytes=256) for each in weight.tensors)
        )
        for name, weight in opened.weights.items()
    }
    read = 0
    preadv = os.preadv

    def counting(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        nonlocal read
        read += sum(map(len, buffers))
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", counting)
    padded = pad_for_mesh(model, 8)
    place_weights(weights, model, padded, mesh, models.REFERENCE)
    # Each KV head is read by the two devices that share it.
    heads = sum(t.size for name, t in opened.tensors.items() if ".self_attn." in name)
    assert size <= read <= size + 3 * heads + size // 20

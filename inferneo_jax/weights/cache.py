"""The cache of encoded weights on disk.

Encoding a model takes longer than the rest of a start. The result is one file for each checkpoint,
quantization and mesh, which the next start reads straight into memory::

    arrays      each at a multiple of 64 bytes, from which jax takes them without a copy
    index       JSON: what the arrays were made of, and the offset of each
    8 bytes     the length of the index
    32 bytes    SHA-256 of everything before

The file is created completely or not at all, and replaces its predecessor. A file that is damaged,
or was made of something else, is ignored.
"""

import contextlib
import hashlib
import json
import logging
import math
import os
import shutil
import struct
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orjson
from jax.sharding import Mesh

from inferneo_jax.layers.quantization import HostArray, QuantizationConfig, Unquantized
from inferneo_jax.platform.atomic import PARTIAL
from inferneo_jax.platform.source import DEVICE_ROOMS, source_hash

log = logging.getLogger(__name__)

WEIGHTS_SUFFIX = ".weights"
"""Suffix of the cache's files, in the folder of compiled programs."""

EncodedShards = dict[tuple[str, int], tuple[HostArray, ...]]
"""The encoded arrays of each shard, by the weight's name and the shard's number."""
Keep = Callable[[str, int, tuple[HostArray, ...]], None]
Bytes = np.ndarray[Any, np.dtype[np.uint8]]

_ALIGNMENT = 64
_LENGTH = struct.Struct("!Q")
_DIGEST_BYTES = hashlib.sha256().digest_size
_SMALL_BYTES = 2**16
_SPARE_BYTES = 2**30
"""Disk space that is left free."""


class WeightCache:
    """The cached shards of one checkpoint on one mesh that this process holds.

    Args:
        folder: created if it does not exist; None disables the cache.
        checkpoint: the folder of the model.
        mesh: of the devices that hold the weights.
        quantization: of the matrices. If it encodes none of them, nothing is cached.
    """

    def __init__(
        self,
        folder: str | Path | None,
        checkpoint: Path,
        mesh: Mesh,
        quantization: QuantizationConfig,
    ) -> None:
        encodes = not isinstance(quantization.linear, Unquantized) or not isinstance(
            quantization.head, Unquantized
        )
        self._file: Path | None = None
        if folder is None or not encodes:
            return
        where = (
            str(checkpoint.absolute()),
            quantization,
            (mesh.axis_names, mesh.devices.shape, [device.id for device in mesh.devices.flat]),
            (jax.process_index(), jax.process_count()),
        )
        self._file = Path(folder) / f"{_digest(where)}{WEIGHTS_SUFFIX}"
        self._made_of = _digest(source_hash(*DEVICE_ROOMS), sys.byteorder, *_content(checkpoint))

    @property
    def exists(self) -> bool:
        """Whether the file exists."""
        return self._file is not None and self._file.exists()

    def read(self) -> EncodedShards | None:
        """Read all shards; None if there is no usable file."""
        if self._file is None:
            return None
        try:
            found = self._shards(_read_aligned(self._file))
            with contextlib.suppress(PermissionError):
                os.utime(self._file)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, LookupError, TypeError, struct.error) as error:
            log.warning("kept weights cannot be used and are encoded again: %s", error)
            return None
        return found

    @contextlib.contextmanager
    def writing(self) -> Iterator[Keep]:
        """Give a function that caches a shard, to be called from any thread.

        The file is created when the block ends, unless it raises or the disk cannot be written to.
        """
        if self._file is None:
            yield _discard
            return
        writer = _Writer(self._file, self._made_of)
        try:
            yield writer.add
            writer.finish()
        finally:
            writer.close()

    def _shards(self, content: Bytes) -> EncodedShards | None:
        """Views of a file's arrays; None if they were made of something else."""
        body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        (length,) = _LENGTH.unpack(body[-_LENGTH.size :].tobytes())
        index = orjson.loads(body[: -_LENGTH.size][-length:].tobytes())
        if index["made_of"] != self._made_of:
            return None
        if hashlib.sha256(body.data).digest() != digest.tobytes():
            raise ValueError("the file is damaged")
        shards: EncodedShards = {}
        for name, number, start, dtype, shape in index["arrays"]:
            end = start + math.prod(shape) * jnp.dtype(dtype).itemsize
            array = body[start:end].view(jnp.dtype(dtype)).reshape(shape)
            shards[name, number] = (*shards.get((name, number), ()), array)
        return shards


class _Writer:
    """Writes a file under a temporary name until it is complete; gives up at the first error."""

    def __init__(self, file: Path, made_of: str) -> None:
        self._file = file
        self._index: dict[str, Any] = {"made_of": made_of, "arrays": []}
        self._lock = threading.Lock()
        self._digest = hashlib.sha256()
        self._end = 0
        self._out: Any = None
        with self._giving_up():
            file.parent.mkdir(parents=True, exist_ok=True)
            self._out = tempfile.NamedTemporaryFile(  # noqa: SIM115  (close() is called)
                dir=file.parent, suffix=PARTIAL, delete=False
            )

    def add(self, name: str, number: int, arrays: tuple[HostArray, ...]) -> None:
        """Append the arrays of one shard."""
        with self._lock:
            for array in map(np.ascontiguousarray, arrays):
                self._write(bytes(-self._end % _ALIGNMENT))
                place = name, number, self._end, array.dtype.name, array.shape
                self._index["arrays"].append(place)
                self._write(array.reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Complete the file and give it its name."""
        index = json.dumps(self._index).encode()
        self._write(index + _LENGTH.pack(len(index)))
        self._write(self._digest.digest())
        if self._out is None:
            return
        with self._giving_up():
            self._out.close()
            Path(self._out.name).replace(self._file)
            self._out = None

    def close(self) -> None:
        """Remove the file if it was not finished."""
        if self._out is not None:
            self._out.close()
            Path(self._out.name).unlink(missing_ok=True)
            self._out = None

    def _write(self, content: bytes | memoryview) -> None:
        with self._giving_up():
            if self._out is None:
                return
            free = shutil.disk_usage(self._file.parent).free
            if free - len(content) < _SPARE_BYTES:
                raise OSError(f"only {free // 2**20} MB are free")
            self._out.write(content)
            self._digest.update(content)
            self._end += len(content)

    @contextlib.contextmanager
    def _giving_up(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            log.info("encoded weights are not kept: %s", error)
            with contextlib.suppress(OSError):
                self.close()


def _discard(name: str, number: int, arrays: tuple[HostArray, ...]) -> None:
    """Ignore a shard."""


def _read_aligned(file: Path) -> Bytes:
    """A file's bytes, at an address that is a multiple of the alignment."""
    with file.open("rb", buffering=0) as opened:
        size = os.fstat(opened.fileno()).st_size
        room = np.empty(size + _ALIGNMENT, np.uint8)
        start = -room.ctypes.data % _ALIGNMENT
        content = room[start : start + size]
        done = 0
        while done < size and (count := opened.readinto(content[done:].data)):
            done += count
    return content[:done]


def _content(checkpoint: Path) -> Iterator[object]:
    """What identifies a checkpoint: the content of small files, size and time of large ones."""
    for file in sorted(checkpoint.rglob("*")):
        if file.is_file():
            status, name = file.stat(), file.relative_to(checkpoint).as_posix()
            small = status.st_size <= _SMALL_BYTES
            yield name, file.read_bytes() if small else (status.st_size, status.st_mtime_ns)


def _digest(*facts: object) -> str:
    return hashlib.sha256("\n".join(map(repr, facts)).encode()).hexdigest()[:40]

"""Weights as an Orbax checkpoint of ``{name: array}``, written and read with TensorStore.

TensorStore writes what Orbax would, so Orbax reads it too: one array after the other, so that no
more than one is in memory, each in chunks with a CRC-32C that is compared when a chunk is read.
"""

import contextlib
import json
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import orjson

from inferneo_jax.errors import CheckpointError
from inferneo_jax.layers.blocks import Bytes
from inferneo_jax.weights.shapes import compare_shapes
from inferneo_jax.weights.sources.tensor import Array, Reader, StoredTensor, stored_bytes

_DESCRIPTION = b"/zarr.json"
_METADATA = "_METADATA"
_CHUNK_BYTES = 2**24


def write_arrays(folder: Path, arrays: Iterable[tuple[str, Array]]) -> None:
    """Write an Orbax checkpoint at ``folder``; arrays keep their dtype, and are taken one by one.

    Raises:
        OSError: they cannot be written.
    """
    import tensorstore

    folder.mkdir()
    context = tensorstore.Context()
    tree = {}
    try:
        for name, array in arrays:
            tree[str((name,))] = {
                "key_metadata": [{"key": name, "key_type": 2}],
                "value_metadata": {"value_type": "np.ndarray", "skip_deserialize": False},
            }
            stored = tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {**_store(folder), "path": f"{name}/"},
                    "metadata": {
                        "shape": list(array.shape),
                        "data_type": array.dtype.name,
                        "chunk_grid": {
                            "name": "regular",
                            "configuration": {"chunk_shape": _chunk(array)},
                        },
                        "codecs": [{"name": "bytes"}, {"name": "crc32c"}],
                    },
                },
                create=True,
                context=context,
            ).result()
            stored[...].write(array).result()
    except ValueError as error:  # as which TensorStore reports a full disk
        raise OSError(str(error).split(". ")[0]) from error
    metadata = {
        "tree_metadata": tree,
        "use_ocdbt": True,
        "use_zarr3": True,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    (folder / _METADATA).write_text(json.dumps(metadata), encoding="utf-8")


def _chunk(array: Array) -> list[int]:
    """The shape of chunks of at most 16 MiB, so that reading a slice reads little more than that.

    The first dimensions are cut to one before the next is cut.
    """
    shape = list(array.shape)
    for dimension, size in enumerate(shape):
        rest = array.itemsize * int(np.prod(shape[dimension + 1 :]))
        shape[dimension] = max(1, min(size, _CHUNK_BYTES // max(1, rest)))
        if shape[dimension] > 1:
            break
    return [max(1, size) for size in shape]


@dataclass(frozen=True, slots=True)
class OrbaxWeight:
    """One weight of a checkpoint. Indexing it reads that slice from disk, and no more.

    Attributes:
        shape: of the whole weight.
    """

    shape: tuple[int, ...]
    _folder: Path
    _array: Any
    parts: ClassVar[None] = None

    def blocks(self) -> None:
        """None: it is not stored in blocks."""

    def __getitem__(self, index: Any, /) -> Array:
        try:
            return np.asarray(self._array[index].read().result())
        except MemoryError:
            raise
        except Exception as error:  # damaged files come out of TensorStore as that
            raise _damaged(self._folder, error) from error


@dataclass(frozen=True, kw_only=True)
class OrbaxTensor(StoredTensor):
    """A tensor in an Orbax checkpoint: an array of floats, or ``[rows, bytes of a row]``.

    Attributes:
        folder: of the checkpoint, for errors.
        array: as TensorStore opened it.
    """

    folder: Path
    array: Any

    @property
    def _where(self) -> str:
        return str(self.folder)

    @property
    def _span_bytes(self) -> int:
        return _CHUNK_BYTES

    @property
    def _row_bytes(self) -> int:
        return (stored_bytes(self.format, self.shape) or 0) // self.shape[0]

    @contextlib.contextmanager
    def _reader(self) -> Iterator[Reader]:
        yield self._read

    def _read(self, span: int, out: Bytes) -> None:
        first = span * self._rows_per_span
        try:
            found = np.ascontiguousarray(self.array[first : first + len(out)].read().result())
        except MemoryError:
            raise
        except Exception as error:
            raise _damaged(self.folder, error) from error
        out[:] = found.reshape(-1).view(np.uint8).reshape(out.shape)


def open_tensors(
    folder: Path, described: Mapping[str, tuple[str, tuple[int, ...]]]
) -> dict[str, OrbaxTensor]:
    """Open tensors in an Orbax checkpoint, to be read by rows.

    Args:
        folder: of the checkpoint.
        described: format and shape of each tensor, by name.

    Raises:
        WeightsError: names each missing, unused or misshapen array.
        CheckpointError: the files are damaged or missing.
    """
    arrays = {}
    for name, (format, shape) in described.items():
        size = stored_bytes(format, shape)
        if not size:
            raise _damaged(folder, f"{name} cannot be {format} of the shape {list(shape)}")
        floats = format in ("f32", "f16", "bf16")
        arrays[name] = shape if floats else (shape[0], size // shape[0])
    opened = open_arrays(folder, arrays)
    return {
        name: OrbaxTensor(
            name=name, shape=shape, format=format, folder=folder, array=opened[name]._array
        )
        for name, (format, shape) in described.items()
    }


def open_arrays(folder: Path, wanted: Mapping[str, tuple[int, ...]]) -> dict[str, OrbaxWeight]:
    """Open the weights in an Orbax checkpoint, to be read by slices.

    Every name and shape is compared before any array is opened.

    Raises:
        WeightsError: names each missing, unused or misshapen weight.
        CheckpointError: the files are damaged or missing.
    """
    import tensorstore

    compare_shapes(array_shapes(folder), wanted, str(folder.parent))
    context = tensorstore.Context()  # the weights share one view of the folder
    opening = {
        name: tensorstore.open(
            {
                "driver": "zarr3",
                "kvstore": {**_store(folder), "path": f"{name}/"},
            },
            open=True,
            read=True,
            context=context,
        )
        for name in wanted
    }
    try:
        return {
            name: OrbaxWeight(tuple(wanted[name]), folder, future.result())
            for name, future in opening.items()
        }
    except Exception as error:
        raise _damaged(folder, error) from error


def array_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights in an Orbax checkpoint, without reading any of them.

    Raises:
        CheckpointError: the weights' own description is damaged or missing.
    """
    import tensorstore

    try:
        store = tensorstore.KvStore.open(_store(folder)).result()
        keys = [key for key in store.list().result() if key.endswith(_DESCRIPTION)]
        described = [store.read(key) for key in keys]
        shapes = {
            key.removesuffix(_DESCRIPTION).decode(): tuple(
                map(operator.index, orjson.loads(each.result().value)["shape"])
            )
            for key, each in zip(keys, described, strict=True)
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise _damaged(folder, error) from error
    if not shapes:
        raise _damaged(folder, "no description of them is left")
    return shapes


def _store(folder: Path) -> dict[str, Any]:
    """TensorStore's specification of the files that hold all weights."""
    return {"driver": "ocdbt", "base": f"file://{folder}/"}


def _damaged(folder: Path, why: object) -> CheckpointError:
    first_sentence = (str(why) or type(why).__name__).split(". ")[0].splitlines()[0]
    return CheckpointError(
        f"the weights in {folder} cannot be read ({first_sentence}); "
        "remove the model with `inferneo rm` and convert or pull it again"
    )

"""The table of a checkpoint's tensors.

For tensors in files of another format it says where each one is, so that a start reads no header,
vocabulary or tokenizer of that format, and has a checksum for each span of it, so that damage is
noticed while it is read. For those in an Orbax checkpoint it has their formats.
"""

import contextlib
import json
import math
import os
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import check_regular, read_object, shown
from inferneo_jax.platform.progress import Progress
from inferneo_jax.weights.sources.tensor import SPAN_BYTES, FileTensor, stored_bytes

TABLE_FILE = "weights.json"
_READERS = 2
_HEX = 8
_MAX_DIMENSIONS = 8


def checked(tensors: Mapping[str, FileTensor], progress: Progress) -> dict[str, FileTensor]:
    """The same tensors with checksums; every byte is read once.

    Raises:
        CheckpointError: a file cannot be read.
    """
    total = sum(tensor.size for tensor in tensors.values())
    lock, done = threading.Lock(), 0

    def each(count: int) -> None:
        nonlocal done
        with lock:
            done += count
            progress("checking", done, total)

    progress("checking", 0, total)
    with ThreadPoolExecutor(_READERS) as pool:
        found = pool.map(lambda tensor: tensor.with_checksums(each), tensors.values())
        return dict(zip(tensors, found, strict=True))


def write_table(
    folder: Path, tensors: Mapping[str, FileTensor], made_of: Mapping[str, Any] | None
) -> None:
    """Write the table of a checkpoint's tensors.

    Args:
        folder: where it is written.
        tensors: by their Hugging Face names, with checksums; paths of files may be relative to
            the folder.
        made_of: what tells whether the files have been replaced since; see ``is_made_of``.
    """
    files = sorted({tensor.file for tensor in tensors.values()})
    values = {
        "files": [{"path": str(file), "size": (folder / file).stat().st_size} for file in files],
        "span_bytes": SPAN_BYTES,
        "made_of": made_of,
        "tensors": {
            name: {
                "file": files.index(tensor.file),
                "name": tensor.name,
                "format": tensor.format,
                "shape": tensor.shape,
                "offset": tensor.offset,
                "interleaved_heads": tensor.interleaved_heads,
                "checksums": "".join(f"{each:0{_HEX}x}" for each in tensor.checksums or ()),
            }
            for name, tensor in tensors.items()
        },
    }
    text = json.dumps(values, ensure_ascii=False)
    (folder / TABLE_FILE).write_text(text + "\n", encoding="utf-8")


def read_table(folder: Path) -> dict[str, FileTensor]:
    """The tensors of a checkpoint by their Hugging Face names, after a check of all files' sizes.

    Raises:
        CheckpointError: the table is damaged, or a file is missing or of another size.
    """
    table = folder / TABLE_FILE
    values = _read(table)
    with _explained(table):
        files = [(folder / each["path"], each["size"]) for each in values["files"]]
        tensors = {
            name: _tensor(each, files, values["span_bytes"])
            for name, each in values["tensors"].items()
        }
    for file, size in files:
        try:
            found = check_regular(file)
        except OSError as error:
            raise CheckpointError(
                f"{file} has the weights of the model in {folder} and cannot be read "
                f"({error.strerror or error}); put it back, or remove the model with `inferneo rm` "
                "and pull or convert it again"
            ) from error
        if found != size:
            raise CheckpointError(
                f"{file} has {found} bytes, and had {size} when the model in {folder} was made; "
                "restore it, or remove the model with `inferneo rm` and pull or convert it again"
            )
    return tensors


def write_formats(folder: Path, formats: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Write the table of the tensors in an Orbax checkpoint: format and shape of each, by name."""
    tensors = {name: {"format": f, "shape": shape} for name, (f, shape) in formats.items()}
    text = json.dumps({"tensors": tensors}, ensure_ascii=False)
    (folder / TABLE_FILE).write_text(text + "\n", encoding="utf-8")


def read_formats(folder: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Format and shape of each tensor in an Orbax checkpoint, by name.

    Raises:
        CheckpointError: the table is damaged.
    """
    table = folder / TABLE_FILE
    values = _read(table)
    with _explained(table):
        return {
            name: (str(each["format"]), _shape(each["shape"]))
            for name, each in values["tensors"].items()
        }


@contextlib.contextmanager
def _explained(table: Path) -> Iterator[None]:
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(
            f"{table} is not what this version writes ({type(error).__name__}: {error}); remove "
            "the model and pull or convert it again"
        ) from error


def is_made_of(folder: Path, made_of: Mapping[str, Any]) -> bool:
    """Whether the checkpoint in a folder was made of just these files, and has a table."""
    try:
        return bool(_read(folder / TABLE_FILE)["made_of"] == made_of)
    except (CheckpointError, KeyError):
        return False


def relative(tensors: Mapping[str, FileTensor], folder: Path) -> dict[str, FileTensor]:
    """The same tensors, with relative paths for files that move with a folder: in or beside it."""
    parent = folder.parent
    return {
        name: replace(tensor, file=Path(os.path.relpath(tensor.file, folder)))
        if tensor.file.is_relative_to(parent)
        else tensor
        for name, tensor in tensors.items()
    }


def _read(table: Path) -> dict[str, Any]:
    try:
        return read_object(table)
    except FileNotFoundError:
        raise CheckpointError(
            f"{table.parent} has no {TABLE_FILE}; remove the model and pull or convert it again"
        ) from None


def _tensor(values: dict[str, Any], files: list[tuple[Path, int]], span_bytes: int) -> FileTensor:
    """One tensor of a table; every number of it is checked, for kernels rely on them."""
    file, size = files[_integer(values["file"], 0)]
    shape = _shape(values["shape"])
    heads = values["interleaved_heads"]
    if heads is not None and shape[0] % (2 * _integer(heads, 1)):
        raise ValueError(f"{heads} heads do not divide {shape[0]} rows")
    text = values["checksums"]
    tensor = FileTensor(
        file=file,
        name=str(values["name"]),
        shape=shape,
        format=str(values["format"]),
        offset=_integer(values["offset"], 0),
        size=stored_bytes(values["format"], shape) or 0,
        interleaved_heads=heads,
        checksums=tuple(int(text[i : i + _HEX], 16) for i in range(0, len(text), _HEX)),
        span_bytes=_integer(span_bytes, 1),
    )
    if not tensor.size or tensor.offset + tensor.size > _integer(size, 1):
        raise ValueError(f"{shown(tensor.name)} is not within its file")
    if len(tensor.checksums or ()) != tensor.num_spans:
        raise ValueError(f"{shown(tensor.name)} has not {tensor.num_spans} checksums")
    return tensor


def _shape(values: list[object]) -> tuple[int, ...]:
    shape = tuple(_integer(each, 1) for each in values)
    if not 1 <= len(shape) <= _MAX_DIMENSIONS or math.prod(shape) > 2**63:
        raise ValueError(f"{shown(shape)} is not a shape")
    return shape


def _integer(value: object, least: int) -> int:
    if type(value) is not int or value < least:
        raise ValueError(f"{shown(value)} is not an integer of at least {least}")
    return value

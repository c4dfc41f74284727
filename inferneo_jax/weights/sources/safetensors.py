"""Finds the tensors in a folder's safetensors files.

The library checks that the tensors fill the file without gaps or overlaps. This module first checks
that the header is small enough to be given to the library, and then reads the offsets from it.
"""

import re
import struct
from pathlib import Path

import orjson
from safetensors import SafetensorError, safe_open

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import check_regular, one_line, read_object, shown
from inferneo_jax.weights.sources.tensor import FileTensor

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_SHARD = re.compile(r"[\w.+-]{1,200}\.safetensors", re.ASCII)
_LENGTH = struct.Struct("<Q")
_MAX_HEADER_BYTES = 2**23
"""A header takes about 130 bytes for each tensor; a model of 1,000 layers has 12,000 tensors."""
_MAX_TENSORS = 2**15
_MAX_DIMENSIONS = 8
_MAX_NAME = 512


def read_tensors(folder: Path) -> dict[str, FileTensor]:
    """The tensors of all weight files of a folder, which may be one file or several shards.

    Raises:
        CheckpointError: a file is missing, damaged, or not safetensors.
    """
    if (folder / _SINGLE).exists():
        return _file_tensors(folder / _SINGLE)
    if not (folder / _INDEX).exists():
        if any(folder.glob("*.bin")) or any(folder.glob("*.pt*")):
            raise CheckpointError(
                f"{folder} has only PyTorch pickles, which can run code when they are read; "
                "take a release of the model with safetensors, or save it as such"
            )
        raise CheckpointError(f"{folder} has neither {_SINGLE} nor {_INDEX}")
    places = read_object(folder / _INDEX).get("weight_map")
    if not isinstance(places, dict):
        raise CheckpointError(f"{folder / _INDEX} has no weight_map; download it again")
    shards = {shard if isinstance(shard, str) else shown(shard) for shard in places.values()}
    found: dict[str, FileTensor] = {}
    for shard in sorted(shards):
        if not _SHARD.fullmatch(shard):
            raise CheckpointError(
                f"{folder / _INDEX} names a file outside the folder, or none of safetensors: "
                f"{shown(shard)}"
            )
        tensors = _file_tensors(folder / shard)
        if twice := found.keys() & tensors.keys():
            raise CheckpointError(f"{folder}: {shown(min(twice))} is in two shards")
        found |= tensors
    if absent := sorted(places.keys() - found.keys()):
        raise CheckpointError(
            f"{folder}: {len(absent)} tensors of the index are in no shard, the first "
            f"{shown(absent[0])}; download the shards again"
        )
    return found


def _file_tensors(file: Path) -> dict[str, FileTensor]:
    try:
        header_bytes = _check_header(file)
        with safe_open(file, "numpy") as opened:
            names = list(opened.keys())
            if len(names) > _MAX_TENSORS:
                raise CheckpointError(
                    f"{file} has {len(names)} tensors; at most {_MAX_TENSORS} are read"
                )
            with file.open("rb") as raw:
                raw.seek(_LENGTH.size)
                header = orjson.loads(raw.read(header_bytes))
            found = {}
            for name in names:
                shape = tuple(opened.get_slice(name).get_shape())
                start, end = header[name]["data_offsets"]
                if len(shape) > _MAX_DIMENSIONS or len(name) > _MAX_NAME:
                    raise CheckpointError(
                        f"{file}: {shown(name)} has {len(shape)} dimensions and a name of "
                        f"{len(name)} characters; at most {_MAX_DIMENSIONS} and {_MAX_NAME} "
                        "are read"
                    )
                found[name] = FileTensor(
                    file=file,
                    name=name,
                    shape=shape,
                    format=header[name]["dtype"].lower(),
                    offset=_LENGTH.size + header_bytes + start,
                    size=end - start,
                )
            return found
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing; download the model again") from None
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(
            f"{file} is not a whole safetensors file ({one_line(error)}); download it again"
        ) from error


def _check_header(file: Path) -> int:
    """The header's size; raises ValueError if it is out of bounds or exceeds the file."""
    size = check_regular(file)
    with file.open("rb") as opened:
        start = opened.read(_LENGTH.size)
    if len(start) < _LENGTH.size:
        raise ValueError(f"it has {size} bytes")
    (length,) = _LENGTH.unpack(start)
    if length > min(size - _LENGTH.size, _MAX_HEADER_BYTES):
        raise ValueError(
            f"its header has {length} bytes, the file {size}; at most {_MAX_HEADER_BYTES} are read"
        )
    return int(length)

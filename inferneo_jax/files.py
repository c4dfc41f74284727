"""Reads untrusted files that come with a model.

Such a file must be a regular file of bounded size, and its JSON must have a bounded shape, before
anything is built from it. ``shown`` formats its values for error messages.
"""

import os
import reprlib
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from inferneo_jax.errors import CheckpointError

_SHOWN, _MESSAGE = 100, 300
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring = 3, _SHOWN


@dataclass(frozen=True, kw_only=True)
class JsonBounds:
    """Limits on a JSON file, checked before it is parsed.

    Python objects take up to 80 times as many bytes as their JSON (64 bytes for ``[],``, 240 for
    ``{"a":0},``), so brackets and commas are counted as well.
    """

    size: int
    arrays: int
    objects: int
    commas: int


SMALL_JSON = JsonBounds(size=2**24, arrays=2**17, objects=2**17, commas=2**20)
"""Bounds of configurations and indexes; the largest in use list 30,000 added tokens in 6 MB."""

TOKENIZER_JSON = JsonBounds(size=2**26, arrays=2**20, objects=2**17, commas=2**22)
"""Bounds of tokenizers; the largest in use has 262,144 tokens and 514,906 merges in 33 MB."""

MAX_TEXT_BYTES = 2**20
"""Maximum size of chat templates and model cards; the longest templates in use have 30 KB."""


def shown(value: object) -> str:
    """Format a value of a model's file for an error message: escaped, and cut if long or deep."""
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def one_line(problem: object) -> str:
    """Format a library's error for an error message; it may quote the content of the file."""
    text = " ".join(str(problem)[:_MESSAGE].split()) or type(problem).__name__
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)


def check_regular(file: Path, error: type[CheckpointError] = CheckpointError) -> int:
    """Check that a path is a regular file, or a link to one, and return its size in bytes.

    Raises:
        CheckpointError: it is a folder, a device or a pipe, which could block or never end.
        OSError: the path cannot be examined.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise error(f"{file} is not a regular file; replace it with the model's own file")
    return status.st_size


def read_file(file: Path, max_bytes: int, error: type[CheckpointError] = CheckpointError) -> bytes:
    """Read a model's file, which must lie in the model's own folder.

    Raises:
        CheckpointError: the file is too large, not regular, or a link out of the folder.
        OSError: the file cannot be read.
    """
    _refuse_foreign(file, error)
    size = check_regular(file, error)
    if size > max_bytes:
        raise error(f"{file} has {size} bytes; at most {max_bytes} are read")
    with file.open("rb") as opened:
        return opened.read(max_bytes)


def read_text(file: Path, error: type[CheckpointError] = CheckpointError) -> str:
    """Read UTF-8 text of at most ``MAX_TEXT_BYTES``; raises the same errors as ``read_json``."""
    try:
        return read_file(file, MAX_TEXT_BYTES, error).decode()
    except (OSError, ValueError) as problem:
        raise error(f"{file} cannot be read: {one_line(problem)}") from problem


def read_json(
    file: Path,
    bounds: JsonBounds = SMALL_JSON,
    error: type[CheckpointError] = CheckpointError,
) -> Any:
    """Read the value in a JSON file.

    Raises:
        CheckpointError: the file cannot be read, is not JSON in UTF-8, or exceeds its bounds.
        FileNotFoundError: the file does not exist.
    """
    try:
        data = read_file(file, bounds.size, error)
    except FileNotFoundError:
        raise
    except OSError as problem:
        raise error(f"{file} cannot be read: {one_line(problem)}") from problem
    for mark, name, most in (
        (b"[", "arrays", bounds.arrays),
        (b"{", "objects", bounds.objects),
        (b",", "commas", bounds.commas),
    ):
        if (count := data.count(mark)) > most:
            raise error(f"{file} has {count} {name}; at most {most} are read")
    try:
        # orjson rejects NaN, lone surrogates, and nesting deeper than 1,024 levels.
        return orjson.loads(data)
    except ValueError as problem:
        raise error(f"{file} cannot be read: {one_line(problem)}") from problem


def read_object(
    file: Path,
    bounds: JsonBounds = SMALL_JSON,
    error: type[CheckpointError] = CheckpointError,
) -> dict[str, Any]:
    """Read the object in a JSON file; raises as ``read_json`` does, also for other values."""
    value = read_json(file, bounds, error)
    if not isinstance(value, dict):
        raise error(f"{file} holds {shown(value)}; it must hold a JSON object")
    return value


def _refuse_foreign(file: Path, error: type[CheckpointError]) -> None:
    """Reject links out of a model's folder, which could copy any local file into a checkpoint.

    The cache of the Hugging Face Hub is allowed to link ``snapshots/<revision>/<file>`` to
    ``blobs``.
    """
    if not file.is_symlink():
        return
    target, folder = file.resolve(), file.parent.resolve()
    cache = folder.parent.parent if folder.parent.name == "snapshots" else folder
    if not target.is_relative_to(folder) and not target.is_relative_to(cache / "blobs"):
        raise error(
            f"{file} is a link to {target}, outside the model's folder; put a copy in its place"
        )


def is_inside(folder: Path, name: object) -> bool:
    """Whether ``name`` is a path that cannot lead out of ``folder``."""
    if not isinstance(name, str) or "\0" in name or os.path.isabs(name):  # noqa: PTH117
        return False
    return ".." not in Path(name).parts

"""Hashes of this package's source, by which what was made of it is known again."""

import hashlib
from functools import cache
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_SUFFIXES = (".py", ".h", ".cc")
DEVICE_ROOMS = ("config.py", "sharding", "layers", "kernels", "models", "weights", "runner")
"""All that compiled programs may be made of."""


@cache
def source_hash(*rooms: str) -> str:
    """SHA-256 over the source files of some rooms (files or folders), or of the whole package."""
    digest = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*")):
        path = file.relative_to(_PACKAGE)
        if file.suffix in _SUFFIXES and (not rooms or path.parts[0] in rooms):
            digest.update(str(path).encode() + b"\0")
            digest.update(file.read_bytes() + b"\0")
    return digest.hexdigest()

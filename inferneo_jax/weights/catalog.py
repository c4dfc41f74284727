"""The catalog of models with short names, and the folder that holds the checkpoints."""

import dataclasses
import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import read_text, shown
from inferneo_jax.platform.atomic import remove_folder
from inferneo_jax.weights.checkpoint import INFO_FILE, CheckpointInfo, fingerprint, read_info

_PACKAGE = Path(__file__).resolve().parent.parent
# A built wheel carries the catalog inside the package; in a checkout it lies outside of it.
_CHECKOUT_CATALOG = _PACKAGE.parent / "checkpoints" / "catalog.toml"
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One model that has a short name.

    ``source`` is a pip requirement. ``file`` is a path inside its wheel, to a GGUF file or to a
    folder in Hugging Face's layout. ``sha256`` and ``size`` (bytes) describe the wheel.
    """

    name: str
    kind: Literal["chat", "embedding"]
    source: str
    file: str
    sha256: str
    size: int
    licence: str
    description: str


def load_catalog(file: Path | None = None) -> dict[str, CatalogEntry]:
    """Read a catalog, by default the project's own: entries by name, in the order of the file.

    Raises:
        CheckpointError: the file is missing or malformed.
    """
    if file is None:
        packaged = _PACKAGE / "catalog.toml"
        file = packaged if packaged.exists() else _CHECKOUT_CATALOG
    try:
        tables = tomllib.loads(read_text(file))
        entries = {
            name: CatalogEntry(name=name, source=table.pop("requirement"), **table)
            for name, table in tables.items()
        }
        for entry in entries.values():
            for each in dataclasses.fields(entry):
                wanted = int if each.type is int else str
                if not isinstance(value := getattr(entry, each.name), wanted):
                    raise TypeError(f"{each.name} of {entry.name} is {shown(value)}")
        return entries
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the catalog {file} cannot be used: {error!r}") from error


def default_checkpoints_dir() -> Path:
    """The default folder for checkpoints.

    This is the checkout's own folder when the package runs from a checkout, and otherwise one in
    the user's cache folder (XDG Base Directory Specification).
    """
    if _CHECKOUT_CATALOG.exists():
        return _CHECKOUT_CATALOG.parent
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "inferneo" / "checkpoints"


def checkpoint_path(checkpoints: Path, name: str) -> Path:
    """The folder of a checkpoint: its name, which may contain slashes, below ``checkpoints``.

    Raises:
        CheckpointError: the path would lie outside ``checkpoints`` or within another checkpoint.
    """
    if not all(_PART.fullmatch(part) for part in name.split("/")):
        raise CheckpointError(
            f"{name!r} cannot name a model; letters, digits and ._:+- can, with single slashes "
            "between parts that begin with a letter or a digit"
        )
    path = Path(checkpoints) / name
    for parent in path.parents:
        if parent == Path(checkpoints):
            break
        if (parent / INFO_FILE).exists():
            raise CheckpointError(f"{name!r} would lie within the model at {parent}")
    return path


def list_checkpoints(checkpoints: Path) -> dict[str, Path]:
    """The folders of all complete checkpoints below ``checkpoints``, by name and sorted by it."""
    found = {}
    for folder, folders, files in os.walk(checkpoints):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        if INFO_FILE in files:
            folders.clear()
            found[Path(folder).relative_to(checkpoints).as_posix()] = Path(folder)
    return found


def find_checkpoint(checkpoints: Path, name: str) -> Path:
    """The folder of an existing checkpoint, which may be damaged.

    Raises:
        CheckpointError: no checkpoint has this name.
    """
    path = checkpoint_path(checkpoints, name)
    if not (path / INFO_FILE).exists():
        known = ", ".join(list_checkpoints(checkpoints)) or "none"
        raise CheckpointError(f"no model {name!r} in {checkpoints}; there are: {known}")
    return path


def look(path: Path) -> CheckpointInfo:
    """Describe the checkpoint in a folder, after a quick check that it is complete.

    The check reads the description of every weight and all values of its vectors.

    Raises:
        CheckpointError: the checkpoint is damaged or does not exist.
    """
    info = read_info(path)
    fingerprint(info)
    return info


def remove_checkpoint(checkpoints: Path, name: str) -> None:
    """Remove a checkpoint, even a damaged one, and the parent folders that it leaves empty.

    Raises:
        CheckpointError: no checkpoint has this name.
    """
    path = find_checkpoint(checkpoints, name)
    remove_folder(path)
    prune_parents(checkpoints, path)


def prune_parents(checkpoints: Path, path: Path) -> None:
    """Remove the empty folders between ``checkpoints`` and ``path``."""
    for parent in path.parents:
        if parent == Path(checkpoints) or any(parent.iterdir()):
            break
        parent.rmdir()

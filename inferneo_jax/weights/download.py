"""Downloads a file of known content from the first of several sources that has it.

The bytes that arrived are kept under a name with the content's digest, so that a later attempt, or
another source, continues where an earlier one was cut off.
"""

import contextlib
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from inferneo_jax.errors import FetchError
from inferneo_jax.platform.atomic import PARTIAL
from inferneo_jax.platform.progress import Progress

CHUNK = 1 << 20
"""Bytes that are read, hashed and written at a time."""
_AT_ONCE = 4  # one connection seldom fills a fast network


@dataclass(frozen=True, kw_only=True)
class RemoteFile:
    """A file to download, known by its content.

    Attributes:
        path: where it belongs, relative to the model's folder.
        size: in bytes.
        digest: in hexadecimal digits.
        algorithm: that of the digest. ``git`` is SHA-1 over git's header and the content, by which
            the Hub knows small files.
    """

    path: str
    size: int
    digest: str
    algorithm: Literal["sha256", "git"] = "sha256"

    def hasher(self) -> Any:
        """A hash object that yields the digest once it has seen all of the content."""
        if self.algorithm == "sha256":
            return hashlib.sha256()
        header = b"blob %d\0" % self.size
        return hashlib.sha1(header, usedforsecurity=False)


class Source(Protocol):
    """A place that may have a file. Its ``str`` names it in error messages."""

    def cached(self, file: RemoteFile) -> Path | None:
        """A complete copy on this machine, which is verified like what arrives; None without."""
        ...

    def read(
        self, file: RemoteFile, offset: int, scratch: Path, arrived: Callable[[int], None]
    ) -> Generator[bytes]:
        """Yield the content of ``file`` from ``offset`` to its end, in pieces of any size.

        Args:
            file: the file to read.
            offset: number of bytes that are not needed.
            scratch: a folder for what must be stored meanwhile.
            arrived: called with the total number of bytes that have arrived, where this is ahead
                of what has been yielded.

        Raises:
            FetchError: the source does not have the file, or was interrupted.
        """
        ...


class DigestError(FetchError):
    """A source has other content than promised."""


class Tally:
    """Reports the progress of a download of one or more files, by any thread, in bytes of all."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._lock = threading.Lock()
        self._done: dict[str, int] = {}  # by the paths of files
        self._cancelled = False

    def report(self, stage: str, file: RemoteFile, done: int) -> None:
        """Report that ``done`` bytes of a file are here; less than before counts as before.

        Raises:
            CancelledError: the download has been cancelled.
        """
        with self._lock:
            if self._cancelled:
                raise CancelledError
            self._done[file.path] = max(self._done.get(file.path, 0), min(done, file.size))
            try:
                self._progress(stage, sum(self._done.values()), self._total)
            except BaseException:  # it is how whoever watches ends the download
                self._cancelled = True
                raise

    def cancel(self) -> None:
        """End the download in every thread that reports."""
        self._cancelled = True


def download(
    files: Sequence[tuple[RemoteFile, Sequence[Source]]], folder: Path, tally: Tally
) -> None:
    """Download files into ``folder``, several at a time; those that are there are complete.

    Raises:
        FetchError: the disk is too small, or no source has a file; the message gives the reason
            of each.
        OSError: a file cannot be stored.
    """
    _require_space(sum(_missing(file, sources, folder) for file, sources in files), folder)
    # The small ones first: most of what is wrong with a model is known from its configuration.
    ordered = sorted(files, key=lambda each: each[0].size)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        futures = [pool.submit(_download, *each, folder, tally) for each in ordered]
        try:
            for future in as_completed(futures):
                with contextlib.suppress(CancelledError):  # by the one that ended it, yet to come
                    future.result()
        except BaseException:
            tally.cancel()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _missing(file: RemoteFile, sources: Sequence[Source], folder: Path) -> int:
    """Number of bytes of a file that are not on this machine; copies elsewhere on it are linked."""
    target, partial = _places(file, folder)
    if target.exists():
        return 0
    target.parent.mkdir(parents=True, exist_ok=True)
    for source in sources:
        _link(source.cached(file), partial)
    return file.size - (partial.stat().st_size if partial.exists() else 0)


def _places(file: RemoteFile, folder: Path) -> tuple[Path, Path]:
    """The path of a file that is complete and verified, and the one of a partial file."""
    target = folder / file.path
    return target, target.with_name(f"{target.name}.{file.digest}{PARTIAL}")


def _download(file: RemoteFile, sources: Sequence[Source], folder: Path, tally: Tally) -> None:
    target, partial = _places(file, folder)
    if not target.exists():
        reasons = []
        for source in sources:
            try:
                _fill(partial, file, source, folder, tally)
                break
            except FetchError as error:
                reasons.append(f"{source}: {error}")
        else:
            if len(reasons) == 1:
                raise FetchError(f"{file.path} could not be downloaded from {reasons[0]}")
            raise FetchError(
                "\n  ".join([f"{file.path} could not be downloaded from any source:", *reasons])
            )
        partial.rename(target)
    tally.report("downloading", file, file.size)


def folder_bytes(folder: Path) -> int:
    """The total size of all files below ``folder``, in bytes; files may come and go meanwhile."""
    total = 0
    for place, _, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(FileNotFoundError):
                total += Path(place, name).stat().st_size
    return total


def _link(copy: Path | None, partial: Path) -> None:
    """Put a copy in the place of a partial file, where the disk is the same: it takes no space."""
    if copy is None:
        return
    link = partial.with_name(f"{partial.name}.link")
    with contextlib.suppress(OSError):  # another disk, or one without links
        link.unlink(missing_ok=True)
        os.link(copy.resolve(), link)
        link.rename(partial)


def _fill(partial: Path, file: RemoteFile, source: Source, scratch: Path, tally: Tally) -> None:
    """Complete a partial file from one source, and verify it."""
    kept = partial.exists() and partial.stat().st_size
    try:
        _receive(partial, file, source, scratch, tally)
    except DigestError:
        if not kept:
            raise
        # The kept bytes may be another source's, or may have been damaged on disk.
        _receive(partial, file, source, scratch, tally)


def _receive(partial: Path, file: RemoteFile, source: Source, scratch: Path, tally: Tally) -> None:
    """Append what a partial file lacks; it is removed if its content is not the promised one."""
    hasher, done = file.hasher(), 0
    with partial.open("a+b") as out:
        out.seek(0)
        while chunk := out.read(CHUNK):
            hasher.update(chunk)
            done += len(chunk)
            tally.report("verifying", file, done)
        if done < file.size:

            def arrived(count: int) -> None:
                tally.report("downloading", file, count)

            # Closed at once, whatever happens, because it may hold locks and processes.
            with contextlib.closing(source.read(file, done, scratch, arrived)) as pieces:
                for piece in pieces:
                    out.write(piece)
                    hasher.update(piece)
                    done += len(piece)
                    if done > file.size:
                        break
                    arrived(done)
        out.flush()
        os.fsync(out.fileno())
    if done < file.size:
        raise FetchError(f"it ended after {done:,} of {file.size:,} bytes")
    if done > file.size or hasher.hexdigest() != file.digest:
        partial.unlink()
        found = f"more than {file.size:,} bytes" if done > file.size else hasher.hexdigest()
        raise DigestError(f"its content is not {file.digest} ({file.algorithm}) but {found}")


def _require_space(missing: int, folder: Path) -> None:
    if missing > (free := shutil.disk_usage(folder).free):
        raise FetchError(
            f"{missing / 1e9:,.2f} GB are missing, and the disk of {folder} has {free / 1e9:,.2f} "
            "GB left; free some space there, or name another folder with --checkpoints or "
            "INFERNEO_CHECKPOINTS"
        )

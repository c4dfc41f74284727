"""Files that Python packages carry, whole or in parts, downloaded by pip."""

import hashlib
import os
import subprocess
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from inferneo_jax.errors import FetchError
from inferneo_jax.platform.atomic import PARTIAL, scratch_folder
from inferneo_jax.weights.download import CHUNK, RemoteFile, folder_bytes

WHEEL = "wheel"
"""Folder below that of a download in which one wheel at a time is stored."""
_POLL_SECONDS = 0.1
_PIECE_BYTES = 2**26


@dataclass(frozen=True, kw_only=True)
class Part:
    """One wheel, or one of its members.

    Attributes:
        requirement: what pip is asked for.
        sha256: that of the wheel.
        size: of the member or, without one, of the wheel; in bytes.
        member: a path inside the wheel; None for the wheel itself.
    """

    requirement: str
    sha256: str
    size: int
    member: str | None = None


@dataclass(frozen=True, kw_only=True)
class Deflated:
    """Where compressed data (RFC 1951) lies among the concatenated parts, in bytes."""

    start: int
    size: int


@dataclass(frozen=True, kw_only=True)
class Packages:
    """A file that is the concatenation of parts, or is compressed within it.

    Concatenated parts are passed on one by one, so that only one wheel is stored at a time.
    Compressed data cannot be entered in the middle, so it is stored until it is complete.
    """

    parts: tuple[Part, ...]
    deflated: Deflated | None = None

    def __str__(self) -> str:
        first, last = self.parts[0].requirement, self.parts[-1].requirement
        return f"the package {first}" if first == last else f"the packages {first} to {last}"

    def cached(self, file: RemoteFile) -> Path | None:
        """None: pip keeps no copy."""
        return None

    def read(
        self, file: RemoteFile, offset: int, scratch: Path, arrived: Callable[[int], None]
    ) -> Generator[bytes]:
        """Yield the file's content from ``offset``; see ``Source``."""
        if self.deflated is None:
            yield from self._concatenated(offset, scratch, arrived)
            return
        pieces = _Pieces(scratch, file.digest)
        self._store(self.deflated, pieces, scratch, arrived)
        try:
            yield from _inflated(pieces, offset, file.size)
        except FetchError:
            pieces.remove()
            raise

    def _store(
        self, deflated: Deflated, pieces: "_Pieces", scratch: Path, arrived: Callable[[int], None]
    ) -> None:
        """Complete the compressed data."""
        done = pieces.size()
        if done >= deflated.size:
            return
        rest = self._concatenated(
            deflated.start + done, scratch, lambda n: arrived(n - deflated.start)
        )
        with closing(rest) as stream:
            for data in stream:
                pieces.append(data[: deflated.size - done])
                done += len(data)
                arrived(done)
                if done >= deflated.size:
                    return
        raise FetchError(f"{deflated.size - done:,} bytes of the compressed data are missing")

    def _concatenated(
        self, start: int, scratch: Path, arrived: Callable[[int], None]
    ) -> Generator[bytes]:
        """Yield the concatenation of all parts from ``start``."""
        begin = 0
        for part in self.parts:
            skipped = max(0, start - begin)
            if skipped < part.size:
                with scratch_folder(scratch / WHEEL) as folder:
                    at = begin
                    wheel = _pip_download(part, folder, lambda n: arrived(at + n))  # noqa: B023
                    yield from _content(wheel, part, skipped)
            begin += part.size


class _Pieces:
    """Compressed data in files of some size, which are removed one by one as they are read.

    So the data and what it holds need not be on the disk at once.
    """

    def __init__(self, scratch: Path, digest: str) -> None:
        self._scratch = scratch
        self._prefix = f"{digest}.deflated."
        self._files: list[Path] = []
        while (file := self._file(len(self._files))).exists():
            self._files.append(file)
        # Reading was interrupted: the data has lost its beginning.
        if not self._files:
            self.remove()

    def _file(self, index: int) -> Path:
        return self._scratch / f"{self._prefix}{index}{PARTIAL}"

    def size(self) -> int:
        """Number of bytes that are stored."""
        return sum(file.stat().st_size for file in self._files)

    def append(self, data: bytes) -> None:
        """Store more data."""
        if not self._files or self._files[-1].stat().st_size >= _PIECE_BYTES:
            self._files.append(self._file(len(self._files)))
        with self._files[-1].open("ab") as out:
            out.write(data)

    def read(self) -> Generator[bytes]:
        """Yield the data; each file is removed when the next one is asked for."""
        for file in self._files:
            with file.open("rb") as opened:
                while chunk := opened.read(CHUNK):
                    yield chunk
            file.unlink()

    def remove(self) -> None:
        """Remove all files."""
        for file in self._scratch.glob(f"{self._prefix}*"):
            file.unlink()


def _inflated(pieces: _Pieces, skipped: int, size: int) -> Generator[bytes]:
    """Yield the decompressed content, ``size`` bytes, all but the first ``skipped``."""
    decompressor, done = zlib.decompressobj(-zlib.MAX_WBITS), 0
    for data in pieces.read():
        rest = data
        while rest:
            try:
                content = decompressor.decompress(rest, CHUNK)
            except zlib.error as error:
                raise FetchError(f"the compressed data is damaged ({error})") from error
            rest = decompressor.unconsumed_tail
            done += len(content)
            if done > size:
                raise FetchError(f"the compressed data holds more than {size:,} bytes")
            yield content[max(0, len(content) - max(0, done - skipped)) :]
    yield decompressor.flush()[max(0, skipped - done) :]
    if not decompressor.eof:
        raise FetchError("the compressed data ends early")


def _content(wheel: Path, part: Part, skipped: int) -> Generator[bytes]:
    """Yield a part's bytes, all but the first ``skipped``."""
    if part.member is None:
        with wheel.open("rb") as opened:
            opened.seek(skipped)
            while chunk := opened.read(CHUNK):
                yield chunk
        return
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as opened:
            if (size := archive.getinfo(part.member).file_size) != part.size:
                raise FetchError(f"{part.member} of {wheel.name} has {size} bytes, not {part.size}")
            opened.seek(skipped)
            while chunk := opened.read(CHUNK):
                yield chunk
    except KeyError:
        raise FetchError(f"{wheel.name} has no {part.member}") from None
    except (zipfile.BadZipFile, zlib.error) as error:
        raise FetchError(f"{wheel.name} is not a whole wheel: {error}") from error


def _pip_download(part: Part, scratch: Path, arrived: Callable[[int], None]) -> Path:
    """Download the wheel of a part with pip, as the user has configured it, and verify it."""
    folder, temporary = scratch / "done", scratch / "pip"
    folder.mkdir()
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
    command += ["--dest", str(folder), part.requirement]
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
                arrived(min(folder_bytes(scratch), part.size))
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
    if process.returncode:
        raise FetchError(_complaint(part, log.read_text(encoding="utf-8", errors="replace")))
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip downloaded {len(wheels)} wheels for {part.requirement}, not one")
    arrived(part.size)
    with wheels[0].open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    if digest != part.sha256:
        raise FetchError(
            f"the wheel {wheels[0].name} has the SHA-256 {digest}, the catalog promises "
            f"{part.sha256}; it was not used. Check the package index you download from"
        )
    return wheels[0]


def _complaint(part: Part, log: str) -> str:
    if "No module named pip" in log:
        return (
            f"{sys.executable} has no pip, which downloads {part.requirement}; "
            f"install it with `{sys.executable} -m ensurepip`"
        )
    lines = [line for line in log.splitlines() if line.strip()]
    return (
        f"pip could not download {part.requirement} "
        f"({' '.join(lines[-2:]) or 'it said nothing'}); check the network and pip's index"
    )

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
        stored = scratch / f"{file.digest}.deflated{PARTIAL}"
        self._store(self.deflated, stored, scratch, arrived)
        try:
            yield from _inflated(stored, offset, file.size)
        except FetchError:
            stored.unlink()
            raise
        stored.unlink()

    def _store(
        self, deflated: Deflated, stored: Path, scratch: Path, arrived: Callable[[int], None]
    ) -> None:
        """Complete the file ``stored`` with the compressed data."""
        with stored.open("ab") as out:
            missing = deflated.size - out.tell()
            if missing <= 0:
                return
            start = deflated.start + out.tell()
            all_parts = self._concatenated(start, scratch, lambda n: arrived(n - deflated.start))
            with closing(all_parts) as pieces:
                for piece in pieces:
                    out.write(piece[:missing])
                    missing -= len(piece)
                    arrived(deflated.size - missing)
                    if missing <= 0:
                        return
        raise FetchError(f"{missing:,} bytes of the compressed data are missing")

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


def _inflated(stored: Path, skipped: int, size: int) -> Generator[bytes]:
    """Yield the decompressed content of a file, ``size`` bytes, all but the first ``skipped``."""
    decompressor, done = zlib.decompressobj(-zlib.MAX_WBITS), 0
    with stored.open("rb") as compressed:
        while not decompressor.eof:
            data = decompressor.unconsumed_tail or compressed.read(CHUNK)
            if not data:
                raise FetchError("the compressed data ends early")
            try:
                piece = decompressor.decompress(data, CHUNK)
            except zlib.error as error:
                raise FetchError(f"the compressed data is damaged ({error})") from error
            done += len(piece)
            if done > size:
                raise FetchError(f"the compressed data holds more than {size:,} bytes")
            yield piece[max(0, len(piece) - max(0, done - skipped)) :]


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

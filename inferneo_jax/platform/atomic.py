"""Folders that appear whole or not at all, whatever happens to the process that makes them.

A folder is filled at a hidden sibling ``.<name>.partial`` and renamed when it is complete. Whoever
fills it holds a file lock, which the operating system drops with the process: a scratch folder
whose lock is free belongs to nobody and may be swept. That needs no process ids, which are reused
and mean nothing across containers that share a disk. Downloads are locked likewise, but kept for
the process that continues them.
"""

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from inferneo_jax.errors import CheckpointError

PARTIAL = ".partial"
"""What the name of a file ends with while it is written."""

_LOCK, _DOOMED = ".lock", ".doomed"


def _lock_of(scratch: Path) -> Path:
    return scratch.with_name(scratch.name + _LOCK)


def _acquire(lock: Path, *, wait: bool) -> int | None:
    """A descriptor that holds the lock, or None when another process does and ``wait`` is off."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # A holder unlinks the lock as it leaves; a lock on an unlinked file guards nothing.
            if os.fstat(descriptor).st_nlink:
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path, on_wait: Callable[[], None]) -> Iterator[None]:
    """Hold the lock of a folder; waits for another holder, after calling ``on_wait`` once."""
    lock = _lock_of(folder)
    descriptor = _acquire(lock, wait=False)
    if descriptor is None:
        on_wait()
        descriptor = _acquire(lock, wait=True)
        assert descriptor is not None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


@contextlib.contextmanager
def scratch_folder(scratch: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """An empty folder that this process alone uses; it is gone when the block ends.

    Waits while another process uses it, after calling ``on_wait`` once.
    """
    with _locked(scratch, on_wait):
        try:
            discard(scratch)
            scratch.mkdir()
            yield scratch
        finally:
            discard(scratch)


@contextlib.contextmanager
def kept_folder(folder: Path, on_wait: Callable[[], None] = lambda: None) -> Iterator[Path]:
    """A folder that this process alone uses, with what an earlier process has left in it.

    It is kept when the block ends, also when the process is killed. Waits while another process
    uses it, after calling ``on_wait`` once.
    """
    with _locked(folder, on_wait):
        folder.mkdir(exist_ok=True)
        yield folder


@contextlib.contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to fill; it becomes ``destination`` when the block ends and vanishes if it raises.

    Raises:
        CheckpointError: ``destination`` exists already.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    sweep(destination.parent)
    with scratch_folder(partial_of(destination)) as partial:
        refuse_existing(destination)
        yield partial
        for folder, _, files in os.walk(partial):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        partial.rename(destination)
        _sync(destination.parent)


def write_whole(file: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file whole or not at all, whoever else writes it. Its folder is made.

    Not synced to the disk: for what can be made again, and is checked when it is read.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=file.parent, suffix=PARTIAL, delete=False) as out:
        try:
            for part in parts:
                out.write(part)
            out.close()
            Path(out.name).replace(file)
        except BaseException:
            Path(out.name).unlink(missing_ok=True)
            raise


def partial_of(destination: Path) -> Path:
    """Where the folder is filled before it gets its name."""
    return destination.with_name(f".{destination.name}.partial")


def refuse_existing(destination: Path) -> None:
    """Raises CheckpointError when something lies at ``destination``."""
    if os.path.lexists(destination):
        raise CheckpointError(
            f"{destination} exists already; remove it with `inferneo rm` or choose another name"
        )


def remove_folder(folder: Path) -> None:
    """Removes a folder; it is gone from its name at once, and wholly later."""
    with scratch_folder(partial_of(folder)) as partial:
        folder.rename(partial)


def remove_kept(folder: Path) -> None:
    """Remove a folder made by ``kept_folder``.

    Raises:
        CheckpointError: a process uses it.
    """
    lock = _lock_of(folder)
    descriptor = _acquire(lock, wait=False)
    if descriptor is None:
        raise CheckpointError(f"{folder} is used by another process; end that first")
    try:
        discard(folder)
    finally:
        lock.unlink(missing_ok=True)
        os.close(descriptor)


def sweep(parent: Path) -> None:
    """Removes scratch folders in ``parent`` whose process is gone; live ones are left alone."""
    leftovers = {
        path.with_name(path.name.removesuffix(ending))
        for ending in ("", _LOCK, _DOOMED)
        for path in parent.glob(f".*{PARTIAL}{ending}")
    }
    for scratch in leftovers:
        lock = _lock_of(scratch)
        descriptor = _acquire(lock, wait=False)
        if descriptor is not None:
            discard(scratch)
            lock.unlink(missing_ok=True)
            os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder whose lock this process holds, if it exists.

    It loses its name first: an orphaned download may still be writing there.
    """
    doomed = folder.with_name(folder.name + _DOOMED)
    for _ in range(2):
        if doomed.exists():
            shutil.rmtree(doomed)
        if folder.exists():
            folder.rename(doomed)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

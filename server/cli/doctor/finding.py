"""The finding of a check."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was checked.
        state: with ``warning``, the server runs, but not optimally, or not for every client.
        text: what was found.
        fix: a command, or other advice; None if there is nothing to do.
    """

    check: str
    state: State
    text: str
    fix: str | None = None


def existing(path: Path) -> Path:
    """Return the path, or its nearest parent folder that exists."""
    return next(each for each in (path, *path.parents) if each.exists())


def in_bytes(number: float) -> str:
    """Format a size in bytes for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def size_of(folder: Path) -> int:
    """Return the size of all files below a folder, which may be changing, in bytes."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # it has just been removed, or is not readable
            continue
    return total

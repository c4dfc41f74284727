"""What a check finds."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

State = Literal["ok", "warning", "problem"]


@dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        check: what was looked at.
        state: ``warning``: the server runs, but not as well as it could, or not for everybody.
        text: what was found.
        fix: a command, or what else to do; None: nothing is to be done.
    """

    check: str
    state: State
    text: str
    fix: str | None = None


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    return next(each for each in (path, *path.parents) if each.exists())


def in_bytes(number: float) -> str:
    """A size, for people."""
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder, which may be changing."""
    total = 0
    for file in folder.rglob("*"):
        try:
            total += file.stat().st_size if file.is_file() else 0
        except OSError:  # it has just been removed, or is not ours to see
            continue
    return total

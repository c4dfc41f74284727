"""The paths of the files that tests read and keep."""

import os
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Of the checkout."""
GOLDEN = ROOT / "tests" / "golden"
FAMILIES = GOLDEN / "families"
"""Tiny random models, one for each family."""


def _own_folder(name: str) -> Path:
    """A folder of this user's below the temporary one, the same in every process and run."""
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    assert found.st_uid == os.getuid(), f"{folder} is another user's"
    assert found.st_mode & 0o77777 == 0o40700, f"{folder} is open to other users"
    return folder


COMPILED = _own_folder("inferneo-jax-tests")
"""Takes the programs that tests compile, for the other processes of this run and for later runs.

A program is known there by the source and the configuration that it is made of, so a change of
either compiles it anew.
"""

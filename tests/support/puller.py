"""Pulls that can be killed at any time."""

import sys
from collections.abc import Iterator
from pathlib import Path

import huggingface_hub.hf_api  # noqa: F401 - so that no fork spends its time on it

from inferneo_jax.weights.catalog import load_catalog
from inferneo_jax.weights.fetch import pull
from tests.support.killed import killed_runs


def killed_pulls(
    kills: int, longest: float, *arguments: object, **environment: str
) -> Iterator[None]:
    """Pull, with arguments STORE NAME [CATALOG PIP], and kill it after a random time."""
    return killed_runs(kills, longest, pulled, *arguments, **environment)


def pulled(store: str, name: str, catalog: str = "", pip: str = "") -> None:
    """Pull a model, from another catalog and by another interpreter's pip."""
    sys.executable = pip or sys.executable
    pull(name, Path(store), catalog=load_catalog(Path(catalog)) if catalog else None)

"""The form in which long work reports how far it is."""

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
"""Called with a stage, the amount done and the total, which is 0 if it is unknown."""


def silent(stage: str, done: int, total: int) -> None:
    """Ignore progress."""
